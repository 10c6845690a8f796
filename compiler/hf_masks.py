"""What an attention mask of transformers says, read off the mask function the model builds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import CaptureError

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_LONGEST = 1 << 17
_DENSE = 300


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """Which keys a query may attend to.

    Key j is visible from query i when ``(not causal or j <= i)``,
    ``(window is None or j > i - window)`` and ``(chunk is None or j // chunk == i // chunk)``.

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


class PositionMask:
    """Stands in for the mask tensor in a model that is being captured.

    A model makes masks for layer types that it may not have, so the mask function is looked at only
    when a layer uses the mask: passed to an attention function, or added to scores.
    """

    def __init__(self, mask_function: MaskFunction, max_length: int) -> None:
        self._mask_function, self._max_length = mask_function, max_length

    @cached_property
    def spec(self) -> MaskSpec:
        """What the mask says. Raises CaptureError where it is no MaskSpec."""
        return recognise_mask(self._mask_function, self._max_length)

    def __getitem__(self, index: object) -> PositionMask:
        # [:, :, :, :key_length] is how models cut a mask to the keys, which here are all there are
        parts = index if isinstance(index, tuple) else (index,)
        whole = all(
            part is Ellipsis
            or (isinstance(part, slice) and part.start in (None, 0) and type(part.stop) is not int)
            for part in parts
        )
        if not whole:
            raise CaptureError(
                "attention mask",
                expected="a mask that is used whole",
                found=f"the part [{index}]",
                remedy="The model is captured with its own attention arithmetic instead.",
            )
        return self

    def to(self, *args: object, **kwargs: object) -> PositionMask:
        """Itself: it has neither device nor dtype."""
        return self

    def __radd__(self, scores: Tensor) -> Tensor:
        spec = self.spec
        masked: Tensor = torch.ops.tilewright.mask_scores(
            scores, spec.causal, spec.window, spec.chunk
        )
        return masked


def recognise_mask(mask_function: MaskFunction, max_length: int) -> MaskSpec:
    """The MaskSpec that agrees with `mask_function` on positions below `max_length`.

    The function is evaluated on real integers in a thread of its own, because the dispatch modes of
    an export in progress are thread-local and would turn the positions into fake tensors.

    Args:
        mask_function: transformers' ``(batch, head, query, key) -> bool`` over index tensors.
        max_length: longest sequence of the model, in tokens.

    Raises:
        CaptureError: the mask is none of causal, sliding-window or chunked, or depends on data.
    """
    # twice the longest sequence, so that a window of just that length is not taken for none
    length = max(256, min(2 * max_length, _LONGEST))
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_recognise, mask_function, length).result()


def _visible(mask_function: MaskFunction, query: Tensor, key: Tensor) -> Tensor:
    """bool[Q, K]: which of the positions `key` each of the positions `query` sees."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    try:
        allowed = mask_function(zero, zero, query.view(1, 1, -1, 1), key.view(1, 1, 1, -1))
    except Exception as error:
        raise _refusal(
            mask_function,
            "a mask that is a function of the query and key positions",
            f"{type(error).__name__}: {error}",
        ) from error
    return allowed.expand(1, 1, query.numel(), key.numel())[0, 0]


def _candidate(mask_function: MaskFunction, length: int) -> MaskSpec:
    """The only MaskSpec that could be right, from the queries that see key 0."""
    positions = torch.arange(length)
    if bool(_visible(mask_function, positions[:1], positions[-1:])):
        return MaskSpec(causal=False)
    reach = int(_visible(mask_function, positions, positions[:1]).sum())
    if reach == length:
        return MaskSpec(causal=True)
    # the first query that does not see key 0 sees key 1 through a window, itself alone in a chunk
    edge = positions[min(max(reach, 1), length - 1)].view(1)
    windowed = bool(_visible(mask_function, edge, positions[1:2]))
    return MaskSpec(True, reach, None) if windowed else MaskSpec(True, None, max(reach, 1))


def _recognise(mask_function: MaskFunction, length: int) -> MaskSpec:
    spec = _candidate(mask_function, length)
    edge = spec.window or spec.chunk or 0
    rows = {*(edge + step for step in (-2, -1, 0, 1, 2)), 2 * edge + 1, length // 2, length - 1}
    far = torch.tensor(sorted(row for row in rows if 0 <= row < length))
    dense = min(length, _DENSE)
    for query, key in (
        (torch.arange(dense), torch.arange(dense)),
        (far, torch.arange(length)),
    ):
        found = _visible(mask_function, query, key)
        wanted = spec.allows(query.view(-1, 1), key.view(1, -1))
        if not torch.equal(found, wanted):
            row, column = (int(part) for part in (found != wanted).nonzero()[0])
            raise _refusal(
                mask_function,
                "a causal, sliding-window or chunked mask",
                f"one that differs from {spec} at query {int(query[row])}, key {column}",
            )
    return spec


def _refusal(mask_function: MaskFunction, expected: str, found: str) -> CaptureError:
    return CaptureError(
        f"attention mask {getattr(mask_function, '__qualname__', mask_function)}",
        expected=expected,
        found=found,
        remedy="The model is captured with its own attention arithmetic instead.",
    )
