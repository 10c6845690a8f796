"""Reads graph text (ir/printer.py) back. The grammar is closed: the text is walked as a syntax tree, never executed."""

from __future__ import annotations

import ast
from collections.abc import Mapping

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
        GraphError: text outside the grammar, an unknown op, or a type that differs from the inferred one.
    """
    try:
        module = ast.parse(text)
    except SyntaxError as error:
        raise _error(f"line {error.lineno}", str(error.msg)) from error
    if len(module.body) != 1 or not isinstance(module.body[0], ast.FunctionDef):
        raise _error("text", f"{len(module.body)} statements")
    return _Function(module.body[0], weights or {}).graph()


def parse_type(tree: ast.expr) -> TensorType:
    """``f32[T, 64]`` as a type."""
    match tree:
        case ast.Subscript(value=ast.Name(id=name), slice=index) if name in DTYPE_NAMES:
            sizes = index.elts if isinstance(index, ast.Tuple) else [index]
            return TensorType(DTYPE_NAMES[name], tuple(size_from_ast(size) for size in sizes))
    raise _at(tree, "a type such as f32[T, 64]")


class _Function:
    """The state of reading one function: its values and its nested functions by name."""

    def __init__(self, tree: ast.FunctionDef, weights: Mapping[str, Weight]) -> None:
        self.tree, self.weights = tree, weights
        self.values: dict[str, Node] = {}
        self.bodies: dict[str, Graph] = {}
        self.outputs: dict[str, Node] = {}

    def graph(self) -> Graph:
        for arg in self.tree.args.args:
            if arg.annotation is None:
                raise _at(arg, "an input with a type")
            self.values[arg.arg] = input_node(arg.arg, parse_type(arg.annotation))
        inputs = tuple(self.values.values())
        for statement in self.tree.body:
            self.statement(statement)
        names = tuple(self.outputs)
        return Graph(self.tree.name, inputs, tuple(self.outputs.values()), self.weights, names)

    def statement(self, tree: ast.stmt) -> None:
        match tree:
            case ast.FunctionDef():
                self.bodies[tree.name] = _Function(tree, {}).graph()
            case ast.AnnAssign(
                target=ast.Name(id=name), annotation=annotation, value=ast.Call() as call
            ):
                self.values[name] = self.call(call, annotation)
            case ast.Return(value=ast.Dict(keys=keys, values=values)):
                for key, value in zip(keys, values, strict=True):
                    node = self.operand(value)
                    if not isinstance(key, ast.Constant) or node is None:
                        raise _at(tree, 'return {"name": value}')
                    self.outputs[str(key.value)] = node
            case _:
                raise _at(tree, "name: type = op(...), a nested def, or return {...}")

    def call(self, tree: ast.Call, annotation: ast.expr) -> Node:
        if not isinstance(tree.func, ast.Name):
            raise _at(tree, "op(...)")
        declared = _value_type(annotation)
        if tree.func.id == "param":
            return self.param(tree, declared)
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
        match tree.args:
            case [ast.Constant(value=str() as name)] if isinstance(declared, TensorType):
                return param(name, declared)
        raise _at(tree, 'param("name")')

    def operand(self, tree: ast.expr) -> Node | None:
        match tree:
            case ast.Constant(value=None):
                return None
            case ast.Name(id=name) if name in self.values:
                return self.values[name]
            case ast.Call(func=ast.Name(id=name), args=[value]) if name in DTYPE_NAMES:
                literal = self.attr(value)
                if isinstance(literal, int | float):
                    return const(literal, DTYPE_NAMES[name])
        raise _at(tree, "a value defined above, None, or a constant such as f32(0.5)")

    def attr(self, tree: ast.expr) -> Attr:
        match tree:
            case ast.Constant(value=value) if value is None or isinstance(value, int | float | str):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self.attr(operand)
                if isinstance(value, int | float):
                    return -value
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


def parse_attr(text: str, bodies: Mapping[str, Graph] | None = None) -> Attr:
    """Reads one attribute back from ``print_attr``'s text; ``bodies`` are the graphs it may name.

    Raises:
        GraphError: text outside the grammar.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise _error(f"attribute {text!r}", str(error.msg)) from error
    reader = _Function(ast.FunctionDef(name="attribute"), {})
    reader.bodies = dict(bodies or {})
    return reader.attr(tree)


def parse_type_text(text: str) -> TensorType:
    """Reads ``f32[T, 64]`` back from text; GraphError when it is no type."""
    try:
        return parse_type(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise _error(f"type {text!r}", str(error.msg)) from error
