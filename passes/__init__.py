"""Graph to graph rewrites, one file each; ``pipeline.py`` holds their order."""
