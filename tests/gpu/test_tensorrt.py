"""A tiny model's engine on a GPU that TensorRT builds for, beside the reference of its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensorrt_reference import evaluate
from tensorrt_running import ROOM, lowered
from tilewright.codegen.tensorrt.builder import build_engine
from tilewright.codegen.tensorrt.flavor import RTX, find_flavor
from tilewright.codegen.tensorrt.profiles import decoder_profiles
from tilewright.targets import Target

pytestmark = pytest.mark.gpu
trt = pytest.importorskip(RTX, reason="needs pip install tilewright[tensorrt], 96 MB")


def test_prefill_and_decode_are_the_references(tmp_path: Path) -> None:
    flavor, arch = find_flavor([RTX]), Target.detect().arch
    if arch not in flavor.archs:
        pytest.skip(f"{flavor.name} builds for {flavor.archs}, not sm_{arch}")
    found = lowered("llama", "bfloat16")
    path = tmp_path / "e"
    with path.open("wb") as file:
        build_engine(found.network, flavor, [arch], decoder_profiles(2, ROOM), file, strict=True)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context()
    stream = torch.cuda.Stream()
    caches = {
        c.past: torch.zeros(2, c.heads, ROOM, c.width, dtype=c.dtype.torch) for c in found.caches
    }
    on_gpu = {name: cache.cuda() for name, cache in caches.items()}
    for profile, (start, length) in enumerate(((0, 7), (7, 1))):
        ids = torch.arange(2 * length).view(2, length) * 3 % 160
        positions = torch.arange(start, start + length).expand(2, length).contiguous()
        last = torch.full((2, 1), length - 1)
        feeds = {"input_ids": ids, "position_ids": positions, "logits_indices": last}
        wanted = evaluate(found.network, {**feeds, **caches})["logits"]
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        given = {name: x.cuda() for name, x in feeds.items()} | on_gpu
        for name, x in given.items():
            context.set_input_shape(name, tuple(x.shape))
            context.set_tensor_address(name, x.data_ptr())
        for cache in found.caches:
            context.set_tensor_address(cache.present, on_gpu[cache.past].data_ptr())
        logits = torch.empty(wanted.shape, dtype=wanted.dtype, device="cuda")
        context.set_tensor_address("logits", logits.data_ptr())
        torch.cuda.synchronize()
        assert context.execute_async_v3(stream.cuda_stream)
        torch.cuda.synchronize()
        torch.testing.assert_close(logits.cpu(), wanted, atol=0.1, rtol=0.05)
