"""Engines from several threads: each has its own CUDA state, and some have none yet."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import tilewright as tw
from tiny_models import PROMPTS, greedy, tiny_model

pytestmark = pytest.mark.gpu


def _in_thread(work) -> list:
    found: list = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found


def test_the_first_cuda_call_of_a_thread_may_be_a_kernel_of_ours() -> None:
    module = nn.Sequential(nn.LayerNorm(32), nn.SiLU()).eval().cuda()
    x = torch.randn(5, 32, device="cuda")
    engine = tw.compile(module, (x,), backend="triton")
    expected = engine(x)
    for _ in range(3):
        (found,) = _in_thread(lambda: engine(x))
        torch.testing.assert_close(found, expected)


def test_threads_share_an_engine_and_its_graphs() -> None:
    model = tiny_model("llama")
    engine = tw.compile(model, backend="triton")
    params = tw.SamplingParams(max_new_tokens=12, ignore_eos=True)
    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        results[index] = engine.generate([PROMPTS[index]], params)[0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {i: greedy(model, prompt, 12) for i, prompt in enumerate(PROMPTS)}
    assert results == expected
