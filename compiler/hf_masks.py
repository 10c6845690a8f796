"""What an attention mask of transformers says, recovered by evaluating the mask function that the model itself builds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CaptureError

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_LONGEST = 1 << 17
_DENSE = 48


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """Which keys a query may attend to.

    Key j is visible from query i when ``(not causal or j <= i)``, ``(window is None or j > i - window)`` and
    ``(chunk is None or j // chunk == i // chunk)``.

    Attributes:
        causal: no key after the query is visible.
        window: number of visible keys, the query's own included; None when unlimited.
        chunk: length of the blocks outside of which nothing is visible; None when there are none.
    """

    causal: bool
    window: int | None = None
    chunk: int | None = None

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast of the positions `query` and `key` (i64): whether the key is visible."""
        allowed = torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool)
        if self.causal:
            allowed = allowed & (key <= query)
        if self.window is not None:
            allowed = allowed & (key > query - self.window)
        if self.chunk is not None:
            allowed = allowed & (key // self.chunk == query // self.chunk)
        return allowed


def recognise_mask(mask_function: MaskFunction, max_length: int) -> MaskSpec:
    """The MaskSpec that agrees with `mask_function` on positions below `max_length`.

    The function is evaluated on real integers in a thread of its own, because the dispatch modes of an export in
    progress are thread-local and would turn the positions into fake tensors.

    Args:
        mask_function: transformers' ``(batch, head, query, key) -> bool`` over index tensors.
        max_length: longest sequence of the model, in tokens.

    Raises:
        CaptureError: the mask is none of causal, sliding-window or chunked, or depends on data.
    """
    length = max(256, min(max_length, _LONGEST))
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_recognise, mask_function, length).result()


def _rows(mask_function: MaskFunction, query: Tensor, length: int) -> Tensor:
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    key = torch.arange(length).view(1, 1, 1, -1)
    try:
        allowed = mask_function(zero, zero, query.view(1, 1, -1, 1), key)
    except Exception as error:
        raise CaptureError(
            f"attention mask {getattr(mask_function, '__qualname__', mask_function)}",
            expected="a mask that is a function of the query and key positions",
            found=f"{type(error).__name__}: {error}",
            remedy="Capture the model as a plain module (capture_module) instead.",
        ) from error
    return allowed.expand(1, 1, query.numel(), length)[0, 0]


def _candidate(last: Tensor, before: Tensor) -> MaskSpec:
    length = last.numel()
    first_last, first_before = int(last.int().argmax()), int(before.int().argmax())
    if bool(before[-1]):
        return MaskSpec(causal=False)
    if first_last == 0:
        return MaskSpec(causal=True)
    if first_last == first_before:
        return MaskSpec(causal=True, chunk=length)  # refined below
    return MaskSpec(causal=True, window=length - first_last)


def _recognise(mask_function: MaskFunction, length: int) -> MaskSpec:
    # an odd length, so that no usual chunk ends on the last row
    length |= 1
    ends = _rows(mask_function, torch.tensor([length - 1, length - 2]), length)
    spec = _refine_chunk(_candidate(ends[0], ends[1]), mask_function, length)
    edge = spec.window or spec.chunk or 0
    rows = [
        *range(_DENSE),
        *(edge + step for step in (-2, -1, 0, 1, 2)),
        2 * edge + 1,
        length // 2,
        length - 1,
    ]
    query = torch.tensor(sorted({row for row in rows if 0 <= row < length}))
    found = _rows(mask_function, query, length)
    wanted = spec.allows(query.view(-1, 1), torch.arange(length).view(1, -1))
    if not torch.equal(found, wanted):
        row, key = (int(part) for part in (found != wanted).nonzero()[0])
        raise CaptureError(
            f"attention mask {getattr(mask_function, '__qualname__', mask_function)}",
            expected="a causal, sliding-window or chunked mask",
            found=f"one that differs from {spec} at query {int(query[row])}, key {key}",
            remedy="Capture the model as a plain module (capture_module) instead.",
        )
    return spec


def _refine_chunk(spec: MaskSpec, mask_function: MaskFunction, length: int) -> MaskSpec:
    if spec.chunk is None:
        return spec
    # key 0 is visible exactly from the queries of the first chunk
    query = torch.arange(length)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    first = mask_function(zero, zero, query.view(1, 1, -1, 1), zero).flatten()
    return MaskSpec(causal=True, chunk=int(first.sum()))
