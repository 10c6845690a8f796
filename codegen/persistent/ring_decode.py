"""A model's ring with its memory: one launch a step of one sequence."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ...errors import KernelError, UsageError
from ..triton.package import Binary
from ..triton.source import KernelSource
from ..triton.tensor_map import Mapped
from .decode import LIMIT, CacheTables, check_memory
from .reading import Shape
from .ring import GROUP, SPLITS, Ring, Rows, ring_of, step_weights
from .ring_source import POINTERS, RingCut
from .trace import MARKS, StepTrace, trace_of

PLACES = 12
"""Numbers that the table has of a layer: the first lines of its four products' weights, and the
addresses of both norms' weights, keys and values, and the products' scales. The last row has the
first line of the last product, and the addresses of its norm's weight and of the embedding.
"""
RingLauncher = Callable[[Sequence[torch.Tensor | Mapped | int]], None]


class RingDecode:
    """The decode step of a model for one sequence, in one launch.

    Args:
        shape, cut: what was compiled.
        weights: by name, contiguous and 16-byte aligned, on the device.
        launch: launches the kernel over its arguments (`ring_on_device`).
        device: where all of it lies.
        timed: whether the kernel notes times.
        limit: looks of a wait until a launch is given up.

    Attributes:
        logits: bf16[1, V] of the last step; NaN after a launch that was given up.
        memory: what the kernel keeps for itself, by name.

    Raises:
        UsageError: a weight that is missing or not dense.
    """

    def __init__(
        self,
        shape: Shape,
        cut: RingCut,
        weights: Mapping[str, torch.Tensor],
        launch: RingLauncher,
        device: torch.device,
        timed: bool = False,
        limit: int = LIMIT,
    ) -> None:
        self.shape, self.limit, self.device, self._launch = shape, limit, device, launch
        self.ring, self._timed = ring_of(shape), timed
        self._names = step_weights(shape)
        read = (name for names in self._names.values() for name in names if name)
        for name in (*read, shape.inv_freq):
            check_memory(name, weights.get(name))
        self._weights = _in_lines(self.ring, self._names, weights)
        self._first, self._lines = _span(self.ring, self._names, self._weights)
        self._maps = [self._map(rows) for rows in self.ring.rows]
        self.memory = {name: one.to(device) for name, one in _memory(self.ring, cut, timed).items()}
        self.logits = self.memory["logits"]
        self._tables = CacheTables(shape, device, self._table)
        self.reset()

    @property
    def tokens(self) -> torch.Tensor:
        """i64[1], the likeliest token, -1 where logits are not finite."""
        best = self.logits.float().argmax(1)
        return torch.where(self.logits.isfinite().all(1), best, -1)

    def run(self, inputs: Mapping[str, torch.Tensor], caches: Mapping[str, torch.Tensor]) -> None:
        """Queues a step, as `PersistentDecode.run` does.

        Raises:
            UsageError: a cache that is missing or not dense.
            KernelError: caches at addresses that are new, while a CUDA graph is captured.
        """
        weights = {"inv_freq": self._weights[self.shape.inv_freq]}
        given = {**self.memory, **inputs, **weights, "places": self._tables.at(caches)}
        self._launch([*self._maps, *(given[name] for name in POINTERS), self.limit])

    def _map(self, rows: Rows) -> Mapped:
        lines = (self._lines, rows.unit)
        return Mapped(self._first, 0, lines, (rows.unit, 1), (rows.box, rows.unit), 0)

    def _table(self, caches: Mapping[str, int]) -> torch.Tensor:
        start = self._first.data_ptr()
        return make_places(self.ring, self._names, self._weights, list(caches.values()), start)

    def check(self) -> None:
        """Waits for the device.

        Raises:
            KernelError: a launch was given up, since programs waited in vain.
        """
        given_up, call = self.memory["diagnosis"][:2].tolist()
        if not given_up:
            return
        step = self.shape.calls[1 + call]
        raise KernelError(
            f"call {call} of {self.ring.calls} of the ring of weights "
            f"({type(self.shape.form(step)).__name__} of {step.weight or step.x})",
            expected=f"what it reads to be there within {self.limit} looks",
            found="nothing",
            remedy="Report it, then call reset(); the decode graph has a launch for each call.",
        )

    def trace(self, title: str) -> StepTrace:
        """When each program met, began and ended each call of the last step, and on which
        multiprocessor. Waits for the device.

        Raises:
            UsageError: the kernel notes no times.
        """
        if not self._timed:
            raise UsageError(
                "trace of the ring of weights",
                expected="a kernel that notes times",
                found="one that does not",
                remedy="Make source and RingDecode with timed=True.",
            )
        marks = since_first(self.memory["times"].cpu())
        steps = self.shape.calls[1:]
        return trace_of(title, self.shape, steps, marks, self.memory["homes"])

    def reset(self) -> None:
        """Makes the memory new, after a launch that was given up or cut off: nothing is there."""
        self.memory["memory"].view(torch.int16).fill_(-1)
        self.memory["partials"].view(torch.int32).fill_(-1)
        self.memory["counters"].zero_()
        self.memory["diagnosis"].copy_(torch.tensor([0, self.ring.calls]))


def ring_on_device(source: KernelSource, binary: Binary, device: torch.device) -> RingLauncher:
    """Launches of a binary on torch's current stream.

    Raises:
        EngineError: the driver does not take it.
    """
    from ..triton.launch import LoadedFunction, enter_context

    (launch,) = source.variants[0].launches
    function = LoadedFunction.of(binary, device)
    programs = launch.grid[0]
    assert isinstance(programs, int)

    def run(arguments: Sequence[torch.Tensor | Mapped | int]) -> None:
        values: list[bytes | int] = []
        for argument in arguments:
            if isinstance(argument, Mapped):
                values += argument.values(partial(enter_context, device))
            else:
                values.append(
                    argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
                )
        function((programs, 1, 1), values)

    return run


def make_places(
    ring: Ring,
    names: Mapping[str, Sequence[str]],
    weights: Mapping[str, torch.Tensor],
    caches: Sequence[int],
    start: int,
) -> torch.Tensor:
    """i64 [layers + 1, PLACES]: where a model's memory lies.

    Args:
        names: of weights, as `step_weights` has them.
        caches: addresses of each layer's keys and values.
        start: of the first line.
    """
    table = torch.zeros(ring.layers + 1, PLACES, dtype=torch.int64)
    line = 2 * ring.unit
    for layer in range(ring.layers):
        of_layer = names[f"layer {layer}"]
        found = [weights[name].data_ptr() if name else 0 for name in of_layer]
        firsts = [(address - start) // line for address in found[:4]]
        row = [*firsts, *found[4:6], *caches[2 * layer : 2 * layer + 2], *found[6:]]
        table[layer] = torch.tensor(row)
    head, *others = (weights[name].data_ptr() for name in names["end"])
    table[-1, :3] = torch.tensor([(head - start) // line, *others])
    return table


def since_first(times: torch.Tensor) -> torch.Tensor:
    """i64 [programs, calls, 3] ns since the first mark, of the low 32 bits of a clock; who has no
    part in a call begins it when it meets it.
    """
    marks = times.long() - int(times.flatten()[0])
    marks = (marks + (1 << 31)) % (1 << 32) - (1 << 31)
    met, begun, done = marks.unbind(2)
    marks[:, :, MARKS.index("begun")] = torch.where((met <= begun) & (begun <= done), begun, met)
    return marks - marks.min()


def _in_lines(
    ring: Ring, names: Mapping[str, Sequence[str]], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights, those of products a multiple of the map's lines from each other: where one is
    not, as a view of somebody's memory may be, a copy stands for it.
    """
    line = 2 * ring.unit
    products = _products(names)
    usual = Counter(weights[name].data_ptr() % line for name in products).most_common(1)[0][0]
    between = [name for name in products if weights[name].data_ptr() % line != usual]
    if between:
        size = sum(weights[name].nbytes for name in between)
        warnings.warn(
            f"{len(between)} weights ({size / 1e6:.0f} MB, {between[0]} first) do not lie a "
            f"multiple of {line} bytes from the others, as one launch for all layers reads them: "
            "it has copies of its own. decode='kernels' needs none.",
            stacklevel=2,
        )
    return {**weights, **{name: _copied(weights[name], usual, line) for name in between}}


