"""The eager backend: one torch call a node, on any device. The oracle, and what other backends
fall back to.
"""
