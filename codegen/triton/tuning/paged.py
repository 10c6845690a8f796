"""What the templates of attention over pages have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ....ir.dtypes import DType
from ....ir.node import Node
from ..kernels.paged_attention_tiles import Problem
from ..kernels.scaled_tiles import scales_of
from .template import Facts


def head_facts(problem: Problem, *further: str) -> Facts:
    """What attention over pages is asked for, whoever has how many tokens: the element type, what
    is added to scores and ``further`` words, the window, heads and their dims.
    """
    node = problem.node
    words = ["sinks" if node.args[6] else "", "alibi" if node.args[7] else ""]
    words += ["softcap" if problem.softcap is not None else "", *further]
    words.append("first" if problem.num_sinks else "")
    return (
        ("dtype", str(node.dtype)),
        ("with", " ".join(filter(None, words))),
        ("window", problem.window or 0),
        ("heads", problem.heads),
        ("kv_heads", problem.kv_heads),
        ("head_dim", problem.head_dim),
        ("value_dim", problem.value_dim),
    )


def scaled_facts(node: Node) -> Facts:
    """What more attention over codes is asked for: their type. Nothing over numbers."""
    scaled = node.op == "scaled_paged_attention"
    return (("cache", str(node.operands[1].dtype)),) if scaled else ()


def key_bytes(problem: Problem) -> int:
    """Bytes of a key and its value in one KV head, scales counted."""
    node = problem.node
    scales = 2 * DType.F32.bytes if node.op == "scaled_paged_attention" else 0
    return (problem.head_dim + problem.value_dim) * node.operands[1].dtype.bytes + scales


def cached(node: Node, generator: torch.Generator) -> dict[Node, Callable[..., torch.Tensor]]:
    """Contents of caches of codes: all codes alike, scales that leave numbers of about 1. Nothing
    of caches of numbers.
    """
    if node.op != "scaled_paged_attention":
        return {}
    device = generator.device
    largest = 127.0 if node.operands[1].dtype is DType.I8 else 448.0

    def uniform(shape: Sequence[int]) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    codes, scales = node.operands[1:3], scales_of(node)
    made: dict[Node, Callable[..., torch.Tensor]] = {
        cache: lambda shape: (2 * uniform(shape) - 1) * largest for cache in codes
    }
    return made | {cache: lambda shape: (uniform(shape) + 1) / largest for cache in scales}
