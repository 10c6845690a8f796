"""The Triton backend: GPU kernels compiled ahead of time, launched through the driver.

A node becomes a ``KernelSource`` (text, arguments, grids: source.py), which is compiled for the
target without a GPU (aot.py), kept in the engine folder as a package (package.py), and launched
without Triton (launch.py) or run on a CPU by Triton's interpreter (interpreted.py).
"""
