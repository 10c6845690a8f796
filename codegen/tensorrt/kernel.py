"""Runs a region of a Program: its tokens as a batch, by an engine or by the reference of its
layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Protocol, TypeAlias

import torch

from ...errors import EngineError
from ...ir.dims import evaluate as evaluate_size
from ...ir.dims import name_of
from ..base import ReadFile
from ..program import Call, Program
from .evaluate import load_constants, run_layers
from .network import Network, Tensor

Tensors: TypeAlias = "dict[str, torch.Tensor]"
WANTED = "logits_indices"
ALIGNMENT = 256  # bytes


class Run(Protocol):
    """Computes a network."""

    def most(self, name: str, axis: int) -> int:
        """The largest size of an input that goes in one run."""
        ...

    def fits(self, given: Tensors) -> bool:
        """Whether inputs by name go in one run."""
        ...

    def __call__(self, given: Tensors, results: Tensors) -> None:
        """Writes results, by name, of inputs by name."""
        ...


class OwnEngine(bytes):
    """An engine that this process built, with the network that it was built from: nothing that
    comes from a folder is one.
    """

    network: Network

    @classmethod
    def of(cls, engine: bytes, network: Network) -> OwnEngine:
        """The engine's bytes, and the network beside them."""
        own = cls(engine)
        own.network = network
        return own


def load_run(call: Call, read: ReadFile, device: torch.device) -> Run:
    """What computes a region on a device.

    Raises:
        EngineError: TensorRT does not open it, or is missing, or there is no GPU.
    """
    path = call.kernel.split("/", 1)[1]
    engine = read(path)
    if device.type == "cpu" and isinstance(engine, OwnEngine):
        return Reference(engine.network)
    from .session import Session  # looks for TensorRT

    return Session(path, engine, call, device, _learnt(path, read))


def compiled_path(path: str) -> str:
    """Where an engine's kernels lie, once they are compiled for a GPU."""
    return path.removesuffix(".engine") + ".cache"


def _learnt(path: str, read: ReadFile) -> bytes | None:
    try:
        return read(compiled_path(path))
    except KeyError:
        return None


class Reference:
    """A network by the reference of its layers; constants are kept. Caches may be shorter than the
    network's.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.constants = load_constants(network.constants.values())

    def most(self, name: str, axis: int) -> int:
        """There is no limit."""
        return 2**31

    def fits(self, given: Tensors) -> bool:
        """All that a cache has room for."""
        return True

    def __call__(self, given: Tensors, results: Tensors) -> None:
        """Writes the results."""
        lengthened = {t.name: _lengthened(given[t.name], t) for t in self.network.inputs}
        found = run_layers(self.network, {**lengthened, **self.constants})
        for name, result in results.items():
            value = found[name]
            if value.data_ptr() == result.data_ptr():  # a cache is written already
                continue
            if value.numel() > result.numel():  # a longer one is not
                value = value[:, :, : result.shape[2]]
            result.copy_(value.reshape(result.shape))


def _lengthened(x: torch.Tensor, wanted: Tensor) -> torch.Tensor:
    """A cache as long as the network's; other values as they are."""
    short = sum(
        size - found
        for size, found in zip(wanted.shape, x.shape, strict=True)
        if isinstance(size, int)
    )
    return torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x


