"""Rows of a form on a GPU: sampled by a graph, with the tokens of the same work done step by step;
and the queue's calls of the driver.
"""

from __future__ import annotations

import threading

import pytest
import torch

import tilewright as tw
from tilewright.runtime.device_queue import CudaQueue
from tiny_gguf import write_tiny_gguf

pytestmark = [pytest.mark.gpu]
FORM = tw.StructuredOutputsParams(regex="([a-z]{1,6} ){3,9}(the quick brown fox jumps|stop)")
PROMPTS = ["the quick brown fox", "the lazy dog runs away from", "fox"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> tw.Engine:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return tw.compile(path, backend="triton", max_batch_size=16)


def tokens_of(engine, given):
    form = tw.SamplingParams(structured_outputs=FORM, seed=3, max_new_tokens=40, **given)
    free = tw.SamplingParams(seed=4, max_new_tokens=40, ignore_eos=True, **given)
    found = engine.generate(PROMPTS, [form, free, form])
    return [one.token_ids for one in found]


@pytest.mark.usefixtures("left_idle")
@pytest.mark.parametrize("given", [{}, {"temperature": 1.0}, {"temperature": 1.3, "top_k": 20}])
def test_the_graph_chooses_as_its_work_does(given, engine, monkeypatch) -> None:
    graphs = engine.executor.graphs
    found = tokens_of(engine, given)
    assert any(one.choice is not None for one in graphs.captured.values())
    assert tokens_of(engine, given) == found  # by the graphs that the first time has captured
    kept = [(one, one.choice) for one in graphs.captured.values()]
    for one, _ in kept:
        one.choice = None
    with monkeypatch.context() as patch:
        patch.setattr(type(graphs._masked._graphs), "capture", lambda self, work: (None, None))
        assert tokens_of(engine, given) == found
    for one, choice in kept:
        one.choice = choice


@pytest.mark.usefixtures("left_idle")
def test_no_step_with_a_form_captures_anything_behind_a_warm_up(engine, monkeypatch) -> None:
    graphs = engine.executor.graphs
    wanted = tokens_of(engine, {})
    kept = dict(graphs.captured), dict(graphs.shared)
    graphs.captured.clear()
    graphs.shared.clear()
    engine.warm_up()
    made = [*graphs.captured.values(), *graphs.shared.values()]
    assert made and all(one.choice is not None for one in made)
    with monkeypatch.context() as patch:
        patch.setattr(type(graphs._graphs), "capture", None)
        patch.setattr(engine.executor, "steps", None)
        assert tokens_of(engine, {}) == wanted
    graphs.captured.update(kept[0])
    graphs.shared.update(kept[1])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_copies_are_in_order_on_any_stream_and_thread(elsewhere) -> None:
    queue, seen = CudaQueue(torch.device("cuda", 0)), []
    device = torch.zeros(1 << 20, dtype=torch.int64, device="cuda")
    host, back = (torch.zeros(1 << 20, dtype=torch.int64, pin_memory=True) for _ in range(2))
    host.copy_(torch.arange(1 << 20))

    def work() -> None:
        event = None
        for _ in range(3):
            queue.join()
            queue.copy(device, host)
            device.add_(1)
            queue.copy(back, device)
            event = queue.record(event)
            event.synchronize()
            seen.append(torch.equal(back, host + 1))
        seen.append(queue._driver is not None)

    if elsewhere:
        with torch.cuda.stream(torch.cuda.Stream()):
            work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    work()
    assert seen and all(seen)
