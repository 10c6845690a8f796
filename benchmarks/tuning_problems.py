"""The problems that the tuner is judged on: decode linears of the 8B and the 1B shape, and paged
decode attention. Four of them are never used to fit the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench_linear import SHAPES
from bench_linear import node_of as linear_node
from bench_paged_decode import decode_node

from tilewright.codegen.triton.tuning.decode import sizes_of
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.targets import Target


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


def _decode(batch: int, context: int, held_out: bool = False) -> Named:
    template, node = template_named("paged_decode"), decode_node(16)
    sizes = sizes_of(node, batch, context)
    name = f"decode B={batch} S={context}"
    return Named(name, held_out, lambda target: KernelTunable.of(template, node, sizes, target))


PROBLEMS = (
    _linear("qkv", 1),
    _linear("down", 1, held_out=True),
    _linear("gate_up_1b", 1),
    _linear("qkv", 16),
    _linear("o", 32, held_out=True),
    _linear("gate_up", 64),
    _linear("down", 128),
    _linear("gate_up_1b", 16, held_out=True),
    _linear("down_1b", 32),
    _decode(1, 8192),
    _decode(32, 1024, held_out=True),
    _decode(8, 1024),
)
