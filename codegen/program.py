"""Programs: what a backend makes of a graph. An ordered list of kernel calls over named buffers,
as plain data.

A Program is JSON in the engine folder. Sizes are expressions over the symbols that the inputs'
shapes bind; attributes are in the closed grammar of graph text. Loading one runs nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..errors import EngineError, GraphError
from ..ir.dims import Size, evaluate, parse_size, symbol, symbols_of
from ..ir.graph import Graph
from ..ir.node import Attr
from ..ir.parser import parse_attr, parse_graph, parse_type_text
from ..ir.printer import print_attr, print_graph
from ..ir.types import TensorType

FRESH = symbol("fresh")
"""1 in a step of one sequence alone, all of whose keys are of tokens that the step computes; 0 in
others. No input's shape has it: who runs a Program says so, and where nobody does it is 0.
"""
SHARED = symbol("shared")
"""1 in a step some of whose sequences are told to share pages (``share_pages``), 0 in others; said
as ``FRESH`` is.
"""
_SAID = {str(FRESH): 0, str(SHARED): 0}

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call.

    Attributes:
        kernel: ``<loader>/<name>``: the loader is a backend's, the name is its business (an op, a
            file).
        operands: buffers it reads, None for an optional one that is absent.
        results: buffers it writes.
        attrs: what the kernel is told, by name.
        constants: names of weights that the loader takes in when the engine starts; not passed at
            calls.
        aliases: (result, operand) index pairs: the result is the operand's buffer, written in
            place.
        frees: buffers that nobody needs after this call.
        origin: the ops of the graph that the call computes, for reports.
        guard: the call is made where all of these are at least 0; at other sizes nothing of it is
            but its ``frees``. Of the calls that write one buffer exactly one is made, whatever the
            sizes; what such a call reads is written wherever it is made.
    """

    kernel: str
    operands: tuple[str | None, ...]
    results: tuple[str, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()
    frees: tuple[str, ...] = ()
    origin: tuple[str, ...] = ()
    guard: tuple[Size, ...] = ()

    def runs_at(self, sizes: Mapping[str, int]) -> bool:
        """Whether its guard holds."""
        if not self.guard:
            return True
        known = {**_SAID, **sizes}
        return all(evaluate(size, known) >= 0 for size in self.guard)

    @property
    def loader(self) -> str:
        """The backend that loads the kernel."""
        return self.kernel.split("/", 1)[0]

    @property
    def kind(self) -> str:
        """What computes it, for reports: "generated", "template" or "library" with Triton, "aten"
        where torch runs a foreign op, else the loader.
        """
        loader, kind = self.kernel.split("/")[:2]
        if kind == "aten":
            return kind
        return kind if loader == "triton" else loader


@dataclass(frozen=True, slots=True)
class Program:
    """Calls in order, and the buffers between them.

    Attributes:
        name: of the graph it came from.
        buffers: type of every buffer by name.
        inputs: buffers given by the caller, in order.
        weights: buffers that hold weights: buffer name to weight name.
        outputs: (output name, buffer) pairs. An output with an input's name replaces it for the
            next run, in place.
        calls: what to run.
    """

    name: str
    buffers: Mapping[str, TensorType]
    inputs: tuple[str, ...]
    weights: Mapping[str, str]
    outputs: tuple[tuple[str, str], ...]
    calls: tuple[Call, ...]

    @property
    def shares(self) -> bool:
        """Whether it has calls for steps whose sequences are told to share pages (``SHARED``)."""
        sizes = (size for call in self.calls for size in call.guard)
        return any(str(SHARED) in symbols_of(size) for size in sizes)

    def at(self, sizes: Mapping[str, int]) -> Program:
        """The Program of the calls that are made at these sizes, none of which has a guard: what is
        counted or planned for one setting is that of this one. What a call that is not made would
        free, the one before it frees.
        """
        if not any(call.guard for call in self.calls):
            return self
        made: list[Call] = []
        for call in self.calls:
            if call.runs_at(sizes):
                made.append(replace(call, guard=()) if call.guard else call)
            elif made:
                made[-1] = replace(made[-1], frees=made[-1].frees + call.frees)
        return replace(self, calls=tuple(made))

    def to_json(self) -> Json:
        """The program as plain data."""
        bodies: dict[str, Json] = {}
        calls: list[Json] = [_call_to_json(call, bodies) for call in self.calls]
        return {
            "name": self.name,
            "buffers": {name: str(type_) for name, type_ in self.buffers.items()},
            "inputs": list(self.inputs),
            "weights": dict(self.weights),
            "outputs": [list(pair) for pair in self.outputs],
            "bodies": bodies,
            "calls": calls,
        }

    @staticmethod
    def from_json(data: Json) -> Program:
        """Reads a program back.

        Raises:
            EngineError: data that ``to_json`` did not write.
        """
        try:
            return _read(data)
        except (KeyError, TypeError, ValueError, AttributeError, GraphError) as error:
            raise EngineError(
                "program",
                expected="a program as this version writes it",
                found=f"{type(error).__name__}: {error}",
                remedy="Compile the model again with this version.",
            ) from error


def _call_to_json(call: Call, bodies: dict[str, Json]) -> Json:
    for value in call.attrs.values():
        if isinstance(value, Graph):
            bodies[value.name] = print_graph(value)
    written: dict[str, Json] = {
        "kernel": call.kernel,
        "operands": list(call.operands),
        "results": list(call.results),
        "attrs": {name: print_attr(value) for name, value in call.attrs.items()},
        "constants": list(call.constants),
        "aliases": [list(pair) for pair in call.aliases],
        "frees": list(call.frees),
        "origin": list(call.origin),
        "guard": [str(size) for size in call.guard],
    }
    return {key: value for key, value in written.items() if value not in ([], {})}


def _read(data: Json) -> Program:
    assert isinstance(data, dict)
    bodies = {name: parse_graph(str(text)) for name, text in _dict(data["bodies"]).items()}
    return Program(
        str(data["name"]),
        {name: parse_type_text(str(text)) for name, text in _dict(data["buffers"]).items()},
        tuple(map(str, _list(data["inputs"]))),
        {buffer: str(name) for buffer, name in _dict(data["weights"]).items()},
        tuple((str(_list(p)[0]), str(_list(p)[1])) for p in _list(data["outputs"])),
        tuple(_read_call(_dict(call), bodies) for call in _list(data["calls"])),
    )


def _read_call(data: dict[str, Json], bodies: Mapping[str, Graph]) -> Call:
    attrs = {n: parse_attr(str(text), bodies) for n, text in _dict(data.get("attrs", {})).items()}
    pairs = [_list(pair) for pair in _list(data.get("aliases", []))]
    return Call(
        str(data["kernel"]),
        tuple(None if name is None else str(name) for name in _list(data.get("operands", []))),
        tuple(map(str, _list(data.get("results", [])))),
        attrs,
        tuple(map(str, _list(data.get("constants", [])))),
        tuple((int(str(a)), int(str(b))) for a, b in pairs),
        tuple(map(str, _list(data.get("frees", [])))),
        tuple(map(str, _list(data.get("origin", [])))),
        tuple(parse_size(str(size)) for size in _list(data.get("guard", []))),
    )


def _dict(data: Json) -> dict[str, Json]:
    if not isinstance(data, dict):
        raise TypeError(f"an object, not {type(data).__name__}")
    return data


def _list(data: Json) -> list[Json]:
    if not isinstance(data, list):
        raise TypeError(f"a list, not {type(data).__name__}")
    return data
