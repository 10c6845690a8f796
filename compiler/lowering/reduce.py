"""Reductions and scans, with torch's result types."""

from __future__ import annotations

import math

from ...ir.build import cast, item, make, reshape
from ...ir.dims import Size, product
from ...ir.dtypes import DType
from ...ir.node import Node
from .base import Call, Rule, as_node, scalar


def reduce_dims(op: str, x: Node, dims: tuple[int, ...], keepdim: bool) -> Node:
    """A reduction; ``x`` itself where it is a scalar already."""
    if not dims:
        return x
    return make(op, x, dims=dims, **({"keepdim": True} if keepdim else {}))


def _reduction(op: str) -> Rule:
    def rule(c: Call) -> Node:
        x = c.tensor("self", c.dtype)
        return reduce_dims(op, x, c.axes("dim", x.type.rank), c.flag("keepdim"))

    return rule


def _test(op: str) -> Rule:
    def rule(c: Call) -> Node | None:
        if c.dtype is not DType.BOOL:
            return None
        x = c.tensor("self", DType.BOOL)
        return reduce_dims(op, x, c.axes("dim", x.type.rank), c.flag("keepdim"))

    return rule


def _extreme(value_op: str, index_op: str, elementwise: str) -> Rule:
    """aten.max, aten.min: of two tensors, of all elements, or along a dimension with its index."""

    def rule(c: Call) -> Node | tuple[Node, ...]:
        if "other" in c.args:
            return make(elementwise, c.tensor("self", c.dtype), c.tensor("other", c.dtype))
        x = c.tensor("self")
        if "dim" not in c.args:
            return reduce_dims(value_op, x, tuple(range(x.type.rank)), False)
        dim, keepdim = c.axis("dim", x.type.rank), c.flag("keepdim")
        return (reduce_dims(value_op, x, (dim,), keepdim), _arg(index_op, x, dim, keepdim))

    return rule


def _arg(op: str, x: Node, dim: int, keepdim: bool) -> Node:
    return make(op, x, dim=dim, **({"keepdim": True} if keepdim else {}))


def _argument(op: str) -> Rule:
    def rule(c: Call) -> Node:
        x = c.tensor("self")
        if c.given("dim") and x.type.rank:
            return _arg(op, x, c.axis("dim", x.type.rank), c.flag("keepdim"))
        return reshape(_arg(op, reshape(x, product(x.shape)), 0, False), *c.type.shape)

    return rule


def _softmax(c: Call) -> Node:
    x = c.tensor("self", c.dtype)
    return make("softmax", x, dim=c.axis("dim", x.type.rank))


def _log_softmax(c: Call) -> Node:
    x = c.tensor("self", c.dtype)
    dims = (c.axis("dim", x.type.rank),)
    shifted = make("sub", x, reduce_dims("amax", x, dims, True))
    total = reduce_dims("sum", make("exp", shifted), dims, True)
    return make("sub", shifted, make("log", total))


def _logsumexp(c: Call) -> Node:
    x = c.tensor("self", c.dtype)
    dims = c.axes("dim", x.type.rank)
    top = reduce_dims("amax", x, dims, True)
    finite = make("lt", make("abs", top), scalar(math.inf, top))
    top = make("where", finite, top, scalar(0, top))
    total = reduce_dims("sum", make("exp", make("sub", x, top)), dims, True)
    return reshape(make("add", make("log", total), top), *c.type.shape)


def _spread(c: Call, x: Node) -> tuple[Node, Node]:
    """Variance and mean, dimensions kept."""
    dims = c.axes("dim", x.type.rank)
    count: Size = product(x.shape[d] for d in dims)
    correction: float = 1
    if c.given("correction"):
        correction = c.number("correction")
    elif "unbiased" in c.args:
        correction = 1 if c.flag("unbiased") else 0
    mean = reduce_dims("mean", x, dims, True)
    apart = make("sub", x, mean)
    squares = make("pow", apart, scalar(2, apart))
    if correction == 0:
        return reduce_dims("mean", squares, dims, True), mean
    freedom = make("sub", as_node(count, x.dtype), scalar(correction, x))
    divisor = make("maximum", freedom, scalar(0, x))
    return make("div", reduce_dims("sum", squares, dims, True), divisor), mean


def _widened(x: Node) -> Node:
    """Squares of halves overflow, and their sums lose digits: torch computes both in float32."""
    return cast(x, DType.F32) if x.dtype in (DType.F16, DType.BF16) else x


def _var(c: Call) -> Node | tuple[Node, ...]:
    variance, mean = _spread(c, _widened(c.tensor("self", c.dtype)))
    if c.op in ("aten.std", "aten.std_mean"):
        variance = make("sqrt", variance)
    shape = c.type.shape
    shaped = cast(reshape(variance, *shape), c.dtype)
    return (shaped, cast(reshape(mean, *shape), c.dtype)) if c.op.endswith("_mean") else shaped


def _vector_norm(c: Call) -> Node | None:
    found = _norm(c, _widened(c.tensor("self", c.dtype)))
    return None if found is None else cast(found, c.dtype)


def _norm(c: Call, x: Node) -> Node | None:
    order = c.args.get("ord", c.args.get("p"))
    order = 2 if order is None else order
    dims = c.axes("dim", x.type.rank)
    keepdim = c.flag("keepdim")
    if order == 2:
        return make("sqrt", reduce_dims("sum", make("pow", x, scalar(2, x)), dims, keepdim))
    size = make("abs", x)
    if order == 1:
        return reduce_dims("sum", size, dims, keepdim)
    if order in (math.inf, -math.inf):
        return reduce_dims("amax" if order == math.inf else "amin", size, dims, keepdim)
    if not isinstance(order, int | float) or order == 0:
        return None
    total = reduce_dims("sum", make("pow", size, scalar(order, x)), dims, keepdim)
    return make("pow", total, scalar(1 / order, x))


def _cumsum(c: Call) -> Node:
    x = c.tensor("self", c.dtype)
    return make("cumsum", x, dim=c.axis("dim", x.type.rank)) if x.type.rank else x


def _topk(c: Call) -> tuple[Node, ...] | None:
    x = c.tensor("self")
    if not x.type.rank:
        return None
    flags = {name: False for name in ("largest", "sorted") if not c.flag(name)}
    best = make("topk", x, k=c.integer("k"), dim=c.axis("dim", x.type.rank), **flags)
    return item(best, 0), item(best, 1)


def _count_nonzero(c: Call) -> Node:
    x = cast(c.tensor("self", DType.BOOL), DType.I64)
    return reduce_dims("sum", x, c.axes("dim", x.type.rank), False)


RULES: dict[str, Rule] = {
    **{f"aten.{op}": _reduction(op) for op in ("sum", "mean", "amax", "amin", "prod")},
    "aten.any": _test("any"),
    "aten.all": _test("all"),
    "aten.max": _extreme("amax", "argmax", "maximum"),
    "aten.min": _extreme("amin", "argmin", "minimum"),
    "aten.argmax": _argument("argmax"),
    "aten.argmin": _argument("argmin"),
    "aten.softmax": _softmax,
    "aten._softmax": _softmax,
    "aten.log_softmax": _log_softmax,
    "aten._log_softmax": _log_softmax,
    "aten.logsumexp": _logsumexp,
    **{f"aten.{op}": _var for op in ("var", "std", "var_mean", "std_mean")},
    "aten.linalg_vector_norm": _vector_norm,
    "aten.norm": _vector_norm,
    "aten.cumsum": _cumsum,
    "aten.topk": _topk,
    "aten.count_nonzero": _count_nonzero,
}
