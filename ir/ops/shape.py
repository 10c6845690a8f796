"""Data movement: reshape, permute, expand, slice, concat, pad, flip, gather, embedding, ..."""

from __future__ import annotations

import torch

from ..dims import Size, is_nonnegative, product
from ..node import Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType

END = 2**63 - 1  # torch's own "to the end" in slices


def _reshape_type(x: TensorType, *, shape: tuple[Size, ...]) -> TensorType:
    if product(shape) != x.numel:
        raise ill_typed("reshape", f"as many elements as {list(shape)}", x)
    return x.with_shape(shape)


def _permute_type(x: TensorType, *, dims: tuple[int, ...]) -> TensorType:
    if sorted(dims) != list(range(x.rank)):
        raise ill_typed("permute", f"a permutation of {x.rank} dimensions, not {dims}", x)
    return x.with_shape(tuple(x.shape[d] for d in dims))


def _expand_type(x: TensorType, *, shape: tuple[Size, ...]) -> TensorType:
    aligned = (1,) * (len(shape) - x.rank) + x.shape
    if len(aligned) != len(shape) or any(
        a not in (1, b) for a, b in zip(aligned, shape, strict=True)
    ):
        raise ill_typed("expand", f"a shape that broadcasts to {list(shape)}", x)
    return x.with_shape(shape)


def sliced_size(size: Size, start: Size, stop: Size, step: int) -> Size:
    """Length of ``range(start, stop, step)``; bounds lie within ``size`` already."""
    length = stop - start
    return length if step == 1 else (length + (step - 1)) // step


def _slice_type(x: TensorType, *, dim: int, start: Size, stop: Size, step: int = 1) -> TensorType:
    if not 0 <= dim < x.rank or step < 1:
        raise ill_typed("slice", f"a dimension below the rank, not {dim}, step >= 1", x)
    size = x.shape[dim]
    # Symbolic bounds are refused where they are wrong for every value; the rest shows at run time.
    steps = (start, stop - start, size - stop)
    if any(is_nonnegative(-1 - gap) for gap in steps):
        raise ill_typed("slice", f"0 <= {start} <= {stop} <= {size}", x)
    shape = list(x.shape)
    shape[dim] = sliced_size(size, start, stop, step)
    return x.with_shape(tuple(shape))


def _slice(x: torch.Tensor, *, dim: int, start: int, stop: int, step: int = 1) -> torch.Tensor:
    index = [slice(None)] * x.dim()
    index[dim] = slice(start, stop, step)
    return x[tuple(index)]


def _concat_type(*xs: TensorType, dim: int) -> TensorType:
    first = xs[0]
    if not 0 <= dim < first.rank or any(t.rank != first.rank for t in xs):
        raise ill_typed("concat", f"operands of one rank, above dimension {dim}", *xs)
    rest = [t.shape[:dim] + t.shape[dim + 1 :] for t in xs]
    if any(r != rest[0] for r in rest) or len({t.dtype for t in xs}) > 1:
        raise ill_typed("concat", f"equal types but for dimension {dim}", *xs)
    total: Size = 0
    for t in xs:
        total = total + t.shape[dim]
    return first.with_shape((*first.shape[:dim], total, *first.shape[dim + 1 :]))


def _pad_type(x: TensorType, *, pads: tuple[tuple[Size, Size], ...], value: float) -> TensorType:
    if len(pads) != x.rank:
        raise ill_typed("pad", f"{len(pads)} dimensions", x)
    return x.with_shape(tuple(s + a + b for s, (a, b) in zip(x.shape, pads, strict=True)))


def _pad(x: torch.Tensor, *, pads: tuple[tuple[int, int], ...], value: float) -> torch.Tensor:
    flat = [amount for pair in reversed(pads) for amount in pair]
    return torch.nn.functional.pad(x, flat, value=value)


def _gather_type(x: TensorType, index: TensorType, *, dim: int) -> TensorType:
    if x.rank != index.rank or not index.dtype.is_integer or not 0 <= dim < x.rank:
        raise ill_typed("gather", f"an integer index of x's rank, above {dim}", x, index)
    pairs = zip(x.shape, index.shape, strict=True)
    if any(d != dim and is_nonnegative(i - s - 1) for d, (s, i) in enumerate(pairs)):
        raise ill_typed("gather", f"an index within x but for dimension {dim}", x, index)
    return x.with_shape(index.shape)


def _index_select_type(x: TensorType, index: TensorType, *, dim: int) -> TensorType:
    if not index.dtype.is_integer or not 0 <= dim < x.rank:
        raise ill_typed("index_select", f"an integer index into dimension {dim}", x, index)
    return x.with_shape((*x.shape[:dim], *index.shape, *x.shape[dim + 1 :]))


