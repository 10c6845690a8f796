"""Backends: each lowers a graph to a Program, and loads the kernels that the Program calls."""
