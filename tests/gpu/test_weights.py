"""Weights on a GPU: the same values as on the CPU, laid out there, within a device's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tilewright.errors import CapacityError
from tilewright.formats import Full, Held, Random, Stored, Weight, apply_weight, open_checkpoint
from tilewright.runtime import staging
from tilewright.runtime.weights import place_weights

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def expressions(folder: Path) -> dict[str, Weight]:
    """Every way that a weight can take to the device."""
    tensors = {name: torch.randn(300, 64).bfloat16() for name in "abc"}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    a, b, c = (Stored(checkpoint, name) for name in "abc")
    below = apply_weight("concat", (a, b, c), dim=0)
    return {
        "plain": a,
        "below": below,
        "beside": apply_weight("concat", (a, b), dim=1),
        "wide": apply_weight("cast", (below,), dtype=torch.float32),
        "narrow": apply_weight("cast", (Held(torch.randn(99, 7), "h"),), dtype=torch.float16),
        "scaled": apply_weight("mul", (a, 0.125)),
        "turned": apply_weight("permute", (c,), dims=(1, 0)),
        "cut": apply_weight("slice", (c,), dim=1, start=3, stop=9),
        "random": Random(3, (5000, 5000), torch.bfloat16),
        "random_beside": apply_weight("concat", (Random(1, (9, 4)), Random(2, (9, 5))), dim=1),
        "ones": Full(1.0, (7,), torch.bfloat16),
        "flags": Held(torch.tensor([True, False]), "flags"),
        "scalar": Held(torch.tensor(3.0), "scalar"),
        "none": Held(torch.empty(0, 4), "none"),
    }


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("stage", [256, staging.STAGE_BYTES])
def test_a_gpu_gets_the_values_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, stage: int
) -> None:
    weights = expressions(tmp_path)
    if stage == 256:
        del weights["random"]  # 200 thousand blocks
    monkeypatch.setattr(staging, "STAGE_BYTES", stage)
    found = place_weights(weights, CUDA, threads)
    for name, weight in weights.items():
        tensor = found.tensors[name]
        assert tensor.is_cuda and tensor.is_contiguous(), name
        assert torch.equal(tensor.cpu(), weight.load()), name


def test_what_the_device_cannot_hold_is_refused_before_any_work() -> None:
    free, _ = torch.cuda.mem_get_info()
    with pytest.raises(CapacityError, match=r"bytes free .*smaller dtype"):
        place_weights({"w": Random(0, (2 * free,), torch.bfloat16)}, CUDA)
