"""The table of known devices: peak figures as the vendor's documents give them.

Sizes per SM are from the CUDA C++ Programming Guide ("Technical Specifications per Compute
Capability"), bandwidth and rates from the document that each row names. Rates are dense: figures
that a datasheet gives "with sparsity" are halved. float32 is the rate of plain FP32 units, tf32
that of the tensor cores.

The rows were entered from memory of those documents; A100, H100 and the bandwidth, 16-bit and FP8
rates of L4 and B200 were checked against public listings, which differ on the L4's SMs (58 or 60)
and on the B200's float32 and tf32 (80 and 1100). The B200's SMs and L2 were not checked.

The CPU row is one core; `Target.detect` scales its rates by the cores at hand. What a device
sustains is less: the H100 of our measurements (SXM5 80GB, torch 2.11) copies 3022 GB/s and
multiplies 716 TFLOP/s in bfloat16, 1288 in FP8.
"""

from __future__ import annotations

from collections.abc import Mapping

from .target import Target

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


def _gpu(
    name: str,
    arch: int,
    sms: int,
    shared_kib: tuple[int, int],
    l2_mib: int,
    dram: tuple[int, float],
    tflops: Mapping[str, float],
    source: str,
) -> Target:
    """A row; shared_kib is (per SM, per block), dram is (GiB, GB/s)."""
    per_sm, per_block = shared_kib
    gib, gb_per_s = dram
    return Target(
        name=name,
        arch=arch,
        sms=sms,
        shared_memory_per_sm=per_sm * _KIB,
        shared_memory_per_block=per_block * _KIB,
        registers_per_sm=65536,
        l2_bytes=l2_mib * _MIB,
        dram_bytes=gib * _GIB,
        dram_gb_per_s=gb_per_s,
        tflops=tuple(tflops.items()),
        source=source,
    )


def _rates(
    float32: float, tf32: float, half: float, eight: float = 0.0, int8: float = 0.0
) -> dict[str, float]:
    """Rates by dtype name; `half` is both 16-bit types, `eight` both FP8 types."""
    rates = {"float32": float32, "tf32": tf32, "float16": half, "bfloat16": half}
    if eight:
        rates |= {"float8_e4m3fn": eight, "float8_e5m2": eight}
    return rates | ({"int8": int8} if int8 else {})


_ROWS = (
    Target(
        name="cpu",
        arch=0,
        sms=1,
        shared_memory_per_sm=0,
        shared_memory_per_block=0,
        registers_per_sm=0,
        l2_bytes=2 * _MIB,
        dram_bytes=0,
        dram_gb_per_s=51.2,
        tflops=(("float32", 0.1), ("bfloat16", 0.1), ("float16", 0.1), ("int8", 0.2)),
        source="Intel 64 Optimization Reference Manual: one core, two 512-bit FMAs at 1.6 GHz; "
        "JEDEC JESD79-4: two channels of DDR4-3200",
    ),
    _gpu(
        "a100",
        80,
        108,
        (164, 163),
        40,
        (80, 2039.0),
        _rates(19.5, 156.0, 312.0, int8=624.0),
        "NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM",
    ),
    _gpu(
        "a10",
        86,
        72,
        (100, 99),
        6,
        (24, 600.0),
        _rates(31.2, 62.5, 125.0, int8=250.0),
        "NVIDIA A10 Tensor Core GPU datasheet (tensor rates there are also given with sparsity)",
    ),
    _gpu(
        "rtx3090",
        86,
        82,
        (100, 99),
        6,
        (24, 936.0),
        _rates(35.6, 35.6, 71.2, int8=284.7),
        "NVIDIA Ampere GA102 GPU Architecture whitepaper, table of GeForce RTX 3090 (tensor rates "
        "with FP32 accumulate)",
    ),
    _gpu(
        "l4",
        89,
        58,
        (100, 99),
        48,
        (24, 300.0),
        _rates(30.3, 60.0, 121.0, 242.5, 242.5),
        "NVIDIA L4 Tensor Core GPU datasheet (tensor rates there are with sparsity)",
    ),
    _gpu(
        "rtx4090",
        89,
        128,
        (100, 99),
        72,
        (24, 1008.0),
        _rates(82.6, 82.6, 165.2, 330.3, 660.6),
        "NVIDIA Ada GPU Architecture whitepaper, appendix A (tensor rates with FP32 accumulate)",
    ),
    _gpu(
        "h100",
        90,
        132,
        (228, 227),
        50,
        (80, 3352.0),
        _rates(66.9, 494.7, 989.4, 1978.9, 1978.9),
        "NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM5",
    ),
    _gpu(
        "h200",
        90,
        132,
        (228, 227),
        50,
        (141, 4800.0),
        _rates(66.9, 494.7, 989.4, 1978.9, 1978.9),
        "NVIDIA H200 Tensor Core GPU datasheet, H200 SXM",
    ),
    _gpu(
        "rtx5090",
        120,
        170,
        (100, 99),
        96,
        (32, 1792.0),
        _rates(104.8, 104.8, 209.5, 419.0, 838.0),
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A (tensor rates with FP32 "
        "accumulate)",
    ),
    _gpu(
        "b200",
        100,
        148,
        (228, 227),
        126,
        (180, 8000.0),
        _rates(75.0, 1125.0, 2250.0, 4500.0, 4500.0),
        "NVIDIA DGX B200 datasheet, one of its eight GPUs (tensor rates there are with sparsity)",
    ),
)

TARGETS: Mapping[str, Target] = {row.name: row for row in _ROWS}
"""Each known device by name."""
