"""Kernel templates: one op a file, with the kernel, its default configuration and its ``emit``."""
