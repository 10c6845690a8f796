"""Loading weights straight to a device, in parallel: reading, drawing and laying out at once.

Each weight's tensor is made on the device first; then threads take pieces of the work (a part of a
concatenation, a chunk of random numbers) and write them where they belong.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition

import torch

from ..errors import CapacityError
from ..formats.checkpoint import LazyTensor
from ..formats.gguf import GGUFTensor
from ..formats.safetensors import SafetensorsTensor
from ..formats.weight_base import Leaf, Placement, Weight
from ..formats.weights import Held, Stored, weight_leaves
from ..targets import available_cores
from .image import LoadableWeight
from .staging import placement

HOST_BYTES = 2**31
"""Host memory that pieces of the work may hold at once; a larger piece is worked on alone."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading the weights took.

    Attributes:
        bytes_read: stored bytes of the tensors that were read from files, each once. On a CPU they
            may still be mapped, and not read.
        bytes_placed: bytes of all weights on the device.
        seconds: of it all.
    """

    bytes_read: int
    bytes_placed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """Weights on their device.

    Attributes:
        tensors: by name, contiguous; one expression under two names is one tensor. Not to be
            written to: on a CPU they may be a file's memory.
        report: what it took.
    """

    tensors: dict[str, torch.Tensor]
    report: LoadReport


def load_weights(
    weights: Mapping[str, LoadableWeight], device: torch.device
) -> dict[str, torch.Tensor]:
    """The tensors of `place_weights`."""
    return place_weights(weights, device).tensors


def place_weights(
    weights: Mapping[str, LoadableWeight], device: torch.device, threads: int | None = None
) -> LoadedWeights:
    """Evaluates weights and brings them to a device.

    Args:
        weights: expressions, or tensors of a file, by name.
        device: a CPU or a CUDA device.
        threads: how many work; by default one a processor core. The values do not depend on it.

    Raises:
        CapacityError: they do not fit the device's memory.
        CheckpointError: a file is damaged.
    """
    started = time.perf_counter()
    device = _numbered(device)
    expressions = {name: _expression(weight) for name, weight in weights.items()}
    distinct = list({id(weight): weight for weight in expressions.values()}.values())
    placed = sum(_bytes(weight) for weight in distinct)
    _check_room(placed, device)
    try:
        tensors = _evaluate(distinct, device, threads or available_cores())
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(m in str(error) for m in _EXHAUSTED):
            raise
        raise _no_room(placed, device, _free_bytes(device)) from error
    report = LoadReport(_bytes_read(distinct), placed, time.perf_counter() - started)
    return LoadedWeights({name: tensors[id(e)] for name, e in expressions.items()}, report)


_EXHAUSTED = ("can't allocate memory", "out of memory")  # torch, on a CPU and on a GPU


def _numbered(device: torch.device) -> torch.device:
    """The device with its index: the current GPU is another in each thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass(frozen=True, slots=True, eq=False)
class _File(Leaf):
    """A tensor of the engine's own files, as an expression."""

    tensor: LazyTensor
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.tensor.shape))
        object.__setattr__(self, "dtype", self.tensor.dtype)

    def read(self) -> torch.Tensor:
        return self.tensor.load()


def _expression(weight: LoadableWeight) -> Weight:
    if isinstance(weight, Weight):
        return weight
    return _File(weight) if isinstance(weight, LazyTensor) else Held(weight.load(), "")


@dataclass(frozen=True, slots=True)
class _Job:
    """A piece of the work: what to run, the bytes it writes, and the host memory it holds."""

    run: Callable[[Placement], None]
    written: int
    held: int


