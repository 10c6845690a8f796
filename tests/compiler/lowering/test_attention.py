"""scaled_dot_product_attention in all its forms, and the ops that capture emits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lowering_oracle import assert_same, lowered, ops
from tilewright.compiler import hf_attention  # noqa: F401  registers the custom ops


def qkv(*lead: int, queries: int = 5, keys: int = 5) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(*lead, queries, 8),
        torch.randn(*lead, keys, 8),
        torch.randn(*lead, keys, 6),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_ranks_and_causality(causal: bool) -> None:
    leads = [(), (3,), (2, 3), (2, 2, 3)]
    inputs = [x for lead in leads for keys in (5, 7, 3) for x in qkv(*lead, keys=keys)]

    def attend(*xs: torch.Tensor) -> list[torch.Tensor]:
        return [sdpa(*xs[i : i + 3], is_causal=causal) for i in range(0, len(xs), 3)]

    assert ops(assert_same(attend, *inputs, tolerance=5e-6)).count("attention") == 12


def test_masks() -> None:
    shapes = [(5, 7), (2, 1, 5, 7), (2, 3, 5, 7), (2, 1, 1, 7), (1, 1, 5, 7)]
    masks = [torch.randn(shape) for shape in shapes]
    masks += [mask > -0.5 for mask in masks]
    assert_same(
        lambda q, k, v, *masks: [sdpa(q, k, v, mask) for mask in masks],
        *qkv(2, 3, keys=7),
        *masks,
        tolerance=5e-6,
    )


def test_grouped_heads_and_scale() -> None:
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    graph = assert_same(
        lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.2, enable_gqa=True),
        *(q, k, v),
        tolerance=2e-6,
    )
    assert ops(graph) == ["attention"]


@pytest.mark.quick
def test_causal_over_equal_lengths_needs_no_mask() -> None:
    length = torch.export.Dim("S", min=2, max=64)
    inputs = qkv(1, 3)
    graph = assert_same(
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
        *inputs,
        dynamic=({2: length},) * 3,
        others=[qkv(1, 3, queries=9, keys=9)],
        tolerance=2e-6,
    )
    (node,) = graph.calls()
    assert node.attr("causal") is True and node.args[3] is None


OPTIONS = [
    {},
    {"window": 3},
    {"chunk": 2},
    {"softcap": 2.0},
    {"is_causal": False},
    {"bias": True, "chunk": 3},
    {"bias": True},
    {"sinks": True},
]


def test_captured_attention() -> None:
    def attend(
        q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor, bias: torch.Tensor
    ) -> list[torch.Tensor]:
        found = []
        for options in OPTIONS:
            settings = {"is_causal": True, "window": None, "chunk": None, "softcap": None}
            settings |= options
            flags = [settings[name] for name in ("is_causal", "window", "chunk", "softcap")]
            extra = [sinks if "sinks" in options else None, bias if "bias" in options else None]
            found.append(torch.ops.tilewright.attention(q, k, k + 1, *extra, 0.3, *flags))
        return found

    inputs = (torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8))
    assert_same(attend, *inputs, torch.randn(4), torch.randn(1, 4, 6, 6), tolerance=5e-6)


def test_captured_masks() -> None:
    graph = assert_same(
        lambda s: [
            torch.ops.tilewright.mask_scores(s, True, window, chunk)
            for window in (None, 3)
            for chunk in (None, 2)
        ],
        torch.randn(2, 5, 7),
    )
    assert ops(graph).count("where") == 4


def test_attention_with_dropout_is_refused_as_random() -> None:
    from tilewright.errors import CaptureError

    with pytest.raises(CaptureError, match="random"):
        lowered(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), qkv(1, 2))
