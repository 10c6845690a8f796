"""Recognising norms, rope and gates in models in bfloat16 keeps every bit of their numbers."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from rewriting import parse
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.lowering.lower import lower
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.passes.canonicalize import canonicalize
from tilewright.passes.fold_buffers import FOLD_BUFFERS
from tilewright.passes.fold_weights import fold_weights
from tilewright.passes.recognize_gated import recognize_gated
from tilewright.passes.recognize_norm import recognize_norm
from tilewright.passes.recognize_rope import recognize_rope
from tiny_models import tiny_model

RECOGNISERS = {"rms_norm": recognize_norm, "rope": recognize_rope, "gated": recognize_gated}
IDS = torch.arange(3, 24)[None]


@cache
def captured(family: str, dtype: torch.dtype = torch.bfloat16) -> Graph:
    """The graph of a tiny model as the recognisers get it."""
    graph = lower(capture_causal_lm(tiny_model(family).to(dtype)), family)
    return fold_weights(FOLD_BUFFERS.run(canonicalize(graph)))


@cache
def recognised(family: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Graph, ...]:
    """The graphs after each of the recognisers."""
    graphs = [captured(family, dtype)]
    for recognise in RECOGNISERS.values():
        graphs.append(recognise(graphs[-1]))
    return tuple(graphs[1:])


def found(family: str, op: str, dtype: torch.dtype = torch.bfloat16) -> list[Node]:
    return [node for node in recognised(family, dtype)[-1].nodes if node.op == op]


# layers of the tiny models: 2, of gemma2 4
COUNTS = {
    "llama": {"rms_norm": 5, "rope": 4, "gated": 2},
    "qwen3": {"rms_norm": 9, "rope": 4, "gated": 2},
    "gemma2": {"rms_norm": 17, "rope": 8, "gated": 4},
}


@pytest.mark.parametrize("op", RECOGNISERS)
@pytest.mark.parametrize("family", COUNTS)
def test_what_rounds_at_each_step_is_stepwise(family: str, op: str) -> None:
    nodes = found(family, op)
    assert len(nodes) == COUNTS[family][op]
    # Gemma's norm multiplies by its weight in float32.
    wanted = None if family == "gemma2" and op == "rms_norm" else True
    assert {node.attr("stepwise") for node in nodes} == {wanted}
    assert all(node.dtype is DType.BF16 for node in nodes)


@pytest.mark.parametrize("family", COUNTS)
def test_the_numbers_keep_their_bits(family: str) -> None:
    (wanted,) = interpret(captured(family), [IDS])
    for name, graph in zip(RECOGNISERS, recognised(family), strict=True):
        assert torch.equal(interpret(graph, [IDS])[0], wanted), name


@pytest.mark.parametrize("family", COUNTS)
def test_one_token_has_hugging_faces_bits(family: str) -> None:
    """Of one token attention takes the value as it is; of more, it may sum in another order."""
    model = tiny_model(family).bfloat16()
    for token in range(5, 15):
        ids = torch.tensor([[token]])
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits
        assert torch.equal(interpret(recognised(family)[-1], [ids])[0], wanted)


def test_in_float32_nothing_is_stepwise() -> None:
    assert "stepwise" not in str(recognised("llama", torch.float32)[-1])
    assert {op: len(found("llama", op, torch.float32)) for op in RECOGNISERS} == COUNTS["llama"]


PARTS = """
def g(q: bf16[1, 2, S, 12], angle: bf16[1, S, 4]):
    lo: bf16[1, 2, S, 4] = slice(q, dim=3, start=0, stop=4)
    hi: bf16[1, 2, S, 4] = slice(q, dim=3, start=4, stop=8)
    rest: bf16[1, 2, S, 4] = slice(q, dim=3, start=8, stop=12)
    cos_0: bf16[1, S, 4] = cos(angle)
    sin_0: bf16[1, S, 4] = sin(angle)
    lc: bf16[1, 2, S, 4] = mul(lo, cos_0)
    hs: bf16[1, 2, S, 4] = mul(hi, sin_0)
    hc: bf16[1, 2, S, 4] = mul(hi, cos_0)
    ls: bf16[1, 2, S, 4] = mul(lo, sin_0)
    first: bf16[1, 2, S, 4] = sub(lc, hs)
    second: bf16[1, 2, S, 4] = add(hc, ls)
    turned: bf16[1, 2, S, 8] = concat(first, second, dim=3)
    y: bf16[1, 2, S, 12] = concat(turned, rest, dim=3)
    return {"y": y}
"""


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_partial_rope_by_parts(dtype: str) -> None:
    graph = parse(PARTS.replace("bf16", dtype))
    result = recognize_rope(canonicalize(graph))
    (rope,) = (node for node in result.nodes if node.op == "rope")
    assert rope.attr("stepwise") is (None if dtype == "f32" else True) and rope.shape[-1] == 12
    element = graph.inputs[0].dtype.torch
    inputs = [torch.randn(1, 2, 5, 12).to(element), torch.randn(1, 5, 4).to(element)]
    assert torch.equal(interpret(result, inputs)[0], interpret(graph, inputs)[0])


def test_a_norm_that_was_rounded_to_another_half_keeps_its_casts() -> None:
    """bfloat16 within float16: without the casts the steps would round elsewhere."""
    graph = parse("""
def g(x: f16[S, 8], w: bf16[8]):
    narrow: bf16[S, 8] = cast(x, dtype=bf16)
    n: bf16[S, 8] = rms_norm(narrow, w, eps=1e-06, stepwise=True)
    y: f16[S, 8] = cast(n, dtype=f16)
    return {"y": y}
""")
    assert recognize_norm(graph) == graph
