"""Sampling added to a decoder: goldens, numbers by the driver, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ragged_oracle import DECODER
from rewriting import parse
from tilewright.errors import GraphError, UnsupportedError
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.verifier import verify
from tilewright.passes.driver import run_passes
from tilewright.passes.kv_cache import PAGED_CACHE
from tilewright.passes.sample_tokens import SAMPLE_TOKENS

BEFORE = """
def decoder(x: f32[R, 8], state: f32[N]):
    head: f32[16, 8] = param("head")
    logits: f32[R, 16] = linear(x, head)
    more: f32[N] = add(state, state)
    return {"logits": logits, "state": more}
"""
AFTER = """
def decoder(x: f32[R, 8], state: f32[N], temperature: f32[R], top_k: i32[R], top_p: f32[R],
            min_p: f32[R], uniform: f32[R]):
    head: f32[16, 8] = param("head")
    logits: f32[R, 16] = linear(x, head)
    more: f32[N] = add(state, state)
    tokens: i64[R] = sample(logits, temperature, top_k, top_p, min_p, uniform)
    return {"logits": logits, "state": more, "tokens": tokens}
"""


@pytest.mark.quick
def test_golden() -> None:
    assert verify(SAMPLE_TOKENS.run(parse(BEFORE))) == parse_graph(AFTER)


def test_the_driver_checks_it_with_greedy_and_random_rows() -> None:
    graph = parse(DECODER)
    ids = torch.randint(16, (1, 21))
    after, records = run_passes(graph, (PAGED_CACHE, SAMPLE_TOKENS), level="full", samples=[ids])
    assert records[-1].max_error == 0.0
    assert after.output_names == ("logits", "k_cache_0", "v_cache_0", "tokens")


def test_adapted_rows_are_drawn_from_the_logits_they_have() -> None:
    before = parse(BEFORE)
    after = SAMPLE_TOKENS.run(before)
    assert SAMPLE_TOKENS.adapt_inputs is not None and SAMPLE_TOKENS.adapt_outputs is not None
    inputs = SAMPLE_TOKENS.adapt_inputs(before, after, [torch.randn(40, 8), torch.randn(3)])
    temperature, top_k, top_p, min_p, uniform = inputs[2:]
    for value, rare in ((temperature, 0.0), (top_k, 5), (top_p, 0.75), (min_p, 0.0625)):
        assert 0 < int((value == rare).sum()) < 40
    assert bool((uniform < 1).all()) and uniform.unique().numel() == 40
    found = interpret(after, inputs)
    logits, tokens = found[0], found[-1]
    greedy = temperature == 0
    assert torch.equal(tokens[greedy], logits.argmax(-1)[greedy])
    assert not torch.equal(tokens, logits.argmax(-1))
    kept = SAMPLE_TOKENS.adapt_outputs(after, inputs, found)
    assert len(kept) == 2 and torch.equal(kept[0], interpret(before, inputs[:2])[0])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('def g(x: f32[R, 8]):\n    return {"y": x}', "None"),
        ('def g(x: f32[1, R, 8]):\n    return {"logits": x}', r"f32\[1, R, 8\]"),
        ('def g(x: i64[R, 8]):\n    return {"logits": x}', r"i64\[R, 8\]"),
        ('def g(x: f32[R, 8], top_p: f32[R]):\n    return {"logits": x}', "top_p"),
        ('def g(x: f32[R, 8], y: f32[R]):\n    return {"logits": x, "tokens": y}', "tokens"),
    ],
)
def test_what_it_refuses(text: str, found: str) -> None:
    with pytest.raises(UnsupportedError, match=found):
        SAMPLE_TOKENS.run(parse(text))


def test_storage_types_are_refused_by_the_op() -> None:
    with pytest.raises(GraphError, match="of floats"):
        SAMPLE_TOKENS.run(parse_graph('def g(x: f8e4m3[R, 8]):\n    return {"logits": x}'))
