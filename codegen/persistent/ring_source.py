"""The kernel of a ring as a ``KernelSource``, which is compiled as all kernels are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...ir.dtypes import DType
from ..triton.source import (
    Argument,
    Constexpr,
    Described,
    KernelSource,
    Launch,
    Pointer,
    Scalar,
    Variant,
    jit_text,
)
from .ring import Ring

NAME = "decode_ring"
"""Of the kernel."""
ARCH = 90
"""Of the devices that it has been run on; others have no TMA, or have not been tried."""
_HEADER = """import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
"""
_POLLS = ("_values", "_two_values", "_part_values")
_ATTENTION = ("_time", "_keys", "_turned", "_attend")
_LOADS = ("_mine", "_bring_half", "_bring_product", "_bring")
_MMA = (
    "_pair",
    "_pairs",
    "_fours",
    "_eights",
    "_firsts",
    "_first_of_fours",
    "_numbers_times",
    "_row_times",
    "_bytes_times",
    "_codes_times",
    "_two_sums",
)
_PRODUCT = (
    "_rounded",
    "_input",
    "_by_largest",
    "_in_steps",
    "_group_scales",
    "_row_of",
    "_gated",
    "_product",
)
_STEP = ("_pointer", "_note_angles", "_consume", "_ring_step")
_FOR_BITS: Mapping[str, int] = {
    **dict.fromkeys(("_fours", "_bytes_times", "_by_largest", "_in_steps"), 8),
    **dict.fromkeys(("_BYTES", "_BYTES_USED", "_NARROWER", "_WIDER"), 8),
    **dict.fromkeys(("_eights", "_first_of_fours", "_codes_times", "_group_scales"), 4),
    **dict.fromkeys(("_CODES", "_CODES_USED"), 4),
}
"""What only kernels for weights of so many bits have: records of the others outlive its changes."""
POINTERS: Mapping[str, DType] = {
    "places": DType.I64,
    "token_ids": DType.I64,
    "positions": DType.I64,
    "seq_lens": DType.I32,
    "slot_mapping": DType.I64,
    "block_tables": DType.I32,
    "inv_freq": DType.F32,
    "memory": DType.BF16,
    "partials": DType.F32,
    "logits": DType.BF16,
    "times": DType.I32,
    "homes": DType.I32,
    "counters": DType.I32,
    "diagnosis": DType.I32,
}
"""Run-time parameters behind the tensor maps, by name."""


@dataclass(frozen=True, slots=True)
class RingCut:
    """How the launch is cut.

    Attributes:
        programs: of the launch, all resident at once.
        slots: tiles of weights that a program's ring holds.
        cap: halves of tiles that a program has under way: a read takes as long as what is under way
            in front of it.
        keys: of a block of attention.
        num_warps: that compute.
    """

    programs: int = 132
    slots: int = 6
    cap: int = 2
    keys: int = 32
    num_warps: int = 4


def ring_source(ring: Ring, cut: RingCut, timed: bool = False) -> KernelSource:
    """The kernel; ``timed`` notes times."""
    maps = [
        Described(name, DType.BF16, "operand", 0, 0, (0, ring.unit), (ring.unit, 1), box, 0)
        for name, box in zip(
            ("desc", "desc_attended", "desc_inner", "desc_head"),
            ((rows.box, ring.unit) for rows in ring.rows),
            strict=True,
        )
    ]
    pointers = [
        Pointer(name, dtype, "operand", 1 + index)
        for index, (name, dtype) in enumerate(POINTERS.items())
    ]
    arguments: tuple[Argument, ...] = (*maps, *pointers, Scalar("limit", 0))
    launch = Launch(
        "_ring_step", arguments, (cut.programs, 1, 1), _constants(ring, cut, timed), cut.num_warps
    )
    return KernelSource(NAME, "template", _text(ring.bits), (Variant((launch,)),), contracts=True)


def _constants(ring: Ring, cut: RingCut, timed: bool) -> dict[str, Constexpr]:
    attention = ring.attention
    wide, attended, inner, _ = ring.rows
    codes = ring.codes
    return {
        "LAYERS": ring.layers,
        "WIDTH": ring.width,
        "INNER": ring.inner,
        "VOCAB": ring.vocab,
        "HEADS": attention.heads,
        "KV_HEADS": attention.kv_heads,
        "D": attention.head_dim,
        "PAGE": attention.page_size,
        "P": wide.pitch,
        "P_ATTENDED": attended.pitch,
        "P_INNER": inner.pitch,
        "EPS": ring.eps,
        "FACTOR": attention.factor,
        "ROPE_STEPWISE": attention.stepwise,
        "STEPWISE": ring.stepwise,
        "SLOTS": cut.slots,
        "CAP": cut.cap,
        "KEYS": cut.keys,
        "BITS": ring.bits,
        "GROUP": 0 if codes is None else codes.group,
        "SCALE": 2 if codes is None else codes.scale_bytes,
        "TIMED": timed,
    }


def _text(bits: int) -> str:
    from . import (
        ring_attention_kernel,
        ring_kernel,
        ring_loads_kernel,
        ring_mma_kernel,
        ring_polls,
        ring_product_kernel,
    )

    constants = {
        **ring_polls.TEXTS,
        **ring_mma_kernel.TEXTS,
        "_NOW": ring_attention_kernel.NOW,
        "_PLACE": ring_kernel.PLACE,
    }
    modules = {
        ring_polls: _POLLS,
        ring_attention_kernel: _ATTENTION,
        ring_loads_kernel: _LOADS,
        ring_mma_kernel: _MMA,
        ring_product_kernel: _PRODUCT,
        ring_kernel: _STEP,
    }
    lines = [f"{name} = gl.constexpr({constants[name]!r})\n" for name in _of_bits(constants, bits)]
    texts = (jit_text(module, _of_bits(names, bits)) for module, names in modules.items())
    return "".join((_HEADER, *lines, *texts))


def _of_bits(names: Iterable[str], bits: int) -> tuple[str, ...]:
    return tuple(name for name in names if _FOR_BITS.get(name, bits) == bits)
