"""Weight expressions: inference agrees with loading, text parses back, bad text is refused."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.errors import CheckpointError, GraphError
from tilewright.formats import (
    FOLDABLE,
    Held,
    Random,
    Stored,
    Weight,
    apply_weight,
    parse_weight,
    weight_leaves,
)
from tilewright.formats.random import RandomCheckpoint

pytestmark = pytest.mark.quick

NAMES = st.text(min_size=1, max_size=12)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
NUMBERS = st.floats(allow_nan=False) | st.integers(-9, 9)


@st.composite
def leaves(draw: st.DrawFn) -> Weight:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dtype, seed = draw(DTYPES), draw(st.integers(0, 2**63 - 1))
    if draw(st.booleans()):
        return Random(seed, shape, dtype, draw(st.floats(0, 2)))
    return Held(
        torch.randn(shape, generator=torch.manual_seed(seed % 2**32)).to(dtype), draw(NAMES)
    )


def _permuted(draw: st.DrawFn, x: Weight) -> Weight:
    dims = tuple(draw(st.permutations(range(len(x.shape)))))
    return apply_weight("permute", (x,), dims=dims)


def _sliced(draw: st.DrawFn, x: Weight) -> Weight:
    dim = draw(st.integers(-len(x.shape), len(x.shape) - 1))
    start = draw(st.integers(0, x.shape[dim]))
    stop = draw(st.integers(start, x.shape[dim]))
    return apply_weight("slice", (x,), dim=dim, start=start, stop=stop)


def _padded(draw: st.DrawFn, x: Weight) -> Weight:
    dim = draw(st.integers(0, len(x.shape) - 1))
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return apply_weight("pad", (x,), dim=dim, before=before, after=after)


def _flattened(draw: st.DrawFn, x: Weight) -> Weight:
    return apply_weight("reshape", (x,), shape=(torch.Size(x.shape).numel(), 1))


def _expanded(draw: st.DrawFn, x: Weight) -> Weight:
    return apply_weight("expand", (x,), shape=(draw(st.integers(1, 3)), *x.shape))


def _doubled(draw: st.DrawFn, x: Weight) -> Weight:
    dim = draw(st.integers(-len(x.shape), len(x.shape) - 1))
    return apply_weight("concat", (x, apply_weight("neg", (x,)), x), dim=dim)


def _cast(draw: st.DrawFn, x: Weight) -> Weight:
    return apply_weight("cast", (x,), dtype=draw(DTYPES))


def _arithmetic(draw: st.DrawFn, x: Weight) -> Weight:
    other = draw(NUMBERS | st.just(x))
    args = (x, other) if draw(st.booleans()) else (other, x)
    return apply_weight(draw(st.sampled_from(["add", "sub", "mul", "div"])), args)


def _unary(draw: st.DrawFn, x: Weight) -> Weight:
    return apply_weight(draw(st.sampled_from(["exp", "sqrt", "rsqrt", "sin", "cos"])), (x,))


STEPS = [_permuted, _sliced, _padded, _flattened, _expanded, _doubled, _cast, _arithmetic, _unary]


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    weight = draw(leaves())
    for step in draw(st.lists(st.sampled_from(STEPS), max_size=3)):
        weight = step(draw, weight)
    return weight


@given(weights())
def test_loading_gives_the_inferred_shape_and_dtype(weight: Weight):
    tensor = weight.load()
    assert (tuple(tensor.shape), tensor.dtype) == (weight.shape, weight.dtype)
    assert tensor.is_contiguous()


@given(weights())
def test_text_parses_back(weight: Weight):
    held = {leaf.name: leaf for leaf in weight_leaves(weight) if isinstance(leaf, Held)}
    parsed = parse_weight(str(weight), held.__getitem__)
    assert parsed == weight
    assert hash(parsed) == hash(weight)
    assert str(parsed) == str(weight)


def test_operations_match_torch():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    x, y = Held(a, "a"), Held(b, "b")
    cases = [
        (apply_weight("concat", (x, y), dim=-1), torch.cat([a, b], -1)),
        (apply_weight("permute", (x,), dims=(1, 0)), a.T),
        (apply_weight("pad", (x,), dim=0, before=1, after=2), torch.cat([a[:0], a])),
        (apply_weight("slice", (x,), dim=1, start=1, stop=3), a[:, 1:3]),
        (apply_weight("sub", (1.0, apply_weight("mul", (x, y)))), 1.0 - a * b),
        (apply_weight("cast", (x,), dtype=torch.bfloat16), a.bfloat16()),
        (apply_weight("rsqrt", (apply_weight("exp", (x,)),)), torch.rsqrt(torch.exp(a))),
        (apply_weight("expand", (x,), shape=(2, 3, 4)), torch.stack([a, a])),
    ]
    for weight, expected in cases:
        if weight.op == "pad":
            expected = torch.cat([torch.zeros(1, 4), a, torch.zeros(2, 4)])
        assert torch.equal(weight.load(), expected), weight


def test_promotion_matches_torch():
    half, full = Held(torch.ones(2, dtype=torch.bfloat16), "h"), Held(torch.ones(2), "f")
    whole = Held(torch.ones(2, dtype=torch.int64), "i")
    assert apply_weight("add", (half, 2.5)).dtype == torch.bfloat16
    assert apply_weight("add", (half, full)).dtype == torch.float32
    assert apply_weight("div", (whole, 2)).dtype == torch.float32
    assert apply_weight("mul", (whole, 2)).dtype == torch.int64


def test_equality_is_by_structure_and_held_by_identity():
    tensor = torch.ones(2)
    x, same, other = Held(tensor, "x"), Held(tensor, "x"), Held(torch.ones(2), "x")
    assert apply_weight("neg", (x,)) == apply_weight("neg", (same,))
    assert apply_weight("neg", (x,)) != apply_weight("neg", (other,))
    assert x != Held(tensor, "y")
    assert apply_weight("slice", (x,), dim=-1, start=0, stop=1) == apply_weight(
        "slice", (x,), dim=0, start=0, stop=1
    )


def test_stored_reads_its_checkpoint():
    checkpoint = RandomCheckpoint({"a.b": ((2, 3), torch.bfloat16)}, seed=5)
    weight = Stored(checkpoint, "a.b")
    assert (weight.shape, weight.dtype, str(weight)) == ((2, 3), torch.bfloat16, 'stored("a.b")')
    assert torch.equal(weight.load(), checkpoint.tensor("a.b").load())
    assert parse_weight(str(weight), lambda name: Stored(checkpoint, name)) == weight
    with pytest.raises(CheckpointError, match=r"such as a\.b"):
        Stored(checkpoint, "a.c")


def test_random_is_the_same_in_another_process():
    code = (
        "from tilewright.formats import Random;"
        "print(Random(7, (5,), std=1.0).load().double().sum().item().hex())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == Random(7, (5,), std=1.0).load().double().sum().item().hex()
    sample = Random(3, (20000,), std=0.5).load()
    assert sample.std().item() == pytest.approx(0.5, rel=0.03)
    assert abs(sample.mean().item()) < 0.02


def test_random_checkpoint_does_not_depend_on_its_neighbours():
    one = RandomCheckpoint({"a": ((4,), torch.float32)}, seed=1)
    two = RandomCheckpoint({"b": ((4,), torch.float32), "a": ((4,), torch.float32)}, seed=1)
    assert torch.equal(one.tensor("a").load(), two.tensor("a").load())
    assert not torch.equal(two.tensor("a").load(), two.tensor("b").load())
    assert (one.files(), two.names()) == ((), ("b", "a"))


def test_foldable_names_are_the_table():
    assert {"concat", "cast", "permute", "reshape", "slice", "expand", "pad"} <= FOLDABLE
    assert {"add", "sub", "mul", "div", "neg", "exp", "rsqrt"} <= FOLDABLE


X = Held(torch.ones(2, 3), "x")


@pytest.mark.parametrize(
    ("op", "args", "attrs"),
    [
        ("matmul", (X, X), {}),
        ("concat", (X,), {}),
        ("concat", (X, Held(torch.ones(2, 4), "y")), {"dim": 0}),
        ("concat", (X, 1.0), {"dim": 0}),
        ("slice", (X,), {"dim": 0, "start": 0, "stop": 3}),
        ("slice", (X,), {"dim": 2, "start": 0, "stop": 1}),
        ("reshape", (X,), {"shape": (-1,)}),
        ("reshape", (X,), {"shape": (5,)}),
        ("permute", (X,), {"dims": (0, 0)}),
        ("cast", (X,), {"dtype": torch.complex64}),
        ("add", (1.0, 2.0), {}),
        ("add", (X, float("nan")), {}),
        ("add", (X, True), {}),
        ("add", (X,), {}),
        ("pad", (X,), {"dim": 0, "before": -1, "after": 0}),
        ("neg", (X,), {"dim": 0}),
    ],
)
def test_wrong_applications_are_refused(op: str, args: tuple[object, ...], attrs: dict):
    with pytest.raises(GraphError, match=op):
        apply_weight(op, args, **attrs)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1",
        "stored(1)",
        'stored("a", "b")',
        "stored('a'.upper())",
        "__import__('os')",
        'neg(stored("x"), *[])',
        'neg(**{"x": 1})',
        'mul(stored("x"), True)',
        'mul(stored("x"), nan)',
        'mul(stored("x"), b"1")',
        'mul(stored("x"), [1])',
        'cast(stored("x"), dtype="complex64")',
        'cast(stored("x"), dtype=float)',
        'concat(stored("x"), dim=0.0)',
        'concat(stored("x"), dim=0, dim=0)',
        'unknown(stored("x"))',
        'random(0, (2,), "int8", 1.0)',
        'random(-1, (2,), "float32", 1.0)',
        'random(0, (2,), "float32")',
        'neg(stored("x")); 1',
        'neg(lambda: stored("x"))',
        "neg(" * 5000 + 'stored("x")' + ")" * 5000,
        'stored("\ud800")',
        "neg(stored(\x00))",
    ],
)
def test_text_outside_the_grammar_is_refused(text: str):
    with pytest.raises(GraphError):
        parse_weight(text, lambda name: X)


@given(st.text(alphabet="stored()neg,\"'x01=.*[]{}lambda:-", max_size=40))
def test_any_text_parses_or_is_a_graph_error(text: str):
    with contextlib.suppress(GraphError):
        assert isinstance(parse_weight(text, lambda name: X), Weight)
