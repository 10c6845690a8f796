"""The reader of weight expressions: text in the closed grammar of `weights.py` → Weight.

The text is walked as a syntax tree; nothing of it is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch

from ..errors import GraphError
from .weight_ops import DTYPES, WEIGHT_OPS, AttrValue
from .weights import Full, Random, Weight, apply_weight

Resolve = Callable[[str], Weight]
_Resolvers = Mapping[str, Resolve]


def parse_weight(text: str, resolve: Resolve, held: Resolve | None = None) -> Weight:
    """Read the text that `str(weight)` gives.

    Args:
        text: e.g. `concat(stored("q"), stored("k"), dim=0)`.
        resolve: gives the weight of a tensor name, for each `stored("…")`.
        held: the same for each `held("…")`; by default it is `resolve`.

    Returns:
        The expression, equal to the one that was printed where `resolve` gives equal leaves.

    Raises:
        GraphError: text outside the grammar, an unknown operation, or shapes that do not fit.
        CheckpointError: whatever `resolve` raises for a tensor that is not there.
    """
    try:
        return _weight(
            ast.parse(text, mode="eval").body, {"stored": resolve, "held": held or resolve}
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _malformed(f"{type(error).__name__}: {error}") from error


def _weight(node: ast.expr, resolve: _Resolvers) -> Weight:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        _refuse(node)
    op = node.func.id
    if op in resolve:
        name = _value(node.args[0]) if len(node.args) == 1 and not node.keywords else None
        return resolve[op](name) if isinstance(name, str) else _refuse(node)
    if op == "random":
        return _random(node)
    if op == "full":
        return _full(node)
    args = tuple(_operand(arg, resolve) for arg in node.args)
    attrs: dict[str, AttrValue] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in attrs:
            _refuse(node)
        value = _value(keyword.value)
        attrs[keyword.arg] = _dtype(value) if keyword.arg == "dtype" else value
    if op not in WEIGHT_OPS:
        raise _malformed(f"unknown operation {op!r}")
    return apply_weight(op, args, **attrs)


def _random(node: ast.Call) -> Weight:
    if len(node.args) != 4 or node.keywords:
        _refuse(node)
    seed, shape, dtype, std = (_value(arg) for arg in node.args)
    if type(seed) is not int or not isinstance(shape, tuple) or not isinstance(std, (int, float)):
        _refuse(node)
    return Random(seed, shape, _dtype(dtype), float(std))


def _full(node: ast.Call) -> Weight:
    if len(node.args) != 3 or node.keywords:
        _refuse(node)
    fill, shape, dtype = (_value(arg) for arg in node.args)
    if not isinstance(fill, int | float) or not isinstance(shape, tuple):
        _refuse(node)
    return Full(fill, shape, _dtype(dtype))


def _operand(node: ast.expr, resolve: _Resolvers) -> Weight | int | float:
    if isinstance(node, ast.Call):
        return _weight(node, resolve)
    value = _value(node)
    return value if isinstance(value, (int, float)) else _refuse(node)


def _value(node: ast.expr) -> AttrValue:
    match node:
        case ast.Constant(value=bool()):
            _refuse(node)
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            number = _value(operand)
            return -number if isinstance(number, (int, float)) else _refuse(node)
        case ast.Name(id="inf"):
            return float("inf")
        case ast.Tuple(elts=elements):
            values = [_value(element) for element in elements]
            sizes = tuple(value for value in values if isinstance(value, int))
            return sizes if len(sizes) == len(values) else _refuse(node)
    return _refuse(node)


def _dtype(name: AttrValue) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise _malformed(f"dtype {name!r}, which is none of {', '.join(DTYPES)}")
    return DTYPES[name]


def _refuse(node: ast.AST) -> NoReturn:
    raise _malformed(repr(ast.unparse(node)))


def _malformed(found: str) -> GraphError:
    return GraphError(
        "weight expression",
        expected='an operation over stored("…"), held("…"), random(seed, shape, dtype, std) and '
        "full(number, shape, dtype)",
        found=found,
        remedy="Restore the text that Tilewright wrote.",
    )
