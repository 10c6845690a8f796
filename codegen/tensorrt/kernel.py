"""Runs a region of a Program: its tokens as a batch, by an engine or by the reference of its
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import TypeAlias

import torch

from ...errors import EngineError
from ...ir.dims import evaluate as evaluate_size
from ...ir.dims import name_of
from ..base import ReadFile
from ..program import Call, Program
from .evaluate import load_constants, run_layers
from .network import Network, Tensor

Tensors: TypeAlias = "dict[str, torch.Tensor]"
Run: TypeAlias = "Callable[[Tensors, Tensors], None]"
"""Computes a network: inputs by name, results by name, which are written to."""


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
    """A loaded region: values of tokens, [T, …], are its batch's, [batch, length, …].

    Results are fresh tensors, but for caches, which are the operands that they were.
    """

    def __init__(self, call: Call, program: Program, run: Run) -> None:
        self.call, self.run = call, run
        names = call.attrs["inputs"]
        assert isinstance(names, tuple)
        self.names = tuple(map(str, names))
        operands = [program.buffers[name] for name in call.operands if name is not None]
        self.of_tokens = [name_of(type_.shape[0]) == "T" for type_ in operands]
        self.results = [program.buffers[name] for name in call.results]
        self.aliases = dict(call.aliases)
        if len(self.names) != len(call.operands):
            raise EngineError(
                f"call of {call.kernel}",
                expected=f"{len(call.operands)} names of inputs, one an operand",
                found=str(len(self.names)),
                remedy="Compile the model again.",
            )
        self.lock = Lock()  # an execution context holds the operands of one run

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
        batch = sizes["B"]
        given = {
            name: (x.unflatten(0, (batch, -1)) if tokens else x).contiguous()
            for name, x, tokens in zip(self.names, tensors, self.of_tokens, strict=True)
        }
        for operand in self.aliases.values():  # what is written must be the cache, not a copy
            assert given[self.names[operand]].data_ptr() == tensors[operand].data_ptr()
        device = tensors[0].device
        found = [
            tensors[self.aliases[index]]
            if index in self.aliases
            else torch.empty(
                [evaluate_size(size, sizes) for size in type_.shape],
                dtype=type_.dtype.torch,
                device=device,
            )
            for index, type_ in enumerate(self.results)
        ]
        with self.lock:
            self.run(given, dict(zip(self.call.results, found, strict=True)))
        return found
