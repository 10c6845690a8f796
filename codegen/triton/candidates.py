"""What may compute an op, in the order of preference until a tuner measures: ours, or a library."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .cuts import Cuts
from .generate import emit_fused
from .kernels.append_kv import emit_append_kv
from .kernels.dequantize import emit_dequantize
from .kernels.experts import emit_experts, emit_invariant_experts
from .kernels.linear import emit_invariant_linear, emit_linear
from .kernels.linear_tiles import Cutting
from .kernels.packed_linear import emit_invariant_packed_linear, emit_packed_linear
from .kernels.paged_attention import emit_invariant_attention, emit_paged_attention
from .kernels.paged_decode import emit_paged_decode
from .kernels.quant_linear import emit_invariant_quant_linear, emit_quant_linear
from .kernels.sample import emit_sample
from .kernels.scaled_attention import emit_invariant_scaled_attention, emit_scaled_attention
from .kernels.scaled_decode import emit_scaled_decode
from .kernels.scaled_linear import emit_invariant_scaled_linear, emit_scaled_linear
from .moves import emit_copy, emit_kv_write, emit_rope
from .source import Emit

KERNELS: Mapping[str, tuple[Emit, ...]] = {
    "fused": (
        emit_scaled_linear,
        emit_packed_linear,
        emit_quant_linear,
        emit_linear,
        emit_fused,
    ),
    "append_kv": (emit_append_kv,),
    "scaled_append_kv": (emit_append_kv,),
    "paged_attention": (emit_paged_decode, emit_paged_attention),
    "scaled_paged_attention": (emit_scaled_decode, emit_scaled_attention),
    "moe_experts": (emit_experts,),
    "dequantize": (emit_dequantize,),
    "sample": (emit_sample,),
    "rope": (emit_rope,),
    "kv_write": (emit_kv_write,),
    "concat": (emit_copy,),
    "permute": (emit_copy,),
    "expand": (emit_copy,),
    "slice": (emit_copy,),
    "reshape": (emit_copy,),
}
"""Kernels of ours by op. Products and dense attention go to the libraries (library.py); what
neither takes runs as torch defines it, and is reported.
"""


def kernels_for(cutting: Cutting, cuts: Cuts | None = None) -> Mapping[str, tuple[Emit, ...]]:
    """``KERNELS``, decode products cut as ``cutting`` says, what else has a choice as ``cuts``."""
    scaled: Emit = partial(emit_scaled_linear, cutting=cutting)
    packed: Emit = partial(emit_packed_linear, cutting=cutting)
    quantized: Emit = partial(emit_quant_linear, cutting=cutting)
    linear: Emit = partial(emit_linear, cutting=cutting)
    fused: Emit = partial(emit_fused, cuts=cuts)
    experts: Emit = partial(emit_experts, cuts=cuts, most=cutting.most)
    decode: Emit = partial(emit_paged_decode, cuts=cuts, most=cutting.most)
    prefill: Emit = partial(emit_paged_attention, cuts=cuts)
    scaled_decode: Emit = partial(emit_scaled_decode, cuts=cuts, most=cutting.most)
    scaled_prefill: Emit = partial(emit_scaled_attention, cuts=cuts)
    return {
        **KERNELS,
        "fused": (scaled, packed, quantized, linear, fused),
        "moe_experts": (experts,),
        "paged_attention": (decode, prefill),
        "scaled_paged_attention": (scaled_decode, scaled_prefill),
    }


INVARIANT: Mapping[str, tuple[Emit, ...]] = {
    **KERNELS,
    "fused": (
        emit_invariant_scaled_linear,
        emit_invariant_packed_linear,
        emit_invariant_quant_linear,
        emit_invariant_linear,
        emit_fused,
    ),
    "moe_experts": (emit_invariant_experts,),
    "paged_attention": (emit_invariant_attention,),
    "scaled_paged_attention": (emit_invariant_scaled_attention,),
}
"""Those of a deterministic Program: what a row sums up, and in which order, depends on no other
row, nor on how many there are.
"""
