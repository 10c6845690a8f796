"""Reads graph text (ir/printer.py) back.

The grammar is closed: the text is walked as a syntax tree, never executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import GraphError
from .build import const, input_node, make, param
from .dims import size_from_ast
from .dtypes import DTYPE_NAMES
from .graph import Graph, Weight
from .node import Attr, Node
from .types import TensorType, ValueType

_FLOATS = {"inf": float("inf"), "nan": float("nan")}


def parse_graph(text: str, weights: Mapping[str, Weight] | None = None) -> Graph:
    """The graph that ``text`` prints.

    Args:
        text: one function as ``print_graph`` writes it.
        weights: what the params name; the text does not hold them.

    Raises:
        GraphError: text outside the grammar, an unknown op, or a type that is not the inferred one.
    """
    with _syntax("graph text"):
        module = ast.parse(text)
        if len(module.body) != 1 or not isinstance(module.body[0], ast.FunctionDef):
            raise _error("text", f"{len(module.body)} statements")
        return _Function().graph(module.body[0], weights or {})


def parse_type(tree: ast.expr) -> TensorType:
    """``f32[T, 64]`` as a type."""
    match tree:
        case ast.Subscript(value=ast.Name(id=name), slice=index) if name in DTYPE_NAMES:
            sizes = index.elts if isinstance(index, ast.Tuple) else [index]
            return TensorType(DTYPE_NAMES[name], tuple(size_from_ast(size) for size in sizes))
    raise _at(tree, "a type such as f32[T, 64]")


class _Function:
    """The state of reading one function: its values and its nested functions by name."""

    def __init__(self, bodies: Mapping[str, Graph] | None = None) -> None:
        self.values: dict[str, Node] = {}
        self.bodies = dict(bodies or {})

    def graph(self, tree: ast.FunctionDef, weights: Mapping[str, Weight]) -> Graph:
        args = tree.args
        odd = (args.posonlyargs, args.kwonlyargs, args.defaults, tree.decorator_list)
        if any(odd) or args.vararg or args.kwarg or tree.returns:
            raise _at(tree, "def name(input: type, ...):")
        for arg in args.args:
            if arg.annotation is None or arg.arg in self.values:
                raise _at(arg, "inputs with a type, one of each name")
            self.values[arg.arg] = input_node(arg.arg, parse_type(arg.annotation))
        inputs = tuple(self.values.values())
        *statements, last = tree.body
        if not isinstance(last, ast.Return):
            raise _at(last, 'return {"name": value} at the end')
        for statement in statements:
            self.statement(statement)
        outputs = self.outputs(last)
        names = tuple(outputs)
        return Graph(tree.name, inputs, tuple(outputs.values()), weights, names)

    def statement(self, tree: ast.stmt) -> None:
        match tree:
            case ast.FunctionDef(name=name) if name not in self.bodies:
                self.bodies[name] = _Function().graph(tree, {})
            case ast.AnnAssign(
                target=ast.Name(id=name), annotation=annotation, value=ast.Call() as call
            ) if name not in self.values:
                self.values[name] = self.call(call, annotation)
            case _:
                raise _at(tree, "name: type = op(...) or a nested def, of each name one")

    def outputs(self, tree: ast.Return) -> dict[str, Node]:
        if not isinstance(tree.value, ast.Dict):
            raise _at(tree, 'return {"name": value}')
        found: dict[str, Node] = {}
        for key, value in zip(tree.value.keys, tree.value.values, strict=True):
            node = self.operand(value)
            name = key.value if isinstance(key, ast.Constant) else None
            if not isinstance(name, str) or node is None or name in found:
                raise _at(tree, 'return {"name": value}, one of each name')
            found[name] = node
        return found

    def call(self, tree: ast.Call, annotation: ast.expr) -> Node:
        if not isinstance(tree.func, ast.Name) or tree.func.id == "input":
            raise _at(tree, "op(...)")
        declared = _value_type(annotation)
        if tree.func.id == "param":
            return self.param(tree, declared)
        names = [keyword.arg for keyword in tree.keywords]
        if None in names or len(set(names)) < len(names):
            raise _at(tree, "attributes by name, one of each")
        attrs = {str(k.arg): self.attr(k.value) for k in tree.keywords}
        node = make(tree.func.id, *map(self.operand, tree.args), **attrs)
        if node.value_type != declared:
            raise GraphError(
                f"line {tree.lineno}",
                expected=f"the inferred type {node.value_type}",
                found=str(declared),
                remedy="Correct the annotation.",
            )
        return node

    def param(self, tree: ast.Call, declared: ValueType) -> Node:
        match tree:
            case ast.Call(args=[ast.Constant(value=str() as name)], keywords=[]):
                if isinstance(declared, TensorType):
                    return param(name, declared)
        raise _at(tree, 'param("name")')

    def operand(self, tree: ast.expr) -> Node | None:
        match tree:
            case ast.Constant(value=None):
                return None
            case ast.Name(id=name) if name in self.values:
                return self.values[name]
            case ast.Call(func=ast.Name(id=name), args=[value], keywords=[]) if name in DTYPE_NAMES:
                literal = self.attr(value)
                if isinstance(literal, int | float):
                    return const(literal, DTYPE_NAMES[name])
        raise _at(tree, "a value defined above, None, or a constant such as f32(0.5)")

    def attr(self, tree: ast.expr) -> Attr:
        match tree:
            case ast.Constant(value=value) if value is None or isinstance(value, int | float | str):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                positive = self.attr(operand)
                if isinstance(positive, int | float):
                    return -positive
            case ast.Tuple(elts=elements):
                return tuple(self.attr(element) for element in elements)
            case ast.Name(id=name) if name in self.bodies:
                return self.bodies[name]
            case ast.Name(id=name) if name in DTYPE_NAMES:
                return DTYPE_NAMES[name]
            case ast.Name(id=name) if name in _FLOATS:
                return _FLOATS[name]
            case ast.Subscript():
                return parse_type(tree)
        return size_from_ast(tree)


def _value_type(tree: ast.expr) -> ValueType:
    if isinstance(tree, ast.Tuple):
        return tuple(parse_type(element) for element in tree.elts)
    return parse_type(tree)


@contextmanager
def _syntax(what: str) -> Iterator[None]:
    """Whatever Python's own parser says of a text, too deep nesting included, as a GraphError."""
    try:
        yield
    except SyntaxError as error:
        raise _error(f"{what}, line {error.lineno}", str(error.msg)) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise _error(what, str(error) or "nesting that is too deep") from error


def _error(where: str, found: str) -> GraphError:
    return GraphError(
        where, expected="graph text", found=found, remedy="Correct the text; see ir/printer.py."
    )


def _at(tree: ast.AST, expected: str) -> GraphError:
    return GraphError(
        f"line {getattr(tree, 'lineno', '?')}",
        expected=expected,
        found=ast.unparse(tree)[:80],
        remedy="Correct the text; see ir/printer.py.",
    )


def parse_type_text(text: str) -> TensorType:
    """Reads ``f32[T, 64]`` back from text; GraphError when it is no type."""
    with _syntax(f"type {text!r}"):
        return parse_type(ast.parse(text, mode="eval").body)


def parse_attr(text: str, bodies: Mapping[str, Graph] | None = None) -> Attr:
    """Reads one attribute back from ``print_attr``'s text; ``bodies`` are the graphs it may name.

    Raises:
        GraphError: text outside the grammar.
    """
    with _syntax(f"attribute {text!r}"):
        return _Function(bodies).attr(ast.parse(text, mode="eval").body)