class RegionKernel:
    """A loaded region: values of tokens, [T, …], are its batch's, [batch, length, …]. What does not
    go in one run goes in several: sequence by sequence, each in pieces.

    Results are fresh tensors, but for caches, which are the operands that they were.
    """

    def __init__(self, call: Call, program: Program, run: Run) -> None:
        self.call, self.run = call, run
        names = call.attrs["inputs"]
        assert isinstance(names, tuple)
        self.names = tuple(map(str, names))
        operands = [program.buffers[name] for name in call.operands if name is not None]
        if len(self.names) != len(call.operands):
            raise EngineError(
                f"call of {call.kernel}",
                expected=f"{len(call.operands)} names of inputs, one an operand",
                found=str(len(self.names)),
                remedy="Compile the model again.",
            )
        self.kinds = [name_of(type_.shape[0]) for type_ in operands]  # T, R or B
        self.results = [program.buffers[name] for name in call.results]
        self.aliases = dict(call.aliases)
        self.longest = self._most("T", 1)  # tokens of a sequence
        self.most_rows = self._most("R", 0)
        self.lock = Lock()  # an execution context holds the operands of one run

    def _most(self, kind: str, axis: int) -> int:
        named = [n for n, own in zip(self.names, self.kinds, strict=True) if own == kind]
        return min((self.run.most(name, axis) for name in named), default=1)

    def artifacts(self) -> Mapping[str, bytes]:
        """The kernels that TensorRT compiled, by path; nothing where it keeps none."""
        learnt = getattr(self.run, "learnt", None)
        found = None if learnt is None else learnt()
        path = compiled_path(self.call.kernel.split("/", 1)[1])
        return {path: found} if found else {}

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        tensors = [tensor for tensor in operands if tensor is not None]
        given = self._given(tensors, sizes["B"])
        found = self._results(tensors, sizes)
        with self.lock:
            if self.run.fits(given):
                self.run(given, self._named(found))
            elif "T" in self.kinds:
                self._in_pieces(tensors, sizes, found)
            else:
                self._in_rows(tensors, sizes, found)
        return found

    def _named(self, results: Sequence[torch.Tensor]) -> Tensors:
        return dict(zip(self.call.results, results, strict=True))

    def _given(self, tensors: Sequence[torch.Tensor], batch: int) -> Tensors:
        """The network's inputs by name; caches are no copies."""
        written = set(self.aliases.values())
        return {
            name: x if i in written else _dense(x.unflatten(0, (batch, -1)) if kind == "T" else x)
            for i, (name, x, kind) in enumerate(zip(self.names, tensors, self.kinds, strict=True))
        }

    def _results(
        self, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]
    ) -> list[torch.Tensor]:
        return [
            tensors[self.aliases[index]]
            if index in self.aliases
            else torch.empty(
                [evaluate_size(size, sizes) for size in type_.shape],
                dtype=type_.dtype.torch,
                device=tensors[0].device,
            )
            for index, type_ in enumerate(self.results)
        ]

    def _in_pieces(
        self, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int], found: list[torch.Tensor]
    ) -> None:
        """Fills in the results, a piece of a sequence at a time: what one writes into the caches,
        the next one reads.
        """
        length = sizes["T"] // sizes["B"]
        for row in range(sizes["B"]):
            for start in range(row * length, (row + 1) * length, self.longest):
                piece = slice(start, min(start + self.longest, (row + 1) * length))
                rows = self._rows_of(tensors, piece)
                part = [self._part(i, x, row, piece, rows) for i, x in enumerate(tensors)]
                counts = {"B": 1, "T": piece.stop - piece.start, "R": max(1, len(rows))}
                results = self._results(part, {**sizes, **counts})
                self.run(self._given(part, 1), self._named(results))
                for index, (whole, result) in enumerate(zip(found, results, strict=True)):
                    if name_of(self.results[index].shape[0]) == "T":
                        whole[piece] = result
                    elif index not in self.aliases:
                        whole[rows] = result[: len(rows)]

    def _in_rows(
        self, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int], found: list[torch.Tensor]
    ) -> None:
        """Fills in the results of rows that logits are wanted of, some of them at a time."""
        for start in range(0, sizes["R"], self.most_rows):
            rows = slice(start, start + self.most_rows)
            part = [x[rows] for x in tensors]
            results = self._results(part, {**sizes, "R": len(part[0])})
            self.run(self._given(part, 1), self._named(results))
            for whole, result in zip(found, results, strict=True):
                whole[rows] = result

    def _rows_of(self, tensors: Sequence[torch.Tensor], piece: slice) -> torch.Tensor:
        """Which of the rows that logits are wanted of lie in a piece; all where that is no matter
        of the region's.
        """
        if WANTED in self.names:
            x = tensors[self.names.index(WANTED)]
            inside: torch.Tensor = ((x >= piece.start) & (x < piece.stop)).nonzero()
            return inside.flatten()
        rows = [x for x, kind in zip(tensors, self.kinds, strict=True) if kind == "R"]
        return torch.arange(len(rows[0]) if rows else 0, device=tensors[0].device)

    def _part(
        self, index: int, x: torch.Tensor, row: int, piece: slice, rows: torch.Tensor
    ) -> torch.Tensor:
        """What of an operand goes into a piece."""
        kind = self.kinds[index]
        if kind == "T":
            return x[piece]
        if kind == "B":
            return x[row : row + 1]
        if not len(rows):  # a network wants one
            return torch.zeros_like(x[:1])
        return x[rows] - piece.start if self.names[index] == WANTED else x[rows]


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The tensor dense and aligned as TensorRT may load it: itself, or a copy."""
    dense = x.contiguous()
    return dense if dense.data_ptr() % ALIGNMENT == 0 else dense.clone()
