"""One launch for all layers on a GPU: what the graph says, again and again, and its end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tilewright as tw
from persistent_forms import Model, by_interpreter, step_inputs, together
from tilewright.codegen.persistent.decode import PersistentDecode, on_device
from tilewright.codegen.persistent.reading import read_decode
from tilewright.codegen.persistent.source import compile_persistent, persistent_source
from tilewright.codegen.persistent.tiling import Tiling
from tilewright.errors import KernelError
from tilewright.targets import Target
from tiny_models import greedy, tiny_model

pytestmark = pytest.mark.gpu
MODEL = Model(width=256, heads=8, kv_heads=2, dim=32, ffn=640, vocab=1000, page=16)
PAGES = [5, 3, 1, 2, 4, 6, 7, 0]


@pytest.fixture(scope="module")
def graph():
    return MODEL.graph()


def decoder(
    graph, tensors: dict[str, torch.Tensor], limit: int, batch: int = 1
) -> PersistentDecode:
    target = Target.detect()
    shape = read_decode(graph)
    tiling = Tiling(rows=4, num_warps=4, ahead=2, splits=4, block_n=16, programs=target.sms)
    tiling = replace(tiling, batch=batch)
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
    # Programs that have no part in call 3 wait for call 4 as long: either is the first to give up.
    with pytest.raises(KernelError, match=r"call [34] of 12 .* expected 32 arrivals"):
        ours.check()
    ours.reset()
    for _ in range(1000):
        ours.run(inputs, tensors)
    ours.check()


def test_several_sequences_are_computed_together(graph) -> None:
    tensors = MODEL.tensors(4, 3 * len(PAGES))
    there = on_gpu(tensors)
    ours = decoder(graph, there, 1 << 20, batch=4)
    tables = [[page + len(PAGES) * (i % 3) for page in PAGES[:7]] for i in range(3)]
    steps = [(tables[0], 40, 3), (tables[1], 1, 600), (tables[2], 90, 9), (tables[2], 90, 9)]
    inputs = together([step_inputs(*step, MODEL.page) for step in steps])
    expected = by_interpreter(graph, tensors, inputs)
    for _ in range(20):
        ours.run(on_gpu(inputs), there)
    ours.check()
    logits = expected["logits"].float()
    torch.testing.assert_close(ours.logits.float().cpu(), logits, rtol=0.05, atol=0.06)
    assert torch.equal(ours.tokens, ours.logits.float().argmax(1))


def test_an_engine_generates_with_it_what_hugging_face_does() -> None:
    model = tiny_model("llama").bfloat16()
    options = {"max_model_len": 64, "max_batch_size": 4, "tune": "none", "backend": "triton"}
    params = tw.SamplingParams(max_new_tokens=4)
    prompts = [[136, 114], [108, 150], [38, 0]]  # best logits are at least 0.34 apart
    wanted = [greedy(model, prompt, 4) for prompt in prompts]
    for decode in ("persistent", "persistent:4"):  # 3 sequences are padded to 4
        engine = tw.compile(model, target="auto", decode=decode, **options)
        assert [engine.generate([one], params)[0].token_ids for one in prompts] == wanted
        assert [found.token_ids for found in engine.generate(prompts, params)] == wanted
