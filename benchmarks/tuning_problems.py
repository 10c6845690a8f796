"""The problems that the tuner is judged on: decode linears of the 8B and the 1B shape and of an
eighth of the 70B one, attention, a norm. Four of them are never used to fit the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench_linear import SHAPES
from bench_linear import node_of as linear_node
from bench_paged_attention import attention_node
from bench_paged_decode import decode_node

from tilewright.codegen.triton.tuning.attention import prefill_sizes
from tilewright.codegen.triton.tuning.decode import mixed_sizes, sizes_of
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.types import TensorType
from tilewright.passes.fuse import fuse
from tilewright.targets import Target

T = symbol("T")


@dataclass(frozen=True)
class Named:
    """A problem.

    Attributes:
        name: in the data and in tables.
        held_out: whether the prior is fitted without it.
        make: the tunable for a target.
    """

    name: str
    held_out: bool
    make: Callable[[Target], KernelTunable]


def _linear(shape: str, tokens: int, held_out: bool = False) -> Named:
    template = template_named("linear_gemv" if tokens == 1 else "linear_gemm")
    node = linear_node(SHAPES[shape])
    name = f"{shape} T={tokens}"
    return Named(
        name, held_out, lambda target: KernelTunable.of(template, node, {"B": tokens}, target)
    )


def _decode(
    batch: int,
    context: int,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    *,
    mixed: bool = False,
    held_out: bool = False,
) -> Named:
    """Decode attention over sequences of ``context`` tokens each; ``mixed`` over lengths up to
    there, as models are tuned.
    """
    template = template_named("paged_decode")
    node = decode_node(16, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    sizes = (mixed_sizes if mixed else sizes_of)(node, batch, context)
    name = f"decode{' mixed' * mixed} B={batch} S={context}{_heads(heads, kv_heads, head_dim)}"
    return Named(name, held_out, lambda target: KernelTunable.of(template, node, sizes, target))


def _prefill(
    context: int,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    *,
    held_out: bool = False,
) -> Named:
    """Prefill attention of one sequence of ``context`` tokens, all of them new."""
    template, node = template_named("paged_attention"), attention_node(heads, kv_heads, head_dim)
    sizes = prefill_sizes(node, context)
    name = f"prefill S={context}{_heads(heads, kv_heads, head_dim)}"
    return Named(name, held_out, lambda target: KernelTunable.of(template, node, sizes, target))


def _rows(tokens: int, hidden: int, *, held_out: bool = False) -> Named:
    """A residual sum and its norm, as the passes make one kernel of them."""
    x, y = (input_node(name, TensorType(DType.BF16, (T, hidden))) for name in "xy")
    weight = input_node("weight", TensorType(DType.BF16, (hidden,)))
    total = make("add", x, y)
    normed = make("rms_norm", total, weight, eps=1e-5)
    return _walk("rows", fuse(Graph("rows", (x, y, weight), (total, normed))), tokens, held_out)


def _gated(tokens: int, width: int, *, held_out: bool = False) -> Named:
    """SwiGLU behind a product of twice ``width`` columns, as the passes make a kernel of it."""
    x = input_node("x", TensorType(DType.BF16, (T, 2 * width)))
    halves = (make("slice", x, dim=1, start=s, step=1, stop=s + width) for s in (0, width))
    gated = make("gated", *halves, activation="silu")
    return _walk("elementwise", fuse(Graph("gated", (x,), (gated,))), tokens, held_out)


def _walk(name: str, graph: Graph, tokens: int, held_out: bool) -> Named:
    (node,) = (node for node in graph.nodes if node.op == "fused")
    template, sizes, width = template_named(name), {str(T): tokens}, graph.outputs[0].shape[-1]
    return Named(
        f"{graph.name} T={tokens} N={width}",
        held_out,
        lambda target: KernelTunable.of(template, node, sizes, target),
    )


def _heads(heads: int, kv_heads: int, head_dim: int) -> str:
    usual = (heads, kv_heads, head_dim) == (32, 8, 128)
    return "" if usual else f" H={heads}/{kv_heads} D={head_dim}"


PROBLEMS = (
    _linear("down", 1),
    _linear("qkv_70b_8", 16),
    _linear("qkv_70b_8", 64, held_out=True),
    _linear("qkv_70b_8", 128),
    _linear("qkv_1b", 16, held_out=True),
    _linear("down_1b", 32, held_out=True),
    _linear("down_1b", 128),
    _linear("gate_up", 64),
    _decode(32, 1024, 8, 1, held_out=True),
    _prefill(2048),
    _rows(2048, 4096),
    _gated(2048, 14336),
)

EARLIER_PROBLEMS = (
    _linear("qkv", 1),
    _linear("gate_up_1b", 1),
    _linear("qkv", 16),
    _linear("o", 32),
    _linear("down", 128),
    _linear("gate_up_1b", 16),
    _decode(1, 8192),
    _decode(32, 1024),
    _decode(8, 1024),
)
"""Measured before those, and fitted to only."""
