"""Attention of one new prompt by a library: which calls take it, when, and that it is the op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewright as tw
from tilewright.codegen.program import Call, Program
from tilewright.codegen.triton import fresh
from tilewright.codegen.triton.fresh import FEWEST, Fresh, fresh_attention
from tilewright.ir.build import input_node, item, make
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS
from tiny_models import tiny_model

H100 = TARGETS["h100"]
T, B, M, N, P = map(symbol, "TBMNP")
SLOTS = input_node("slots", TensorType(DType.I64, (T,)))


def attention(
    dtype: DType = DType.BF16, written: bool = True, sinks: bool = False, **attrs: object
) -> Node:
    def tensor(name: str, *shape: Size, of: DType = dtype) -> Node:
        return input_node(name, TensorType(of, shape))

    q, k, v = (tensor(name, T, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2)))
    caches = [tensor(name, N, P, 2, 16) for name in ("kc", "vc")]
    appended = make("append_kv", k, v, *caches, SLOTS, None, None, None, None, None)
    after = [item(appended, 0) if written else caches[0], item(appended, 1)]
    sizes = {"tables": (B, M), "lens": (B,), "start": (B + 1,)}
    metadata = (tensor(name, *shape, of=DType.I32) for name, shape in sizes.items())
    added = tensor("sinks", 4) if sinks else None
    return make("paged_attention", q, *after, *metadata, added, None, scale=0.25, **attrs)


def test_a_prompt_is_the_librarys_from_its_fewest_tokens_on() -> None:
    share = Fresh.of(attention(), H100)
    assert share is not None and share.operands[3] is SLOTS
    for tokens, new in ((FEWEST - 1, 1), (FEWEST, 1), (FEWEST, 0), (9000, 1), (9000, 0)):
        sizes = {"T": tokens, "fresh": new}
        library, kernel = (_holds(guard, sizes) for guard in (share.guard, share.otherwise))
        assert library == (new == 1 and tokens >= FEWEST)
        assert kernel != library  # exactly one of them is made


def _holds(guard, sizes) -> bool:
    call = Call("x/y", (), (), guard=guard)
    return call.runs_at(sizes)


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": DType.F32},
        {"written": False},  # keys that the step has not written
        {"sinks": True},
        {"softcap": 20.0},
        {"window": 100},
        {"causal": False},
    ],
)
def test_what_stays_ours(changed) -> None:
    assert Fresh.of(attention(**changed), H100) is None


def test_older_targets_and_other_ops_have_none() -> None:
    assert Fresh.of(attention(), TARGETS["a100"]) is None
    assert Fresh.of(attention().args[0], H100) is None


@given(st.integers(1, 40), st.sampled_from([1, 2, 4]), st.sampled_from([3, 16]))
def test_the_call_is_the_op(tokens, heads, page) -> None:
    generator = torch.Generator().manual_seed(tokens)
    pages = -(-tokens // page)
    caches = [
        torch.randn(pages + 2, page, 2, 8, generator=generator, dtype=torch.float64)
        for _ in range(2)
    ]
    q = torch.randn(tokens, 2 * heads, 8, generator=generator, dtype=torch.float64)
    tables = torch.randperm(pages + 2, generator=generator)[:pages][None]
    positions = torch.arange(tokens)
    slots = tables[0, positions // page] * page + positions % page
    lens = torch.tensor([tokens])
    starts = torch.tensor([0, tokens])
    wanted = schema("paged_attention").reference(
        q, *caches, tables.int(), lens.int(), starts.int(), None, None, scale=0.3
    )
    found = fresh_attention(q, *caches, slots, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


OPTIONS = {"target": "cpu", "max_model_len": 64, "verify": "off", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def engine():
    """One to which a prompt of 4 tokens is long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "FEWEST", 4)
        return tw.compile(tiny_model("llama"), backend="triton", **OPTIONS)


def test_an_engine_takes_it_for_a_new_prompt_alone(engine, monkeypatch) -> None:
    monkeypatch.setattr(engine.runner, "steps", list(engine.runner.steps))
    taken: list[int] = []
    for index, (call, kernel) in enumerate(engine.runner.steps):
        if call.kernel.endswith("fresh_attention"):
            engine.runner.steps[index] = (call, _noted(kernel, taken))
    params = tw.SamplingParams(max_new_tokens=3, ignore_eos=True)
    prompts = [[5, 6, 7, 8, 9], [1, 2, 3]]
    alone = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert taken and set(taken) == {5}  # neither the short prompt nor a token behind one
    count = len(taken)
    both = [one.token_ids for one in engine.generate(prompts, params)]
    assert len(taken) == count  # two prompts at once are ours
    eager = tw.compile(tiny_model("llama"), backend="eager", **OPTIONS)
    assert alone == both == [one.token_ids for one in eager.generate(prompts, params)]


def _noted(kernel, taken):
    def run(operands, sizes):
        taken.append(sizes["T"])
        return kernel(operands, sizes)

    return run


def test_nobody_says_so_and_the_kernel_computes_it(engine) -> None:
    program: Program = engine.image.program
    shares = [c for c in program.calls if c.origin == ("paged_attention",)]
    made = [
        c for c in program.at({"T": 9000, "B": 1, "R": 1}).calls if c.origin == ("paged_attention",)
    ]
    assert len(made) * 2 == len(shares)
    assert all(call.kernel.startswith("triton/template/paged_attention") for call in made)
    again = Program.from_json(program.to_json())
    assert [c.guard for c in again.calls] == [c.guard for c in program.calls]
    assert replace(shares[0], guard=()).runs_at({})
