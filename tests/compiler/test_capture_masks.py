"""The masks that transformers builds, recognised as data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.compiler.hf_hooks import _chunks
from tilewright.compiler.hf_masks import MaskSpec, PositionMask, recognise_mask
from tilewright.errors import CaptureError

pytestmark = pytest.mark.quick


def sliding(window):
    from transformers.masking_utils import sliding_window_causal_mask_function

    return sliding_window_causal_mask_function(window)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700))
def test_window_is_found(window):
    assert recognise_mask(sliding(window), 600) == MaskSpec(causal=True, window=window)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 700))
def test_chunk_is_found(chunk):
    from transformers.masking_utils import and_masks, causal_mask_function

    mask = and_masks(_chunks(chunk, torch.zeros(1)), causal_mask_function)
    assert recognise_mask(mask, 600) == MaskSpec(causal=True, chunk=chunk)


def test_full_masks():
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    assert recognise_mask(causal_mask_function, 4096) == MaskSpec(causal=True)
    assert recognise_mask(bidirectional_mask_function, 4096) == MaskSpec(causal=False)


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, k: (k <= q) & ((k != 40) | (q < 45)),
        lambda b, h, q, k: (k <= q) & (k % 2 == q % 2),
        lambda b, h, q, k: abs(q - k) <= 4,
        lambda b, h, q, k: (k <= q) & torch.zeros(7, dtype=torch.bool)[k],
    ],
    ids=["hole", "strided", "two-sided window", "raises"],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(CaptureError, match="attention mask"):
        recognise_mask(mask, 512)


def test_spec_agrees_with_the_eager_mask():
    from transformers.masking_utils import sdpa_mask

    positions = torch.arange(20)
    wanted = sdpa_mask(1, 20, 20, mask_function=sliding(6), allow_is_causal_skip=False)[0, 0]
    found = MaskSpec(True, window=6).allows(positions.view(-1, 1), positions)
    assert torch.equal(found, wanted)


def test_an_unused_mask_is_not_looked_at():
    PositionMask(lambda *_: pytest.fail("evaluated"), 64)


def test_part_of_a_mask_is_refused():
    mask = PositionMask(sliding(3), 64)
    assert mask[:, :, :, :] is mask
    with pytest.raises(CaptureError, match="used whole"):
        mask[:, :, 2:4]


def test_added_to_scores_it_hides_keys():
    scores = torch.zeros(1, 2, 5, 5)
    out = scores + PositionMask(sliding(2), 64)
    visible = MaskSpec(True, 2).allows(torch.arange(5).view(-1, 1), torch.arange(5))
    assert torch.equal(out[0, 1] == 0, visible)
