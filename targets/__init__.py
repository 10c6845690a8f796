"""What a device is: identity, capacities, rates, roofline."""

from __future__ import annotations

from .detect import available_cores, cpu_isa_flags, gpu_problem
from .table import TARGETS
from .target import Target

__all__ = ["TARGETS", "Target", "available_cores", "cpu_isa_flags", "gpu_problem"]