def _index_select(x: torch.Tensor, index: torch.Tensor, *, dim: int) -> torch.Tensor:
    rows = torch.index_select(x, dim, index.reshape(-1).long())
    return rows.reshape(*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])


def _embedding_type(weight: TensorType, ids: TensorType) -> TensorType:
    if weight.rank != 2 or not ids.dtype.is_integer:
        raise ill_typed("embedding", "(table [V, D], integer ids)", weight, ids)
    return weight.with_shape((*ids.shape, weight.shape[1]))


def _flip_type(x: TensorType, *, dims: tuple[int, ...]) -> TensorType:
    if len(set(dims)) < len(dims) or any(not 0 <= d < x.rank for d in dims):
        raise ill_typed("flip", f"different dimensions below the rank, not {dims}", x)
    return x


def _gathered_bytes(node: Node) -> Size:
    """Indices read, and as many elements read as written."""
    return node.operands[1].type.nbytes + node.type.nbytes * 2


def token_factor(x: tuple[Size, ...], axis: int, shape: tuple[Size, ...]) -> int | None:
    """The axis of a reshaped tensor that runs with ``axis`` of the original alone, None if mixed.

    Row-major order keeps the axis apart exactly when the sizes before it have the same product.
    """
    before = product(x[:axis])
    for candidate, size in enumerate(shape):
        if size == x[axis] and product(shape[:candidate]) == before:
            return candidate
    return None


def _x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _ids(generator: torch.Generator, limit: int, *shape: int) -> torch.Tensor:
    return torch.randint(limit, shape, generator=generator)


RESHAPE = register(
    OpSchema(
        "reshape",
        ("x",),
        _reshape_type,
        lambda x, *, shape: x.reshape(shape),
        ("shape",),
        samples=lambda g: [Sample((_x(g, 2, 6),), {"shape": (3, 4)})],
    )
)
PERMUTE = register(
    OpSchema(
        "permute",
        ("x",),
        _permute_type,
        lambda x, *, dims: x.permute(dims),
        ("dims",),
        samples=lambda g: [Sample((_x(g, 2, 3, 4),), {"dims": (2, 0, 1)})],
    )
)
EXPAND = register(
    OpSchema(
        "expand",
        ("x",),
        _expand_type,
        lambda x, *, shape: x.expand(shape),
        ("shape",),
        samples=lambda g: [Sample((_x(g, 3, 1),), {"shape": (2, 3, 4)})],
    )
)
SLICE = register(
    OpSchema(
        "slice",
        ("x",),
        _slice_type,
        _slice,
        ("dim", "start", "stop", "step"),
        samples=lambda g: [
            Sample((_x(g, 4, 7),), {"dim": 1, "start": 1, "stop": 6}),
            Sample((_x(g, 4, 7),), {"dim": 1, "start": 1, "stop": 7, "step": 2}),
        ],
    )
)
CONCAT = register(
    OpSchema(
        "concat",
        ("*xs",),
        _concat_type,
        lambda *xs, dim: torch.cat(xs, dim),
        ("dim",),
        samples=lambda g: [Sample((_x(g, 2, 3), _x(g, 2, 1)), {"dim": 1})],
    )
)
PAD = register(
    OpSchema(
        "pad",
        ("x",),
        _pad_type,
        _pad,
        ("pads", "value"),
        samples=lambda g: [Sample((_x(g, 2, 3),), {"pads": ((0, 1), (2, 0)), "value": 0.5})],
    )
)
FLIP = register(
    OpSchema(
        "flip",
        ("x",),
        _flip_type,
        lambda x, *, dims: torch.flip(x, dims),
        ("dims",),
        samples=lambda g: [Sample((_x(g, 2, 3),), {"dims": (1,)})],
    )
)
GATHER = register(
    OpSchema(
        "gather",
        ("x", "index"),
        _gather_type,
        lambda x, index, *, dim: torch.gather(x, dim, index.long()),
        ("dim",),
        samples=lambda g: [Sample((_x(g, 4, 5), _ids(g, 5, 4, 2)), {"dim": 1})],
        moved=_gathered_bytes,
    )
)
INDEX_SELECT = register(
    OpSchema(
        "index_select",
        ("x", "index"),
        _index_select_type,
        _index_select,
        ("dim",),
        samples=lambda g: [Sample((_x(g, 4, 5), _ids(g, 4, 2, 3)), {"dim": 0})],
        moved=_gathered_bytes,
    )
)
EMBEDDING = register(
    OpSchema(
        "embedding",
        ("weight", "ids"),
        _embedding_type,
        lambda weight, ids: torch.nn.functional.embedding(ids.long(), weight),
        samples=lambda g: [Sample((_x(g, 9, 4), _ids(g, 9, 2, 3)))],
        moved=_gathered_bytes,
    )
)