def _products(names: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for layer, some in names.items() for name in some[: 4 if layer != "end" else 1]]


def _copied(tensor: torch.Tensor, rest: int, line: int) -> torch.Tensor:
    """A copy whose address leaves such a rest."""
    room = torch.empty(tensor.nbytes + line, dtype=torch.uint8, device=tensor.device)
    begin = (rest - room.data_ptr()) % line
    place = room[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor)


def _span(
    ring: Ring, names: Mapping[str, Sequence[str]], weights: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """The weight of a product that lies first, and lines from there to the end of the last."""
    found = [weights[name] for name in _products(names)]
    first = min(found, key=torch.Tensor.data_ptr)
    end = max(tensor.data_ptr() + tensor.nbytes for tensor in found)
    lines = first.flatten().view(torch.bfloat16)  # of whatever there is, 2 bytes at a time
    return lines, (end - first.data_ptr()) // (2 * ring.unit)


def _memory(ring: Ring, cut: RingCut, timed: bool) -> dict[str, torch.Tensor]:
    """What the kernel keeps for itself, not yet filled."""
    attention = ring.attention
    part = GROUP * attention.head_dim + GROUP
    return {
        "memory": torch.empty(2, ring.layers, ring.layer_values, dtype=torch.bfloat16),
        "partials": torch.empty(4, attention.kv_heads, SPLITS, part),
        "logits": torch.zeros(1, ring.vocab, dtype=torch.bfloat16),
        "times": torch.zeros(cut.programs, ring.calls * timed, len(MARKS), dtype=torch.int32),
        "homes": torch.zeros(cut.programs, dtype=torch.int32),
        "counters": torch.zeros(2, dtype=torch.int32),
        "diagnosis": torch.zeros(2, dtype=torch.int32),
    }
