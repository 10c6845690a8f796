"""What a decoder over a cache of codes must agree with: the one before over the keys and values
that codes stand for.

They are rounded by elementary ops of the IR, so that the check does not rest on the ops that it
checks.
"""

from __future__ import annotations

from ..ir.build import cast, const, make, rebuild
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..ir.node import Node
from .quantize_check import rounded_rows


def over_codes(codes: DType, tries: int | None, before: Graph, after: Graph) -> Graph:
    """``before`` with the keys and values of each attention as codes have them, which it takes in
    float32; ``tries`` as ``quantize_rows`` has them.
    """
    values: dict[Node, Node] = {}
    for node in before.nodes:
        values[node] = rebuild(node, values)
        if node.op == "attention":
            q, k, v, *rest = values[node].args
            assert q is not None and k is not None and v is not None
            keys, vals = (_rounded(x, codes, tries) for x in (k, v))
            found = make("attention", cast(q, keys.dtype), keys, vals, *rest, **dict(node.attrs))
            values[node] = cast(found, node.dtype)
    return before.with_outputs(tuple(values[output] for output in before.outputs))


def _rounded(x: Node, codes: DType, tries: int | None) -> Node:
    if tries is None:
        return rounded_rows(x, codes, 0, None)
    wide = cast(x, DType.F32) if x.dtype is not DType.F64 else x
    return _nearest(wide, tries)


def _nearest(x: Node, tries: int) -> Node:
    """x as its codes in e4m3 have it, with the scale of the least error: the first of those that
    are ``2 ** (j / tries)`` of the least that a row can have.
    """
    width, last = x.shape[-1], x.type.rank - 1
    assert isinstance(width, int)
    unit = 2.0**21
    while width > 2.0**21 / unit:
        unit /= 2

    def number(value: float) -> Node:
        return const(value, x.dtype)

    most = make("amax", make("abs", x), dims=(last,), keepdim=True)
    least = make("div", most, number(448.0))
    least = make("where", make("eq", least, number(0.0)), number(1.0), least)
    steps = make("minimum", make("div", x, least), number(448.0))
    steps = make("maximum", steps, number(-448.0))
    best: tuple[Node, Node] | None = None
    for j in range(tries):
        factor, inverse = (int(2 ** (e / tries) * 2**16 + 0.5) / 2**16 for e in (j, -j))
        tried = cast(cast(make("mul", steps, number(inverse)), DType.F8E4M3), x.dtype)
        tried = make("mul", tried, number(factor))
        off = make("sub", steps, tried)
        square = make("mul", make("mul", off, off), number(unit))
        error = make("sum", cast(square, DType.I64), dims=(last,), keepdim=True)
        if best is not None:
            nearer = make("lt", error, best[0])
            error, tried = (
                make("where", nearer, a, b) for a, b in zip((error, tried), best, strict=True)
            )
        best = error, tried
    assert best is not None
    return make("mul", best[1], least)
