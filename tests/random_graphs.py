"""A hypothesis strategy for random well-formed graphs over a handful of ops."""

from __future__ import annotations

from hypothesis import strategies as st

from tilewright.ir.build import cast, const, input_node, item, make, param, permute
from tilewright.ir.dims import is_name, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType

NAMES = st.from_regex(r"\A[a-z][a-z0-9_]{0,5}\Z").filter(lambda n: is_name(n) and n != "param")
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
T, S = symbol("T"), symbol("S")


@st.composite
def graphs(draw: st.DrawFn, depth: int = 2) -> Graph:
    """A graph over x f32[T, S, 4] and y f32[S, 4], a param, and whatever comes of them."""
    names = draw(st.lists(NAMES, min_size=2, max_size=2, unique=True))
    shapes = [(T, S, 4), (S, 4)]
    inputs = [input_node(n, TensorType(DType.F32, s)) for n, s in zip(names, shapes, strict=True)]
    values = list(inputs)
    if depth == 2:
        values.append(param(draw(st.text(max_size=8)), TensorType(DType.F32, (4,))))
    for _ in range(draw(st.integers(0, 8))):
        values.append(draw(_nodes(values, depth)))
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    keys = draw(st.lists(st.text(max_size=6), min_size=3, max_size=3, unique=True))
    used = [k if k not in names else f"{k} out" for k in keys][: len(outputs)]
    return Graph(draw(NAMES), tuple(inputs), tuple(outputs), {}, tuple(used))


@st.composite
def _nodes(draw: st.DrawFn, values: list[Node], depth: int) -> Node:
    x = draw(st.sampled_from([v for v in values if v.dtype is DType.F32]))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return make("add", x, const(draw(FLOATS), DType.F32))
    if kind == 1:
        same = [v for v in values if v.type == x.type]
        return make(
            draw(st.sampled_from(["mul", "sub", "maximum", "lt"])), x, draw(st.sampled_from(same))
        )
    if kind == 2 and x.type.rank:
        return permute(x, *draw(st.permutations(range(x.type.rank))))
    if kind == 3 and x.type.rank:
        dims = draw(st.sets(st.integers(0, x.type.rank - 1)))
        return make("sum", x, dims=tuple(sorted(dims)), keepdim=draw(st.booleans()))
    if kind == 4:
        return cast(cast(x, draw(st.sampled_from([DType.BF16, DType.I64]))), DType.F32)
    if kind == 5 and x.type.rank and x.shape[-1] == 4:
        return item(make("topk", x, k=2, dim=x.type.rank - 1), draw(st.integers(0, 1)))
    if kind == 6:
        return make("reshape", x, shape=(x.type.numel,))
    if kind == 7:
        return make("iota", size=draw(st.sampled_from([T * 2 + 1, S // 2, T % 3])), dtype=DType.F32)
    if kind == 8 and depth:
        return _fused(draw(graphs(depth=depth - 1)), values, draw(st.text(max_size=5)))
    return make("exp", x)


def _fused(body: Graph, values: list[Node], kind: str) -> Node:
    # One body a name: its name tells what it holds.
    named = Graph(f"body_{abs(hash(body))}", body.inputs, body.outputs, {}, body.output_names)
    node = make("fused", *values[:2], body=named, kind=kind)
    return node if len(body.outputs) == 1 else item(node, 0)
