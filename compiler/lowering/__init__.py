"""From captured ATen graphs to the IR: one file of rules an op family, one table, aten nodes for the rest."""

from .lower import foreign_ops, lower, output_structure

__all__ = ["foreign_ops", "lower", "output_structure"]
