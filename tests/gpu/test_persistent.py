"""One launch for all layers on a GPU: what the graph says, again and again, and its end."""

from __future__ import annotations

import pytest
import torch

from persistent_forms import Model, by_interpreter, step_inputs
from tilewright.codegen.persistent.decode import PersistentDecode, on_device
from tilewright.codegen.persistent.generate import Tiling
from tilewright.codegen.persistent.reading import read_decode
from tilewright.codegen.persistent.source import compile_persistent, persistent_source
from tilewright.errors import KernelError
from tilewright.targets import Target

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
    inputs = {name: t.cuda() for name, t in step_inputs(PAGES, 1, 0, MODEL.page).items()}
    launch = on_device(source, binary, torch.device("cuda"))
    return PersistentDecode(shape, tiling, tensors, tensors, inputs, launch, limit=limit)


def test_steps_in_a_row_are_those_of_the_graph(graph) -> None:
    tensors = MODEL.tensors(1, len(PAGES))
    ours = decoder(graph, {name: t.cuda() for name, t in tensors.items()}, 1 << 20)
    for length in range(1, 100, 7):
        inputs = step_inputs(PAGES, length, 3 + length, MODEL.page)
        for name, value in inputs.items():
            ours.memory[name].copy_(value)
        expected = by_interpreter(graph, tensors, inputs)
        for _ in range(20):  # the same step again writes the same
            ours.run()
        ours.check()
        logits = expected["logits"][0].float()
        torch.testing.assert_close(ours.logits.float().cpu(), logits, rtol=0.05, atol=0.06)
        for name in tensors:
            if name in expected:
                tensors[name] = expected[name]


def test_a_launch_that_waits_in_vain_ends(graph) -> None:
    tensors = {name: t.cuda() for name, t in MODEL.tensors(2, len(PAGES)).items()}
    ours = decoder(graph, tensors, 1000)
    ours.memory["counters"][32 * 4] -= 1
    ours.run()
    torch.cuda.synchronize()
    with pytest.raises(KernelError, match="call 3 of"):
        ours.check()
    ours.reset()
    for _ in range(1000):
        ours.run()
    ours.check()
