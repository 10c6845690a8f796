"""A tiny model's engine on a GPU that TensorRT builds for, beside the reference of its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tilewright as tw
from tensorrt_running import ROOM, lowered
from tilewright.codegen.tensorrt.builder import build_engine
from tilewright.codegen.tensorrt.evaluate import evaluate
from tilewright.codegen.tensorrt.flavor import RTX, find_flavor
from tilewright.codegen.tensorrt.profiles import decoder_profiles
from tilewright.targets import Target
from tiny_models import PROMPTS, tiny_model

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
        last = torch.tensor([length - 1, 2 * length - 1])
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


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_engine_folder_generates_hugging_faces_tokens(family: str, tmp_path: Path) -> None:
    """Through the executor, slots and profiles; the kernels that were compiled are kept."""
    flavor, target = find_flavor([RTX]), Target.detect()
    if target.arch not in flavor.archs:
        pytest.skip(f"{flavor.name} builds for {flavor.archs}, not {target.sm}")
    model = tiny_model(family).bfloat16()
    options = {"max_model_len": 64, "max_batch_size": 3}
    tw.compile(model, backend="tensorrt", **options).save(tmp_path / "e")
    engine = tw.load(tmp_path / "e")
    prompts = [list(prompt) for prompt in PROMPTS]
    params = tw.SamplingParams(max_new_tokens=8, ignore_eos=True)
    found = [c.token_ids for c in engine.generate(prompts, params)]
    judge = tw.compile(model, backend="eager", target="cpu", **options)
    close = 0
    for prompt, tokens in zip(prompts, found, strict=True):
        logits = judge(torch.tensor(prompt + tokens[:-1]))[len(prompt) - 1 :]
        best = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        close += int((best < 0.1).sum())
    assert close == 24  # each the best token, or within bfloat16 of it
    engine.save(tmp_path / "warm")
    warm = tw.load(tmp_path / "warm")
    assert [c.token_ids for c in warm.generate(prompts, params)] == found
