"""Graphs as Python-like text that ir/parser.py reads back to the same graph.

    def block(x: f32[T, 64]):
        up_weight: f32[128, 64] = param("up.weight")
        linear_0: f32[T, 128] = linear(x, up_weight)
        return {"y": linear_0}

Scalar constants stand inline as ``f32(0.5)``; the graphs that nodes hold are nested functions;
weights are not in the text. Names of inputs and graphs are ASCII identifiers (the verifier sees to
that), those of params and outputs any strings.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from ..errors import GraphError
from .dims import RESERVED_NAMES, Dim
from .dtypes import DType
from .graph import Graph, input_name, param_name
from .node import Attr, Node
from .types import TensorType

RESERVED = RESERVED_NAMES | {"param"}


def print_graph(graph: Graph, indent: str = "") -> str:
    """The text of a graph, ending in a newline."""
    return "\n".join(_lines(graph, indent)) + "\n"


def print_attr(value: Attr) -> str:
    """One attribute as text."""
    if isinstance(value, Graph):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(print_attr, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Dim | DType | TensorType):
        return str(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return repr(value)


def value_names(graph: Graph) -> dict[Node, str]:
    """A readable, unique name for every node that the text names."""
    names = {node: input_name(node) for node in graph.inputs}
    taken = {*RESERVED, *graph.symbols, *names.values()}
    counts: Counter[str] = Counter()
    for node in graph.params:
        names[node] = _unique(_identifier(param_name(node)), taken)
    for node in graph.nodes:
        if node in names or node.op == "const":
            continue
        stem = node.op
        names[node] = _unique(f"{stem}_{counts[stem]}", taken)
        counts[stem] += 1
    return names


def nested_graphs(graph: Graph) -> dict[str, Graph]:
    """The graphs that nodes hold, by name; GraphError when two different ones share a name."""
    found: dict[str, Graph] = {}
    for node in graph.nodes:
        for value in attr_graphs(node):
            if found.setdefault(value.name, value) != value:
                raise GraphError(
                    f"graph {value.name!r} within {graph.name}",
                    expected="one body a name",
                    found="two different bodies",
                    remedy="Name bodies by their content.",
                )
    return found


def attr_graphs(node: Node) -> Iterator[Graph]:
    """The graphs among the attributes of a node."""
    pending: list[Attr] = [value for _, value in node.attrs]
    while pending:
        value = pending.pop(0)
        if isinstance(value, Graph):
            yield value
        elif isinstance(value, tuple):
            pending.extend(value)


def quoted(text: str) -> str:
    """A string as a Python literal, in double quotes where it needs no escapes."""
    plain = text.isascii() and text.isprintable() and not set(text) & {'"', "\\"}
    return f'"{text}"' if plain else repr(text)


def _lines(graph: Graph, indent: str) -> Iterator[str]:
    names = value_names(graph)
    inner = indent + "    "
    inputs = ", ".join(f"{names[node]}: {node.type}" for node in graph.inputs)
    yield f"{indent}def {graph.name}({inputs}):"
    for body in nested_graphs(graph).values():
        yield from _lines(body, inner)
    for node in graph.nodes:
        if node.op not in ("input", "const"):
            yield f"{inner}{names[node]}: {_type_text(node)} = {_call_text(node, names)}"
    outputs = zip(graph.output_names, graph.outputs, strict=True)
    pairs = ", ".join(f"{quoted(name)}: {_operand_text(node, names)}" for name, node in outputs)
    yield f"{inner}return {{{pairs}}}"


def _type_text(node: Node) -> str:
    if isinstance(node.value_type, TensorType):
        return str(node.value_type)
    return f"({', '.join(map(str, node.value_type))},)"


def _call_text(node: Node, names: dict[Node, str]) -> str:
    if node.op == "param":
        return f"param({quoted(param_name(node))})"
    args = [_operand_text(arg, names) for arg in node.args]
    while args and args[-1] == "None":
        args.pop()
    attrs = [f"{name}={print_attr(value)}" for name, value in node.attrs]
    return f"{node.op}({', '.join(args + attrs)})"


def _operand_text(node: Node | None, names: dict[Node, str]) -> str:
    if node is None:
        return "None"
    if node.op == "const":
        return f"{node.dtype}({print_attr(node.attr('value'))})"
    return names[node]


def _identifier(name: str) -> str:
    text = re.sub(r"\W", "_", name, flags=re.ASCII)
    return text if text.isidentifier() else f"_{text}"


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    taken.add(candidate)
    return candidate
