"""The one launch of a Program, loaded: what a call of it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch

from ...errors import EngineError, GraphError, KernelError, UnsupportedError
from ...ir.graph import Graph, input_name, param_name
from ...ir.parser import parse_graph
from ..base import ReadFile
from ..program import Call, Program
from ..triton.package import Binary, kernel_id, read_package
from ..triton.source import KernelSource
from .decode import INPUTS, PersistentDecode, in_interpreter, on_device
from .lowering import cache_names
from .reading import Shape, read_decode
from .ring_decode import RingDecode, ring_on_device
from .ring_source import RingCut
from .source import source_of
from .tiling import Tiling


class PersistentKernel:
    """A loaded launch (the ``Kernel`` of codegen/base.py): steps of one sequence.

    Attributes:
        decode: the launch with its memory.
    """

    def __init__(self, decode: PersistentDecode | RingDecode) -> None:
        self.decode = decode
        self._caches = cache_names(decode.shape)

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        tensors = [tensor for tensor in operands if tensor is not None]
        inputs = dict(zip(INPUTS, tensors, strict=False))
        caches = dict(zip(self._caches, tensors[len(INPUTS) :], strict=True))
        self.decode.run(inputs, caches)
        return (self.decode.logits, *caches.values())

    def recover(self) -> KernelError | None:
        """As `Recovers` says."""
        try:
            self.decode.check()
        except KernelError as error:
            self.decode.reset()
            return error
        return None


def load_persistent(
    call: Call,
    program: Program,
    weights: Mapping[str, torch.Tensor],
    read: ReadFile,
    device: torch.device,
) -> PersistentKernel:
    """The kernel of a call that `with_one_launch` made.

    The call holds its graph. The kernel's text is made anew of that, and must be the folder's: so
    the tables, which hold addresses, are those that the machine code takes.

    Raises:
        EngineError: a folder of another version, weights or buffers of other types, or a device
            with fewer multiprocessors than the launch has programs.
    """
    graph, cut, shape, source = launch_source(call, device.type == "cuda")
    _check_types(call, program, graph, weights)
    caches = cache_names(shape)
    if call.operands != (*INPUTS, *caches) or len(call.results) != 1 + len(caches):
        raise _other(call, f"operands {call.operands}")
    if device.type == "cuda":
        binary = _binary(call, read, device, cut.programs)
        return PersistentKernel(decoder(shape, cut, weights, source, binary, device))
    if isinstance(cut, RingCut):
        raise _other(call, f"a ring of weights on {device.type}, which has no TMA")
    launch = in_interpreter(source)
    return PersistentKernel(PersistentDecode(shape, cut, weights, launch, device))


def launch_source(
    call: Call, device: bool = True
) -> tuple[Graph, Tiling | RingCut, Shape, KernelSource]:
    """The graph that a launch computes, how it is cut, what it reads of the graph, and its kernel.

    Args:
        device: whether it is for a GPU, not for the interpreter.

    Raises:
        EngineError: this version would make another kernel of it.
    """
    graph, cut = _described(call)
    try:
        shape = read_decode(graph)
        source = source_of(shape, cut, device=device)
    except UnsupportedError as error:
        raise _other(call, str(error)) from error
    if kernel_id(source) != call.kernel.rpartition("/")[2]:
        raise _other(call, f"this version's is {kernel_id(source)}")
    return graph, cut, shape, source


def decoder(
    shape: Shape,
    cut: Tiling | RingCut,
    weights: Mapping[str, torch.Tensor],
    source: KernelSource,
    binary: Binary,
    device: torch.device,
    timed: bool = False,
) -> PersistentDecode | RingDecode:
    """The launch of a kernel on a GPU with its memory, whichever kind it is.

    Raises:
        UsageError: weights that lie where the launch cannot read them.
    """
    if isinstance(cut, RingCut):
        of_ring = ring_on_device(source, binary, device)
        return RingDecode(shape, cut, weights, of_ring, device, timed)
    return PersistentDecode(shape, cut, weights, on_device(source, binary, device), device, timed)


def _binary(call: Call, read: ReadFile, device: torch.device, programs: int) -> Binary:
    package = read_package(read, call.kernel.rpartition("/")[2])
    found = torch.cuda.get_device_properties(device).multi_processor_count
    if found < programs:
        raise EngineError(
            f"call of {call.kernel}",
            expected=f"{programs} multiprocessors, all of which the one launch occupies",
            found=f"{found}",
            remedy="Compile the model again on this device.",
        )
    return next(iter(package.binaries.values()))


def _described(call: Call) -> tuple[Graph, Tiling | RingCut]:
    """The graph of a call, and the cut of its kernel by whichever kind's fields it has."""
    text, values = call.attrs.get("graph"), {**call.attrs}
    values.pop("graph", None)
    kind = next((k for k in (Tiling, RingCut) if {f.name for f in fields(k)} == {*values}), None)
    known = all(type(value) is int and 0 <= value <= 4096 for value in values.values())
    if not isinstance(text, str) or kind is None or not known:
        raise _other(call, f"attributes {', '.join(call.attrs)}")
    try:
        return parse_graph(text), kind(**{name: int(str(v)) for name, v in values.items()})
    except GraphError as error:
        raise _other(call, str(error)) from error


def _check_types(
    call: Call, program: Program, graph: Graph, weights: Mapping[str, torch.Tensor]
) -> None:
    """EngineError where a buffer or weight is not what the graph says that it is."""
    types = {input_name(node): node.type for node in graph.inputs}
    for name in call.operands:
        if name is None or program.buffers.get(name) != types.get(name):
            raise _other(call, f"buffer {name}")
    for node in graph.params:
        weight = weights.get(param_name(node))
        if weight is None or weight.dtype is not node.dtype.torch or weight.shape != node.shape:
            raise _other(call, f"weight {param_name(node)}")


def _other(call: Call, found: str) -> EngineError:
    return EngineError(
        f"call of {call.kernel}",
        expected="one launch as this version makes it, with the buffers and weights of its graph",
        found=found,
        remedy="Compile the model again with this version.",
    )
