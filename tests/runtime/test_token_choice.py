"""Tokens from logits that are given: by the call that a Program samples with, or by torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.program import Call, Program
from tilewright.ir.dims import symbol
from tilewright.ir.parser import parse_type_text
from tilewright.ir.schema import schema
from tilewright.runtime import SamplingParams
from tilewright.runtime.grammar import fill_masks
from tilewright.runtime.runner import ProgramRunner
from tilewright.runtime.step_buffer import SAMPLING
from tilewright.runtime.token_choice import TokenChooser, kind_of

VOCAB = 70
SAMPLES = Call("eager/sample", ("logits", *SAMPLING), ("next",))
TYPES = {"temperature": "f32", "top_k": "i32", "top_p": "f32", "min_p": "f32", "uniform": "f32"}
WAYS = [
    ("greedy", {}),
    ("random", {"temperature": 1.0}),
    ("cut", {"temperature": 1.0, "top_k": 2}),
    ("cut", {"temperature": 1.0, "top_p": 0.9}),
    ("cut", {"temperature": 1.0, "min_p": 0.01}),
]


def runner_of(*calls: Call, tokens: bool = True) -> ProgramRunner:
    """A Program of x f32[B, V] to logits, |x|, and tokens."""
    buffers = {"x": f"f32[B, {VOCAB}]", "logits": f"f32[B, {VOCAB}]", "next": "i64[B]"}
    buffers |= {name: f"{type_}[B]" for name, type_ in TYPES.items()}
    outputs = (("logits", "logits"), *([("tokens", "next")] if tokens else []))
    program = Program(
        "sampling",
        {name: parse_type_text(text) for name, text in buffers.items()},
        ("x", *SAMPLING),
        {},
        outputs,
        (Call("eager/abs", ("x",), ("logits",)), *calls),
    )
    return ProgramRunner(program, {}, None)


def fields_of(params: list[SamplingParams], uniform: list[float]) -> dict[str, torch.Tensor]:
    return {
        "temperature": torch.tensor([0.0 if p.is_greedy else p.temperature for p in params]),
        "top_k": torch.tensor([p.top_k for p in params], dtype=torch.int32),
        "top_p": torch.tensor([p.top_p for p in params]),
        "min_p": torch.tensor([p.min_p for p in params]),
        "uniform": torch.tensor(uniform),
    }


@given(
    ways=st.lists(st.sampled_from(WAYS), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_the_programs_call_and_torch_choose_as_the_op_does(ways, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(ways), VOCAB, generator=generator) * 3
    params = [SamplingParams(**{"temperature": 0.0, **given}) for _, given in ways]
    fields = fields_of(params, torch.rand(len(ways), generator=generator).tolist())
    expected = schema("sample").reference(logits, *(fields[name] for name in SAMPLING)).tolist()
    for runner in (runner_of(SAMPLES), runner_of(tokens=False)):
        assert TokenChooser(runner).choose(logits, fields, params).tolist() == expected


@pytest.mark.parametrize(
    "calls",
    [
        (replace(SAMPLES, guard=(symbol("B") - 2,)), replace(SAMPLES, guard=(1 - symbol("B"),))),
        (replace(SAMPLES, operands=("x", *SAMPLING)),),
        (replace(SAMPLES, operands=("logits", "x", *list(SAMPLING)[1:])),),
    ],
)
def test_a_call_that_takes_other_things_is_not_made_again(calls):
    assert TokenChooser(runner_of(*calls))._own is None
    assert TokenChooser(runner_of(SAMPLES))._own is not None


def test_logits_of_another_type_or_order_are_torchs(monkeypatch):
    chooser = TokenChooser(runner_of(SAMPLES))
    monkeypatch.setattr(chooser._own, "_kernel", None)  # not called
    params = [SamplingParams()] * 2
    logits = torch.randn(VOCAB, 2).t()
    assert chooser.choose(logits, {}, params).tolist() == logits.argmax(-1).tolist()
    half = logits.contiguous().half()
    assert chooser.choose(half, {}, params).tolist() == half.argmax(-1).tolist()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("kind", "given"), WAYS)
def test_rows_without_a_mask_keep_their_tokens(kind, given, own):
    each = [SamplingParams(), SamplingParams(**given), SamplingParams()]
    assert kind_of(each) == kind
    logits = torch.randn(4, VOCAB)
    logits[2, 3:] = torch.nan
    logits[1, [33, 35]] = torch.tensor([0.5, 0.7])
    tokens = torch.tensor([61, 62, 63, 64])
    mask = np.zeros(3, dtype=np.int32)
    mask[1] = 0b1010  # tokens 33 and 35
    greedy = SamplingParams()
    fields = fields_of([greedy, replace(greedy, **given), greedy, greedy], [0.0, 0.1, 0.0, 0.0])
    chooser = TokenChooser(runner_of(SAMPLES) if own else runner_of(tokens=False))

    def masked(*masks):
        words = np.zeros((len(tokens), 3), dtype=np.int32)
        fill_masks(masks, words)
        chooser.choose_masked(logits, tokens, torch.from_numpy(words), fields, each)

    masked(None, mask, mask)
    assert tokens[[0, 3]].tolist() == [61, 64]
    assert tokens[1] == (35 if kind == "greedy" else 33)
    assert tokens[2] == -1  # no number among what may come
    masked(mask, mask)
    assert tokens.tolist() == [33 if logits[0, 33] > logits[0, 35] else 35, tokens[1], -1, 64]
