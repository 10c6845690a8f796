"""The Triton backend on a GPU: Hugging Face's tokens in float32, torch's numbers for modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.errors import UsageError
from tiny_models import NAMED, PROMPTS, greedy, tiny_model

pytestmark = pytest.mark.gpu
PARAMS = tw.SamplingParams(max_new_tokens=32, ignore_eos=True)
OURS = {"generated", "template", "library"}
# What torch still computes, and why: the choice of experts (topk) has no kernel yet.
IN_TORCH = {"mixtral": {"eager"}}


@pytest.mark.parametrize("name", NAMED)
def test_named_architectures_give_the_tokens_of_hugging_face(name: str) -> None:
    model = tiny_model(name)
    engine = tw.compile(model, backend="triton")
    assert not engine.target.is_cpu and engine.report()["aten"] == []
    assert set(engine.report()["calls"]) <= OURS | IN_TORCH.get(name, set())
    found = [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]
    assert found == [greedy(model, prompt, 32) for prompt in PROMPTS]
    ids = torch.tensor([PROMPTS[-1]])
    with torch.no_grad():
        torch.testing.assert_close(engine(ids), model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_decode_is_one_replay_whose_memory_is_known(name: str) -> None:
    engine = tw.compile(tiny_model(name), backend="triton", max_batch_size=8)
    alone = engine.generate(PROMPTS[:1], PARAMS)[0].token_ids
    assert engine.executor.graphs.captured.keys() == {1}
    assert engine.generate([*PROMPTS, *PROMPTS], PARAMS)[0].token_ids == alone
    assert engine.executor.graphs.captured.keys() == {1, 8}
    assert 0 < engine.executor.graphs.bytes < 1 << 28


def test_a_saved_engine_gives_the_same_tokens(tmp_path) -> None:
    engine = tw.compile(tiny_model("qwen3"), backend="triton")
    expected = [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]
    engine.save(tmp_path / "engine")
    loaded = tw.load(tmp_path / "engine")
    assert [c.token_ids for c in loaded.generate(PROMPTS, PARAMS)] == expected


def test_an_engine_for_another_gpu_is_made_anew_with_a_note(tmp_path) -> None:
    model = tiny_model("llama")
    engine = tw.compile(model, target="a100", backend="triton", verify="off")
    engine.save(tmp_path / "engine")
    with pytest.warns(UserWarning, match=r"compiled for a100 \(sm_80\).*anew for h"):
        loaded = tw.load(tmp_path / "engine")
    found = loaded.generate(PROMPTS[:1], PARAMS)[0].token_ids
    assert found == greedy(model, PROMPTS[0], 32)


def test_one_compile_serves_a_range_of_sizes() -> None:
    layers = [nn.Linear(24, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 24)]
    module = nn.Sequential(*layers).eval().cuda()
    batch = torch.export.Dim("batch", min=1, max=4096)
    engine = tw.compile(module, (torch.randn(3, 24).cuda(),), dynamic_shapes=({0: batch},))
    for size in (1, 2, 7, 64, 1000, 4096):
        x = torch.randn(size, 24, device="cuda")
        torch.testing.assert_close(engine(x), module(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="from 1 to 4096"):
        engine(torch.randn(4097, 24, device="cuda"))


def test_inputs_that_are_strided_or_unaligned_give_the_same() -> None:
    module = nn.Sequential(nn.LayerNorm(24), nn.SiLU()).eval().cuda()
    engine = tw.compile(module, (torch.randn(5, 24).cuda(),))
    wide = torch.randn(5, 48, device="cuda")
    for x in (wide[:, ::2], wide[:, 1:25], torch.randn(121, device="cuda")[1:].view(5, 24)):
        torch.testing.assert_close(engine(x), module(x), rtol=1e-5, atol=1e-5)
