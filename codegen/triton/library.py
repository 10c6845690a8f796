"""Calls of the libraries that torch brings: cuBLAS for products, cuDNN or flash for attention:
torch takes one by rules of its own, unless a tuner found another one faster.

They are candidates like any kernel of ours. Operands are taken where they lie (`Layout`), as
strided views.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F

from ...ir.dims import Dim
from ...ir.interpreter import resolve_attr
from ...ir.node import Attr, Node
from ...ir.ops.attention import mask_and_bias
from ...ir.schema import schema
from ..by_sizes import BySizes
from ..program import Call
from .fresh import fresh_attention
from .layout import located
from .scaled_library import scaled_product, takes_scaled

PREFIX = "triton/library/"
ATTENTIONS = ("cudnn", "flash", "efficient", "math")
"""What torch can compute dense attention with: names of its SDPBackends, as a call's attr
``backend`` has them.
"""
_switches = threading.Lock()  # torch keeps its choice of attention for the whole process


def takes(node: Node) -> bool:
    """Whether a library computes the node."""
    if node.op not in LIBRARY:
        return False
    if node.op == "scaled_linear":
        return takes_scaled(node)
    if node.op == "attention":
        q, _, v = node.operands[:3]
        plain = node.args[4] is None and node.attr("softcap") is None
        return plain and q.dtype.bytes <= 4 and q.shape[3] == v.shape[3]
    return node.dtype.is_float


def views_of(operands: Sequence[Node | None]) -> tuple[Attr, ...]:
    """(shape, offset, strides) of each operand that is not a buffer of its own, else None."""
    found: list[Attr] = []
    for operand in operands:
        base, layout = (None, None) if operand is None else located(operand)
        if operand is base or operand is None or layout is None:
            found.append(None)
        else:
            found.append((operand.shape, layout.offset, layout.strides))
    return tuple(found)


class LibraryKernel:
    """One library call.

    Args:
        call: whose ``attrs`` are the op's, with ``views`` beside them; of attention perhaps
            ``backend``, one of ``ATTENTIONS``.
        strict: whether a backend that does not take the operands is an error of torch's
            (RuntimeError); else torch takes another one.
    """

    def __init__(self, call: Call, strict: bool = False) -> None:
        function = LIBRARY[call.kernel.removeprefix(PREFIX)]
        backend = call.attrs.get("backend")
        self.function = function if backend is None else _by(function, str(backend), strict)
        own = ("views", "backend")
        self.attrs = {name: value for name, value in call.attrs.items() if name not in own}
        self.views = cast(tuple[Any, ...], call.attrs["views"])
        self._resolved = BySizes(self._resolve)
        symbolic = any(map(_is_symbolic, (*self.views, *self.attrs.values())))
        self._fixed = None if symbolic else self._resolve({})

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        views, attrs = self._fixed or self._resolved.at(sizes)
        if views is not None:
            operands = [
                # as_strided counts from the storage's start, the layout from the buffer's.
                x
                if view is None or x is None
                else torch.as_strided(x, view[0], view[2], x.storage_offset() + view[1])
                for x, view in zip(operands, views, strict=True)
            ]
        # Attention answers in its operands' order of axes, convolutions in one they like.
        return (self.function(*operands, **attrs).contiguous(),)

    def _resolve(self, sizes: Mapping[str, int]) -> tuple[Sequence[Any] | None, dict[str, Any]]:
        """Views, None where no operand has one, and attributes at these sizes."""
        views = [None if v is None else resolve_attr(v, sizes) for v in self.views]
        attrs = {name: resolve_attr(value, sizes) for name, value in self.attrs.items()}
        return (views if any(self.views) else None), attrs


def _is_symbolic(value: Attr) -> bool:
    return any(map(_is_symbolic, value)) if isinstance(value, tuple) else isinstance(value, Dim)


def _by(
    function: Callable[..., torch.Tensor], backend: str, strict: bool
) -> Callable[..., torch.Tensor]:
    """Attention by one of torch's backends: it alone, or it before the others."""
    others = () if strict else (name for name in ATTENTIONS if name != backend)
    order = [_sdp_backend(name) for name in (backend, *others)]

    def chosen(*operands: torch.Tensor, **attrs: Any) -> torch.Tensor:
        with _attending_by(order):
            return function(*operands, **attrs)

    return chosen


def _sdp_backend(name: str) -> Any:
    """KeyError for a name that is none of ``ATTENTIONS``."""
    from torch.nn.attention import SDPBackend

    by_name = (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
    return dict(zip(ATTENTIONS, by_name, strict=True))[name]


@contextmanager
def _attending_by(order: list[Any]) -> Iterator[None]:
    from torch.nn.attention import sdpa_kernel

    with _switches, sdpa_kernel(order, set_priority=True):
        yield


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    sinks: None = None,
    alibi: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    if scale <= 0:  # torch masks before it scales: minus infinity would change its sign
        q, scale = q * scale, 1.0
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if mask is None and alibi is None and window is None and (not causal or queries == keys):
        # torch's is_causal counts from the first key: the same where there are as many queries.
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal and queries > 1, scale=scale, enable_gqa=grouped
        )
    visible, bias = mask_and_bias(q, k, mask, alibi, causal, window)
    if bias is not None:
        bias = bias.to(q.dtype)
        merged = bias if visible is None else bias.masked_fill(~visible, -torch.inf)
    else:
        assert visible is not None
        merged = visible
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=merged, scale=scale, enable_gqa=grouped)
    # A row that sees nothing gives 0 by our definition, NaN or anything by the libraries'.
    return out if visible is None else out.masked_fill(~visible.any(-1, keepdim=True), 0.0)


LIBRARY: Mapping[str, Callable[..., torch.Tensor]] = {
    "linear": cast("Callable[..., torch.Tensor]", schema("linear").reference),
    "matmul": cast("Callable[..., torch.Tensor]", schema("matmul").reference),
    "conv": cast("Callable[..., torch.Tensor]", schema("conv").reference),
    "attention": _attention,
    "scaled_linear": scaled_product,
    "fresh_attention": fresh_attention,
}
"""By op: the function with the signature of the op's reference. ``fresh_attention`` is no op, but
the share of one (fresh.py).
"""
