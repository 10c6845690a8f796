"""Puts our hooks into transformers' tables for the time of one capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_innermost_proxy_mode, get_proxy_slot

from ..errors import CaptureError
from .capture_types import Route
from .hf_attention import attention_hook, sdpa_hook
from .hf_experts import experts_hook
from .hf_masks import MaskFunction, PositionMask

INTERFACE = "tilewright"

_aten = torch.ops.aten
_CASTS = (
    _aten.to.dtype,
    _aten.to.dtype_layout,
    _aten.to.device,
    _aten._to_copy.default,
)


@contextmanager
def hooks(route: Route, max_length: int) -> Iterator[None]:
    """Inside, the implementation "tilewright" of attention, masks and experts exists.

    On route "masks" the masks of sdpa and eager are PositionMasks as well.

    Args:
        max_length: longest sequence of the model, up to which masks are compared.
    """
    from transformers import masking_utils
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = {INTERFACE: _mask_hook(max_length)}
    if route == "masks":
        masks |= dict.fromkeys(("sdpa", "eager"), masks[INTERFACE])
    with ExitStack() as stack:
        for table, entries in (
            (ALL_ATTENTION_FUNCTIONS, {INTERFACE: attention_hook}),
            (masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, masks),
            (ALL_EXPERTS_FUNCTIONS, {INTERFACE: experts_hook}),
        ):
            stack.enter_context(patch.dict(table._global_mapping, entries))
        # One sequence whose positions count up from 0: transformers cannot know that while tracing,
        # and would mix a test for packed sequences and a left padding into the mask.
        stack.enter_context(
            patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
        )
        stack.enter_context(patch.object(masking_utils, "chunked_overlay", _chunks))
        functional = torch.nn.functional
        sdpa = sdpa_hook(functional.scaled_dot_product_attention)
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", sdpa))
        yield


def _chunks(chunk_size: int, left_padding: Tensor) -> MaskFunction:
    def same_chunk(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key // chunk_size == query // chunk_size

    return same_chunk


def _mask_hook(max_length: int) -> Callable[..., PositionMask]:
    def make_mask(
        *, mask_function: MaskFunction, attention_mask: Tensor | None = None, **kwargs: object
    ) -> PositionMask:
        if attention_mask is not None and not _all_ones(attention_mask):
            raise CaptureError(
                "attention mask",
                expected="no padding mask, since a single sequence is captured",
                found="a padding mask made by the model",
                remedy="The model is captured with its own attention arithmetic instead.",
            )
        return PositionMask(mask_function, max_length)

    return make_mask


def _all_ones(mask: Tensor) -> bool:
    """Whether the export in progress made the tensor by torch.ones or the like."""
    mode = get_innermost_proxy_mode()
    slot = get_proxy_slot(mask, mode.tracer, None) if mode is not None else None
    if slot is None:
        return False
    node = slot.proxy.node
    while node.target in _CASTS:
        node = node.all_input_nodes[0]
    if node.target in (_aten.full.default, _aten.full_like.default):
        return bool(node.args[1] == 1)
    return node.target in (_aten.ones.default, _aten.ones_like.default)
