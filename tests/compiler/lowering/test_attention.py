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


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [5, 7, 3])
def test_ranks_and_causality(lead: tuple[int, ...], causal: bool, keys: int) -> None:
    graph = assert_same(
        lambda q, k, v: sdpa(q, k, v, is_causal=causal), *qkv(*lead, keys=keys), tolerance=2e-6
    )
    assert "attention" in ops(graph)


@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (2, 3, 5, 7), (2, 1, 1, 7), (1, 1, 5, 7)])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks(shape: tuple[int, ...], boolean: bool) -> None:
    mask = torch.randn(shape)
    mask = mask > -0.5 if boolean else mask
    assert_same(lambda q, k, v, m: sdpa(q, k, v, m), *qkv(2, 3, keys=7), mask, tolerance=2e-6)


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"chunk": 2},
        {"softcap": 2.0},
        {"is_causal": False},
        {"bias": True, "chunk": 3},
        {"bias": True},
        {"sinks": True},
    ],
)
def test_captured_attention(options: dict[str, object]) -> None:
    settings = {"is_causal": True, "window": None, "chunk": None, "softcap": None, **options}
    extra = [torch.randn(4) if "sinks" in settings else None]
    extra.append(torch.randn(1, 4, 6, 6) if "bias" in settings else None)
    flags = [settings[name] for name in ("is_causal", "window", "chunk", "softcap")]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.tilewright.attention(q, k, v, *extra, 0.3, *flags)

    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    assert_same(attend, q, k, torch.randn(1, 2, 6, 8), tolerance=2e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk", [None, 2])
def test_captured_mask(window: int | None, chunk: int | None) -> None:
    graph = assert_same(
        lambda s: torch.ops.tilewright.mask_scores(s, True, window, chunk), torch.randn(2, 5, 7)
    )
    assert ops(graph)[-1] == "where"


def test_attention_with_dropout_is_refused_as_random() -> None:
    from tilewright.errors import CaptureError

    with pytest.raises(CaptureError, match="random"):
        lowered(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), qkv(1, 2))
