"""Each elementwise op of a generated kernel at the edges of its type, against torch."""

from __future__ import annotations

import math

import pytest
import torch

from tilewright.ir.build import input_node, make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from triton_bodies import call_of, emitted, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
INF, NAN = math.inf, math.nan
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -7.25, 0.3, -0.29, 1e-6, -1e-6]
SUBNORMAL = 1e-40
EDGES += [88.0, -88.0, 104.0, -90.0, 1e4, -1e4, 3e38, -3e38, SUBNORMAL, INF, -INF, NAN, 16.75]
INTS = [0, 1, -1, 2, -2, 7, -7, 63, 100, -128, 127]
FLOATS = [DType.F32, DType.BF16, DType.F16, DType.F64]
UNARY = "neg abs exp log log1p sqrt rsqrt reciprocal sin cos tanh sigmoid erf relu silu floor ceil"
UNARY += " round sign isnan"
BINARY = "add sub mul div pow maximum minimum floordiv remainder eq ne lt le gt ge"
WHOLE_UNARY = "neg abs relu floor ceil round sign"
WHOLE_BINARY = "add sub mul pow maximum minimum floordiv remainder eq ne lt le gt ge"
# Units in the last place, of the type's own precision, that a result may be off.
ULPS = {DType.F64: 2e-13, DType.F32: 1e-6, DType.BF16: 2**-7.9, DType.F16: 2**-9.9}
TINY = {DType.F64: 2e-16, DType.F32: 1e-37, DType.BF16: 1e-37, DType.F16: 6e-8}


def results(node: Node, *values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel of a one-op body gives, and the op's reference (of floats, in float64)."""
    inputs = tuple(n for n in dict.fromkeys(node.operands) if n.op == "input")
    source = emitted(Graph("body", inputs, (node,)))
    assert source is not None
    (found,) = run(source, call_of(Graph("body", inputs, (node,))), list(values), {})
    exact = [v.double() if v.is_floating_point() else v for v in values]
    attrs = {} if node.op != "gelu" else dict(node.attrs)
    return found, schema(node.op).reference(*exact, **attrs).to(node.dtype.torch)


def inputs(dtype: DType, *counts: int) -> list[Node]:
    return [input_node("abc"[i], TensorType(dtype, (n,))) for i, n in enumerate(counts)]


def edges(dtype: DType) -> torch.Tensor:
    # The interpreter takes subnormal bfloat16 for 0.
    usual = [x for x in EDGES if x != SUBNORMAL or dtype is not DType.BF16]
    return torch.tensor(usual, dtype=torch.float64).to(dtype.torch)


def pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every value against every value."""
    return values.repeat_interleave(len(values)), values.repeat(len(values))


def assert_near(found: torch.Tensor, wanted: torch.Tensor, dtype: DType) -> None:
    if not dtype.is_float or wanted.dtype is torch.bool:
        assert torch.equal(found, wanted)
        return
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=ULPS[dtype], atol=TINY[dtype], equal_nan=True
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", UNARY.split())
def test_a_unary_op_of_floats_at_its_edges(op, dtype):
    x = edges(dtype)
    found, wanted = results(make(op, *inputs(dtype, len(x))), x)
    assert_near(found, wanted, dtype)
    if op not in ("isnan", "sign", "relu", "abs"):
        zero = (wanted == 0) & (found == 0)
        assert torch.equal(torch.signbit(found[zero]), torch.signbit(wanted[zero]))


@pytest.mark.parametrize("op", ["sin", "cos"])
def test_sine_and_cosine_of_any_size(op):
    bits = torch.randint(0, 0x7F800000, (40_000,), dtype=torch.int32)
    angles = torch.linspace(-700.0, 700.0, 20_000)
    near = torch.arange(1, 20_001) * (math.pi / 2)  # where one of the two is almost 0
    x = torch.cat([bits.view(torch.float32), -bits.view(torch.float32), angles, near])
    found, wanted = results(make(op, *inputs(DType.F32, len(x))), x)
    torch.testing.assert_close(found, wanted, rtol=3e-7, atol=1e-38)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gelu_at_its_edges(approximate, dtype):
    x = edges(dtype)
    found, wanted = results(make("gelu", *inputs(dtype, len(x)), approximate=approximate), x)
    # 1 + erf and 1 + tanh cancel for negative x; torch has NaN at an infinity, or not, by version.
    finite = x.isfinite()
    torch.testing.assert_close(
        found[finite].double(), wanted[finite].double(), rtol=ULPS[dtype], atol=2e-6
    )
    assert found[x.isnan()].isnan().all() and (found[x == INF] == INF).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", BINARY.split())
def test_a_binary_op_of_floats_at_its_edges(op, dtype):
    a, b = pairs(edges(dtype))
    node = make(op, *inputs(dtype, len(a), len(a)))
    if dtype is DType.F64 and op in ("floordiv", "remainder"):
        assert emitted(Graph("body", node.operands, (node,))) is None
        return
    found, wanted = results(node, a, b)
    if op == "remainder":  # torch loses it where the quotient is large
        wanted = torch.tensor(
            [python_remainder(*p) for p in zip(a.tolist(), b.tolist(), strict=True)]
        )
        wanted = wanted.to(a.dtype)
    if op == "floordiv":  # of float32 as torch has it: in bfloat16 it rounds on the way
        wanted = torch.floor_divide(a.float(), b.float()).to(a.dtype)
    assert_near(found, wanted, dtype)


def python_remainder(a: float, b: float) -> float:
    if b == 0 or math.isinf(a) or a != a or b != b:
        return NAN
    rest = math.fmod(a, b)
    return rest + b if rest and (rest < 0) != (b < 0) else rest


@pytest.mark.parametrize("dtype", [DType.I64, DType.I32, DType.I16, DType.I8, DType.U8], ids=str)
@pytest.mark.parametrize("op", [*WHOLE_UNARY.split(), *WHOLE_BINARY.split()])
def test_an_op_of_integers(op, dtype):
    unary = op in WHOLE_UNARY.split()
    whole = torch.tensor(INTS)
    a, b = pairs((whole.abs() if dtype is DType.U8 else whole).to(dtype.torch))
    if op in ("floordiv", "remainder"):
        a, b = a[b != 0], b[b != 0]
    node = make(op, *inputs(dtype, *([len(a)] if unary else [len(a)] * 2)))
    assert_near(*results(node, *([a] if unary else [a, b])), dtype)
