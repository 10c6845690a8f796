"""Random bodies of ``fused`` nodes for tests of generated kernels, and where their operands lie."""

from __future__ import annotations

from hypothesis import strategies as st

from tilewright.ir.build import cast, const, input_node, make
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType

T = symbol("T")
FLOATS = [DType.F32, DType.BF16, DType.F16]
# What a body of a few ops may be off, in the type that its results have.
CLOSE = {DType.F64: 1e-10, DType.F32: 3e-5, DType.BF16: 3e-2, DType.F16: 4e-3}
WIDTHS = [1, 3, 8, 64, 100, 1000, 1500]


def spots(draw: st.DrawFn, type_: TensorType) -> dict[str, object]:
    """Where an operand lies: dense, in wider rows, with its axes in another order, in steps."""
    if not type_.rank:
        return {}
    order = draw(st.permutations(range(type_.rank))) if draw(st.integers(0, 3)) == 0 else ()
    pads = (draw(st.integers(0, 9)), draw(st.integers(0, 9))) if draw(st.booleans()) else (0, 0)
    return {"order": order, "pads": pads, "step": draw(st.sampled_from([1, 1, 1, 2]))}


@st.composite
def leads(draw: st.DrawFn) -> tuple[Size, ...]:
    """Leading axes: none, tokens, tokens and heads, fixed ones."""
    return draw(st.sampled_from([(), (T,), (T, 3), (2, T), (7,), (2, 1, 5), (T, 1), (1, T, 2)]))


@st.composite
def shapes_within(draw: st.DrawFn, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """A shape that broadcasts to another one."""
    kept = tuple(size if draw(st.integers(0, 2)) else 1 for size in shape)
    return kept[draw(st.integers(0, len(kept))) :] if draw(st.booleans()) else kept


@st.composite
def bodies(draw: st.DrawFn, reduces: bool, steady: bool = False) -> Graph:
    """A body over one space: broadcast operands, a few ops, perhaps a row op among them. A small
    error of a value of a ``steady`` one makes no step of a later value.
    """
    dtype = draw(st.sampled_from(FLOATS))
    shape = (*draw(leads()), draw(st.sampled_from(WIDTHS)))
    x = input_node("x", TensorType(dtype, shape))
    others = [
        input_node(f"y{i}", TensorType(dtype, draw(shapes_within(shape))))
        for i in range(draw(st.integers(0, 2)))
    ]
    values = [make("mul", x, const(0.75, dtype))]
    for _ in range(draw(st.integers(1, 5))):
        values.append(draw(_nodes(values, others, steady)))
    if reduces:
        values.append(draw(_rows(values[-1])))
        values.append(make("add", values[-1], draw(st.sampled_from(values[:-1]))))
    members = list(dict.fromkeys(v for v in values if v.op != "input"))
    outputs = tuple(dict.fromkeys([members[-1], draw(st.sampled_from(members))]))
    probe = Graph("body", (x, *others), outputs)
    used = {node for node in probe.nodes if node.op == "input" and (node is x or probe.users[node])}
    return Graph("body", tuple(n for n in (x, *others) if n in used), outputs)


@st.composite
def _nodes(draw: st.DrawFn, values: list[Node], others: list[Node], steady: bool) -> Node:
    a = draw(st.sampled_from(values))
    b = draw(st.sampled_from([*values, *others]))
    op = draw(st.sampled_from(["add", "sub", "mul", "maximum", "where", "cast", "unary", "gated"]))
    if op == "unary":
        return make(draw(st.sampled_from(["silu", "tanh", "abs", "sigmoid", "gelu", "neg"])), a)
    if op == "where":
        low, high = (values[0], const(0.25, a.dtype)) if steady else (a, b)
        return make("where", make("lt", low, high), a, const(-1.5, a.dtype))
    if op == "cast":
        types = [DType.F32] if steady else [DType.I32, DType.F32]
        return cast(cast(a, draw(st.sampled_from(types))), a.dtype)
    if op == "gated":
        return make("gated", a, a, activation=draw(st.sampled_from(["silu", "gelu_tanh", "relu"])))
    return make(op, a, b)


@st.composite
def _rows(draw: st.DrawFn, x: Node) -> Node:
    last = x.type.rank - 1
    op = draw(st.sampled_from(["rms_norm", "layer_norm", "softmax", "sum", "mean", "amax", "amin"]))
    if op in ("rms_norm", "layer_norm"):
        return make(op, x, eps=1e-3)
    return make(op, x, dim=last) if op == "softmax" else make(op, x, dims=(last,), keepdim=True)
