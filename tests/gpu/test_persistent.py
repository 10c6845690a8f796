"""One launch for all layers on a GPU: what the graph says, again and again, and its end."""

from __future__ import annotations

import pytest
import torch

import tilewright as tw
from persistent_forms import Model, by_interpreter, step_inputs
from tilewright.codegen.persistent.decode import PersistentDecode, on_device
from tilewright.codegen.persistent.generate import Tiling
from tilewright.codegen.persistent.reading import read_decode
from tilewright.codegen.persistent.source import compile_persistent, persistent_source
from tilewright.errors import KernelError
from tilewright.targets import Target
from tiny_models import greedy, tiny_model

pytestmark = pytest.mark.gpu
MODEL = Model(width=256, heads=8, kv_heads=2, dim=32, ffn=640, vocab=1000, page=16)
PAGES = [5, 3, 1, 2, 4, 6, 7, 0]


@pytest.fixture(scope="module")
def graph():
    return MODEL.graph()


def decoder(graph, tensors: dict[str, torch.Tensor], limit: int) -> PersistentDecode:
    target = Target.detect()
    shape = read_decode(graph)
    tiling = Tiling(rows=4, num_warps=4, ahead=2, splits=4, block_n=16, programs=target.sms)
    source = persistent_source(shape, tiling)
    (binary,) = compile_persistent([source], target.arch)
    device = torch.device("cuda")
    launch = on_device(source, binary, device)
    return PersistentDecode(shape, tiling, tensors, launch, device, limit=limit)


def on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def test_steps_in_a_row_are_those_of_the_graph(graph) -> None:
    tensors = MODEL.tensors(1, len(PAGES))
    there = on_gpu(tensors)
    ours = decoder(graph, there, 1 << 20)
    for length in range(1, 100, 7):
        inputs = step_inputs(PAGES, length, 3 + length, MODEL.page)
        expected = by_interpreter(graph, tensors, inputs)
        given = on_gpu(inputs)
        for _ in range(20):  # the same step again writes the same
            ours.run(given, there)
        ours.check()
        logits = expected["logits"].float()
        torch.testing.assert_close(ours.logits.float().cpu(), logits, rtol=0.05, atol=0.06)
        for name in tensors:
            if name in expected:
                tensors[name] = expected[name]
                torch.testing.assert_close(there[name].cpu(), expected[name], rtol=0.02, atol=0.04)


def test_a_captured_step_replays(graph) -> None:
    tensors = on_gpu(MODEL.tensors(3, len(PAGES)))
    ours = decoder(graph, tensors, 1 << 20)
    inputs = on_gpu(step_inputs(PAGES, 40, 9, MODEL.page))
    recorded = torch.cuda.CUDAGraph()
    with pytest.raises(KernelError, match="before the capture"), torch.cuda.graph(recorded):
        ours.run(inputs, tensors)
    ours.run(inputs, tensors)
    ours.check()
    logits = ours.logits.clone()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        ours.run(inputs, tensors)
    for _ in range(2000):
        recorded.replay()
    ours.check()
    assert torch.equal(ours.logits, logits)  # sums have one order: the same bits each time


def test_a_launch_that_waits_in_vain_ends(graph) -> None:
    tensors = on_gpu(MODEL.tensors(2, len(PAGES)))
    inputs = on_gpu(step_inputs(PAGES, 3, 1, MODEL.page))
    ours = decoder(graph, tensors, 1000)
    ours.memory["counters"][32 * 4] -= 1
    ours.run(inputs, tensors)
    torch.cuda.synchronize()
    assert ours.logits.isnan().any()
    with pytest.raises(KernelError, match="call 3 of"):
        ours.check()
    ours.reset()
    for _ in range(1000):
        ours.run(inputs, tensors)
    ours.check()


def test_an_engine_generates_the_same_tokens_with_it() -> None:
    model = tiny_model("llama").bfloat16()
    options = {"target": "auto", "max_model_len": 64, "max_batch_size": 2, "tune": "none"}
    params = tw.SamplingParams(max_new_tokens=12)
    prompts = [[136, 114], [108, 150, 3]]
    alone, together = [], []
    for decode in ("kernels", "persistent"):
        engine = tw.compile(model, backend="triton", decode=decode, verify="sample", **options)
        alone.append([engine.generate([prompt], params)[0].token_ids for prompt in prompts])
        together.append([found.token_ids for found in engine.generate(prompts, params)])
    assert alone[0][0][:4] == greedy(model, prompts[0], 4)  # its best logits are 0.34 apart
    assert alone[1][0][:4] == alone[0][0][:4]
    assert together[0] == together[1]  # two sequences are served by the same kernels
