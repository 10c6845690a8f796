"""Regressions of generated code and of its speed: recorded, compared, traced to their commit."""
