"""The order in which a device works: what was queued first is done first, and the host goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..codegen.triton.launch import cuda_driver
from ..errors import EngineError


class Event(Protocol):
    """A place in a queue."""

    def synchronize(self) -> None:
        """Waits until all that was queued before it is done."""
        ...


class Replayable(Protocol):
    """Recorded work, such as a CUDA graph."""

    def replay(self) -> None:
        """Queues it once more."""
        ...


class Noted:
    """What a queue knows of two pieces of memory that are copied again and again."""

    __slots__ = ("handles",)

    def __init__(self) -> None:
        self.handles: tuple[Any, Any, int] | None = None  # as the driver takes them


class DeviceQueue(Protocol):
    """Queues work for a device. No method waits for it."""

    def join(self) -> None:
        """Puts what follows, here and in torch's current stream, behind all that was queued: to be
        called before a step is queued, or anything else that touches its memory."""
        ...

    def copy(self, destination: Tensor, source: Tensor, noted: Noted | None = None) -> None:
        """Copies between host (pinned) and device memory, both dense and of one type and size; the
        host's must stay as it is until an event behind it has come. What is `noted` belongs to
        these two."""
        ...

    def gather(self, destination: Tensor, source: Tensor, rows: Tensor) -> None:
        """destination[i] = max(source[rows[i]], 0), for token ids i64 on the device."""
        ...

    def replay(self, graph: Replayable) -> None:
        """Replays recorded work."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Queues what torch functions queue that do not wait for the device."""
        ...

    def record(self, event: Event | None) -> Event:
        """An event behind all that was queued: the one given, set anew, or a new one."""
        ...


class CudaQueue:
    """The current stream of the thread; a change of streams between two steps is ordered too.

    What each step asks for goes to the driver as it is: through torch, a copy takes the host 15 µs
    and an event 7, of which the driver takes 3 and 1. Where the driver cannot be called, or refuses
    (a thread that has not worked with the device yet), torch is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._stream: torch.cuda.Stream | None = None
        self._raw: int | None = None  # the same, as the driver has it
        self._handle: Any = None  # and as it takes it: other integers are converted at each call
        self._known = _driver()
        self._driver: Any = None  # that one, while the thread's device is this one

    def join(self) -> None:
        raw = torch._C._cuda_getCurrentRawStream(self._index)
        if raw != self._raw:
            current = torch.cuda.current_stream(self._device)
            if self._stream is not None:
                current.wait_stream(self._stream)
            self._stream, self._raw = current, raw
            self._handle = None if self._known is None else self._known.CUstream(raw)
        here = torch._C._cuda_getDevice() == self._index
        self._driver = self._known if here else None

    def copy(self, destination: Tensor, source: Tensor, noted: Noted | None = None) -> None:
        if self._driver is not None:
            handles = None if noted is None else noted.handles
            if handles is None:
                handles = self._handles(destination, source)
                if noted is not None:
                    noted.handles = handles
            (refused,) = self._driver.cuMemcpyAsync(*handles, self._handle)
            if not refused:
                return
        destination.copy_(source, non_blocking=True)

    def _handles(self, destination: Tensor, source: Tensor) -> tuple[Any, Any, int]:
        size, pointer = source.nbytes, self._known.CUdeviceptr
        assert destination.nbytes == size and source.dtype is destination.dtype
        return pointer(destination.data_ptr()), pointer(source.data_ptr()), size

    def gather(self, destination: Tensor, source: Tensor, rows: Tensor) -> None:
        torch.index_select(source, 0, rows, out=destination)
        destination.clamp_(min=0)

    def replay(self, graph: Replayable) -> None:
        graph.replay()

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self, event: Any) -> Event:
        if event is None:
            event = torch.cuda.Event()
        elif self._driver is not None:
            (refused,) = self._driver.cuEventRecord(event.cuda_event, self._handle)
            if not refused:
                return cast(Event, event)
        event.record(self._stream)
        return cast(Event, event)


def _driver() -> Any:
    try:
        return cuda_driver()
    except EngineError:  # not installed: engines without kernels of ours do without
        return None


class ImmediateQueue:
    """The CPU as a device: all is done at once."""

    def join(self) -> None:
        pass

    def copy(self, destination: Tensor, source: Tensor, noted: Noted | None = None) -> None:
        destination.copy_(source)

    def gather(self, destination: Tensor, source: Tensor, rows: Tensor) -> None:
        destination.copy_(source.index_select(0, rows).clamp_(min=0))

    def replay(self, graph: Replayable) -> None:
        graph.replay()

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self, event: Event | None) -> Event:
        return _COME


class _Come:
    def synchronize(self) -> None:
        pass


_COME = _Come()
