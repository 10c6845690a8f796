"""Decode products of 4-bit weights and rows rounded to int8 on a GPU: those schemes of
bench_quant_linear.py.

python benchmarks/bench_packed_linear.py [options of bench_quant_linear.py]
"""

from __future__ import annotations

import sys

from bench_quant_linear import SCHEMES, main

if __name__ == "__main__":
    both = ",".join(name for name, scheme in SCHEMES.items() if scheme.compute is not None)
    sys.exit(main(["--schemes", both, *sys.argv[1:]]))
