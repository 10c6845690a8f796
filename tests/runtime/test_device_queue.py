"""What a step asks of the driver: directly where that can be, else through torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tilewright.errors import EngineError
from tilewright.runtime import device_queue
from tilewright.runtime.device_queue import CudaQueue, Noted


class Driver:
    """The two calls, and what they are asked, with handles that are told from integers."""

    CUdeviceptr, CUstream = lambda self, at: ("memory", at), lambda self, raw: ("stream", raw)

    def __init__(self):
        self.seen, self.refuses = [], 0

    def cuMemcpyAsync(self, to, of, size, stream):
        self.seen.append(("copy", to, of, size, stream))
        return (self.refuses,)

    def cuEventRecord(self, event, stream):
        self.seen.append(("record", event, stream))
        return (self.refuses,)


class Stream:
    def __init__(self, waited):
        self.wait_stream = waited.append


class Event:
    cuda_event = 5

    def __init__(self):
        self.recorded = []

    def record(self, stream):
        self.recorded.append(stream)


@pytest.fixture
def here(monkeypatch):
    """The thread's device and stream, and who was waited for."""
    found = SimpleNamespace(device=1, stream=7, waited=[], driver=Driver())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: found.device, raising=False)
    raw = "_cuda_getCurrentRawStream"
    monkeypatch.setattr(torch._C, raw, lambda index: found.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(found.waited))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(device_queue, "cuda_driver", lambda: found.driver)
    return found


@pytest.fixture
def queue(here):
    return CudaQueue(torch.device("cuda", 1))


def test_copies_and_events_go_to_the_driver(here, queue):
    queue.join()
    to, of = torch.zeros(3), torch.ones(3)
    queue.copy(to, of)
    event = queue.record(None)
    assert event.recorded and queue.record(event) is event and len(event.recorded) == 1
    places = ("memory", to.data_ptr()), ("memory", of.data_ptr())
    copied = ("copy", *places, 12, ("stream", 7))
    assert here.driver.seen == [copied, ("record", 5, ("stream", 7))] and not to.any()


def test_what_is_noted_of_a_copy_is_not_looked_up_again(here, queue):
    queue.join()
    to, of, noted = torch.zeros(3), torch.ones(3), Noted()
    queue.copy(to, of, noted)
    assert noted.handles == (("memory", to.data_ptr()), ("memory", of.data_ptr()), 12)
    here.stream = 8
    queue.join()
    queue.copy(None, None, noted)
    (first, second), streams = here.driver.seen, [("stream", 7), ("stream", 8)]
    assert first[:-1] == second[:-1] and [first[-1], second[-1]] == streams
    here.driver.refuses = 1
    queue.copy(to, of, noted)
    assert to.tolist() == [1, 1, 1]


def test_another_stream_waits_for_the_one_before(here, queue):
    for stream in (7, 7, 8):
        here.stream = stream
        queue.join()
    queue.copy(torch.zeros(1), torch.ones(1))
    assert len(here.waited) == 1 and here.driver.seen[-1][-1] == ("stream", 8)


@pytest.mark.parametrize("why", ["refused", "another device", "no driver", "not joined"])
def test_else_it_is_torchs_work(here, monkeypatch, why):
    if why == "no driver":

        def missing():
            raise EngineError("k", expected="a", found="b", remedy="c")

        monkeypatch.setattr(device_queue, "cuda_driver", missing)
    here.driver.refuses = int(why == "refused")
    here.device = 0 if why == "another device" else 1
    queue, to, event = CudaQueue(torch.device("cuda", 1)), torch.zeros(3), Event()
    if why != "not joined":
        queue.join()
    queue.copy(to, torch.ones(3))
    assert to.tolist() == [1, 1, 1] and queue.record(event) is event and event.recorded
    assert bool(here.driver.seen) == (why == "refused")


def test_copies_of_other_sizes_or_types_are_refused(here, queue):
    queue.join()
    for other in (torch.ones(4), torch.ones(3, dtype=torch.int32)):
        with pytest.raises(AssertionError):
            queue.copy(torch.zeros(3), other)
    assert not here.driver.seen
