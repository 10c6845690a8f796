"""Decode products of two operands in codes on a GPU: those schemes of bench_quant_linear.py.

python benchmarks/bench_scaled_linear.py [options of bench_quant_linear.py]
"""

from __future__ import annotations

import sys

from bench_quant_linear import SCHEMES, main

if __name__ == "__main__":
    both = ",".join(name for name, scheme in SCHEMES.items() if scheme.rounds)
    sys.exit(main(["--schemes", both, *sys.argv[1:]]))