def _evaluate(weights: list[Weight], device: torch.device, threads: int) -> dict[int, torch.Tensor]:
    """The tensors by `id` of their expressions."""
    found: dict[int, torch.Tensor] = {}
    jobs = [job for weight in weights for job in _jobs(weight, device, found)]
    # The largest first: none is left to a single thread at the end.
    queue = deque(sorted(jobs, key=lambda job: -job.written))
    budget = _Budget(HOST_BYTES)
    places = [placement(device) for _ in range(min(threads, len(jobs)))]
    if len(places) <= 1:
        for place in places:
            _work(place, queue, budget)
    else:
        intra_op = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(len(places), "weights", torch.set_num_threads, (1,)) as pool:
                for done in [pool.submit(_work, place, queue, budget) for place in places]:
                    done.result()
        finally:
            torch.set_num_threads(intra_op)  # threads made later take the last number set anywhere
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the threads' streams held for operands
    return found


def _jobs(weight: Weight, device: torch.device, found: dict[int, torch.Tensor]) -> Iterator[_Job]:
    """The work of one weight; its tensor is, or will be, in `found`."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    pieces = list(weight.pieces(out))
    if device.type == "cpu" and pieces[0][0] is weight:
        yield _Job(_loading(weight, found), _bytes(weight), _held_bytes(weight))
        return
    found[id(weight)] = out
    for part, region in pieces:
        yield _Job(_writing(part, region), region.nbytes, _held_bytes(part))


def _loading(weight: Weight, found: dict[int, torch.Tensor]) -> Callable[[Placement], None]:
    """On the host a weight of one piece need not be copied: it may stay a file's memory."""

    def run(place: Placement) -> None:
        found[id(weight)] = weight.load()

    return run


def _writing(part: Weight, region: torch.Tensor) -> Callable[[Placement], None]:
    return lambda place: part.write(region, place)


def _work(place: Placement, queue: deque[_Job], budget: _Budget) -> None:
    """Does jobs until none is left, or one has failed."""
    with torch.no_grad(), place.scope():
        while True:
            try:
                job = queue.popleft()
            except IndexError:
                return
            try:
                budget.take(job.held)
                try:
                    job.run(place)
                finally:
                    budget.give(job.held)
            except BaseException:
                queue.clear()
                raise


class _Budget:
    """Bytes that may be in use at once; whoever wants more than there is waits to be alone."""

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._changed = Condition()

    def take(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + count <= self._total)
            self._used += count

    def give(self, count: int) -> None:
        with self._changed:
            self._used -= count
            self._changed.notify_all()


def _bytes(weight: Weight | LazyTensor) -> int:
    return math.prod(weight.shape) * weight.dtype.itemsize


def _held_bytes(weight: Weight) -> int:
    """Host memory that evaluating it holds at most: its leaves, unless mapped, and itself."""
    leaves = sum(0 if _is_mapped(leaf) else _bytes(leaf) for leaf in weight_leaves(weight))
    return leaves if isinstance(weight, Leaf) else leaves + _bytes(weight)


def _is_mapped(leaf: Weight) -> bool:
    return isinstance(_stored(leaf), SafetensorsTensor)


def _stored(leaf: Weight) -> LazyTensor | None:
    """The tensor of a file behind a leaf."""
    if isinstance(leaf, Stored) and leaf.checkpoint.files():
        return leaf.checkpoint.tensor(leaf.name)
    return leaf.tensor if isinstance(leaf, _File) else None


def _bytes_read(weights: list[Weight]) -> int:
    leaves = {leaf for weight in weights for leaf in weight_leaves(weight)}
    tensors = [tensor for leaf in leaves if (tensor := _stored(leaf)) is not None]
    return sum(t.blocks.nbytes if isinstance(t, GGUFTensor) else _bytes(t) for t in tensors)


def _free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that new tensors can take; None for a CPU, which may swap."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused


def _check_room(needed: int, device: torch.device) -> None:
    free = _free_bytes(device)
    if free is not None and needed > free:
        raise _no_room(needed, device, free)


def _no_room(needed: int, device: torch.device, free: int | None) -> CapacityError:
    return CapacityError(
        f"weights on {device}",
        expected=f"memory for {needed} bytes of weights ({needed / 1e9:.1f} GB)",
        found="too little" if free is None else f"{free} bytes free ({free / 1e9:.1f} GB)",
        remedy="Free memory that other processes hold, compile in a smaller dtype, take a smaller "
        "model, or choose another device.",
    )
