"""Attention of one new prompt by cuDNN: all keys are of the step's own tokens, so that there is
nothing to attend to that a dense causal attention would not know.

Whether a step is of that kind no size tells; the runtime says it (``FRESH``). Keys and values come
from the pages that they have just been written to, which costs a copy of them. What our kernel for
Hopper computes (kernels/hopper_attention.py) is its own, of any number of tokens::

    paged_attention_0 = fresh_attention(q, k_cache, v_cache, slot_mapping)   guard: T*fresh - 1024
    paged_attention_0 = paged_attention(q, k_cache, v_cache, …)              guard: 1023 - T*fresh
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...ir.dims import Size
from ...ir.dtypes import DType
from ...ir.node import Attr, Node
from ...targets import Target
from ..program import FRESH
from .kernels.hopper_attention import why_not
from .kernels.paged_attention_tiles import Problem
from .layout import located

FEWEST = 1024
"""Tokens from which cuDNN and the copies are known to be quicker than our kernel on an H100, of 32
heads of 128: 37 us against 47, and 93 against 138 for 2048; of 64, 28 against 49. 512 are equal.
"""

_FIRST_ARCH = 90  # cuDNN's attention for wgmma
_WIDEST = 128


@dataclass(frozen=True, slots=True)
class Fresh:
    """The library's share of a ``paged_attention``.

    Attributes:
        operands: q, both caches and the slots that the step's tokens are written to.
        attrs: of the call.
        guard: where it is made.
        otherwise: where the kernel's call is.
    """

    operands: tuple[Node, ...]
    attrs: dict[str, Attr]
    guard: tuple[Size, ...]
    otherwise: tuple[Size, ...]

    @classmethod
    def of(cls, node: Node, target: Target) -> Fresh | None:
        """None for other nodes, where cuDNN does not take it or the target is older, and where our
        kernel for Hopper, which needs no copies, computes it: 2048 tokens of 32 heads of 128 take
        that 76 us, cuDNN 85 us without them.
        """
        if node.op != "paged_attention" or node.args[5] is None or target.arch < _FIRST_ARCH:
            return None
        q, k_cache, v_cache = node.operands[:3]
        slots = _written_to(k_cache)
        if slots is None or slots is not _written_to(v_cache) or not _is_plain(node):
            return None
        layouts = [None if arg is None else located(arg)[1] for arg in node.args]
        problem = Problem.of(node, layouts)
        if problem is not None and why_not(problem, target) is None:
            return None
        tokens = q.shape[0]
        if isinstance(tokens, int):
            return None
        known = tokens * FRESH
        attrs: dict[str, Attr] = {"scale": node.attr("scale")}
        return cls((q, k_cache, v_cache, slots), attrs, (known - FEWEST,), ((FEWEST - 1) - known,))


def _written_to(cache: Node) -> Node | None:
    """The slots that the step has written in a cache: of the ``append_kv`` that it comes from."""
    made = cache.operands[0] if cache.op == "item" else cache
    return made.args[4] if made.op == "append_kv" else None


def _is_plain(node: Node) -> bool:
    """Whether it is causal attention and nothing else, of types and widths that cuDNN takes."""
    q, _, v_cache = node.operands[:3]
    width, scale = q.shape[2], node.attr("scale")
    assert isinstance(scale, int | float)
    typed = q.dtype in (DType.F16, DType.BF16)
    narrow = isinstance(width, int) and width % 8 == 0 and width <= _WIDEST
    added = [node.args[6], node.args[7], node.attr("softcap"), node.attr("window")]
    plain = bool(node.attr("causal")) and scale > 0 and all(x is None for x in added)
    return typed and narrow and width == v_cache.shape[3] and plain


def fresh_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Causal attention [T, H, D] of one sequence, whose keys and values lie in ``slots`` [T].

    Args:
        q: [T, H, D].
        k_cache, v_cache: [N, P, G, D].
        slots: i64[T].
        scale: factor of the scores.
    """
    k, v = (cache.flatten(0, 1).index_select(0, slots) for cache in (k_cache, v_cache))
    heads, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        heads, keys, values, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)
