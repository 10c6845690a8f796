"""From captured ATen graphs to the IR: a file of rules an op family, aten nodes for the rest."""

from .lower import foreign_ops, lower, output_structure

__all__ = ["foreign_ops", "lower", "output_structure"]
