"""Layers of torch.nn against the lowered graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowering_oracle import assert_same, ops

LAYERS = {
    "layer_norm": (nn.LayerNorm(8), (2, 3, 8)),
    "layer_norm_2d": (nn.LayerNorm((3, 8)), (2, 3, 8)),
    "layer_norm_plain": (nn.LayerNorm(8, elementwise_affine=False), (2, 8)),
    "layer_norm_no_bias": (nn.LayerNorm(8, bias=False), (2, 8)),
    "rms_norm": (nn.RMSNorm(8), (2, 3, 8)),
    "rms_norm_eps": (nn.RMSNorm(8, eps=1e-3, elementwise_affine=False), (2, 3, 8)),
    "group_norm": (nn.GroupNorm(2, 6), (2, 6, 5)),
    "group_norm_plain": (nn.GroupNorm(3, 6, affine=False), (2, 6, 4, 4)),
    "batch_norm": (nn.BatchNorm2d(4), (2, 4, 3, 3)),
    "batch_norm_1d": (nn.BatchNorm1d(4, affine=False), (5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), groups=2), (2, 4, 9, 8)),
    "conv2d_same": (nn.Conv2d(3, 5, 3, padding="same", bias=False), (2, 3, 7, 7)),
    "conv2d_single": (nn.Conv2d(3, 5, 3), (3, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "pixel_shuffle": (nn.PixelShuffle(2), (1, 8, 3, 3)),
    "channel_shuffle": (nn.ChannelShuffle(2), (1, 4, 3, 3)),
    "gru_cell": (nn.GRUCell(4, 5), (3, 4)),
}
FOREIGN = {
    "conv_transpose": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9), "aten.convolution.default"),
    "max_pool": (nn.MaxPool2d(2), (1, 3, 6, 6), "aten.max_pool2d_with_indices.default"),
    "avg_pool": (nn.AvgPool2d(2), (1, 3, 6, 6), "aten.avg_pool2d.default"),
}


def _moved(module: nn.Module) -> nn.Module:
    """Off the trivial zeros and ones."""
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.add_(0.2 * torch.rand(value.shape))
    return module.eval()


class Layers(nn.Module):
    """Each layer on an input of its own."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def test_layers() -> None:
    modules = Layers([_moved(module) for module, _ in LAYERS.values()])
    assert_same(modules, *(torch.randn(shape) for _, shape in LAYERS.values()), tolerance=5e-6)


def test_layers_that_stay_with_torch() -> None:
    modules = Layers([_moved(module) for module, _, _ in FOREIGN.values()])
    inputs = [torch.randn(shape) for _, shape, _ in FOREIGN.values()]
    assert_same(modules, *inputs, foreign=[op for _, _, op in FOREIGN.values()], tolerance=2e-6)


def test_conv_at_two_sizes() -> None:
    assert_same(
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        torch.randn(2, 4, 9),
        dynamic=({2: torch.export.Dim("L", min=4, max=64)},),
        others=[(torch.randn(2, 4, 12),), (torch.randn(2, 4, 33),)],
        tolerance=2e-6,
    )


@pytest.mark.quick
def test_norms_are_single_ops() -> None:
    assert ops(assert_same(nn.LayerNorm(8), torch.randn(2, 8))) == ["layer_norm"]
    assert ops(assert_same(nn.RMSNorm(8), torch.randn(2, 8))) == ["rms_norm"]


def test_norms_in_half_precision_keep_their_type() -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert_same(nn.RMSNorm(8, dtype=torch.bfloat16), x, tolerance=2e-2)
    assert_same(nn.LayerNorm(8, dtype=torch.bfloat16), x, tolerance=2e-2)


def test_embedding_with_padding_index() -> None:
    assert_same(nn.Embedding(9, 4, padding_idx=0), torch.randint(9, (2, 3)))
