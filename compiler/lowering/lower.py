"""Lowers a captured module to an IR graph: one walk over the fx graph, a rule for each call."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from ...errors import CaptureError, CheckpointError, GraphError
from ...formats.weights import Held
from ...ir.build import const, input_node, param
from ...ir.dtypes import DType
from ...ir.graph import Graph, Weight, input_name
from ...ir.node import Node
from ...ir.types import TensorType
from ...ir.verifier import verify
from ...runtime.structure import Branch, Fixed, Leaf, Structure
from ..capture_clean import op_name, where
from ..capture_types import Captured
from .base import Call, Result, Value, as_node
from .complex import MAKERS, lower_complex, materialised, touches
from .control import lower_cond, refuse_operator
from .fallback import aten_call
from .symbols import Sizes
from .table import RULES


def lower(captured: Captured, name: str, weights: Mapping[str, Weight] | None = None) -> Graph:
    """The IR graph of a captured module.

    Args:
        captured: what capture made of the module.
        name: name of the graph, an identifier.
        weights: values of params by name; those not given are held as the captured tensors.

    Returns:
        A verified graph, whose inputs are `captured.inputs` in order and whose outputs are the
        tensors of `output_structure(captured)`. Calls without a lowering are ``aten`` nodes, see
        `foreign_ops`.

    Raises:
        CaptureError: sizes that depend on data, random numbers, loops, weights without values.
        CheckpointError: a weight in `weights` of another shape or element type than the module's.
    """
    sizes = Sizes.of(captured.symbols)
    given = dict(weights or {})
    values: dict[str, Value] = {}
    held: dict[str, Weight] = {}
    constants = _constant_names(captured)
    inputs = tuple(input_node(entry.name, sizes.type(entry.fake)) for entry in captured.inputs)
    values.update({entry.name: node for entry, node in zip(captured.inputs, inputs, strict=True)})
    for placeholder, weight_name in captured.weight_of.items():
        tensor = captured.weights[weight_name]
        if placeholder in constants and weight_name not in given and tensor.device.type != "meta":
            values[placeholder] = const(tensor.item(), DType.from_torch(tensor.dtype))
            continue
        weight = given.get(weight_name) or _hold(weight_name, tensor)
        held[weight_name] = _checked(weight_name, weight, tensor)
        values[placeholder] = param(weight_name, sizes.type(tensor))
    results = Lowering(captured.graph_module, sizes, name).run(values)
    outputs = tuple(as_output(results[place]) for place in sorted(_leaves(captured.output)))
    graph = Graph(name, inputs, outputs, held, _output_names(captured, inputs, len(outputs)))
    return verify(graph.with_outputs(outputs))


def foreign_ops(graph: Graph) -> Counter[str]:
    """How often each op without lowering occurs, bodies included: ``{"aten.sort.default": 1}``."""
    found: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "aten":
            found[str(node.attr("target"))] += 1
        for _, value in node.attrs:
            if isinstance(value, Graph):
                found += foreign_ops(value)
    return found


def output_structure(captured: Captured) -> Structure:
    """`captured.output` over the outputs of the lowered graph, which has none for fixed values."""
    places = {old: new for new, old in enumerate(sorted(_leaves(captured.output)))}
    return _renumbered(captured.output, places)


class Lowering:
    """One walk over an fx graph.

    Args:
        module: whose graph is walked; bodies of control flow are its attributes.
        sizes: reads symbolic sizes.
        name: of the graph, from which bodies are named.
    """

    def __init__(self, module: fx.GraphModule, sizes: Sizes, name: str) -> None:
        self.module, self.sizes, self.name = module, sizes, name
        self.values: dict[fx.Node, Value] = {}
        self.bodies = 0

    def run(self, placeholders: Mapping[str, Value]) -> Sequence[Value]:
        """Values of the graph's outputs, given those of its placeholders by name."""
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = placeholders.get(node.name)
            elif node.op == "output":
                results = node.args[0]
                flat = results if isinstance(results, list | tuple) else (results,)
                return [self.value(result) for result in flat]
            else:
                self.values[node] = self._lowered(node)
        raise AssertionError("an fx graph ends with its output")

    def value(self, argument: object) -> Value:
        """The value of an fx argument, containers included."""
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, list | tuple):
            return [self.value(element) for element in argument]
        if isinstance(argument, torch.SymInt):
            return self.sizes.size(argument)
        return argument  # type: ignore[return-value]

    def _lowered(self, node: fx.Node) -> Value:
        if node.op == "get_attr":
            return self._attribute(node)
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt):
            return self.sizes.size(meta)
        if isinstance(meta, torch.SymFloat):
            return self.sizes.number(meta)
        if isinstance(meta, bool | int | float):
            return meta
        if node.target is operator.getitem:
            source, index = self.value(node.args[0]), node.args[1]
            if not isinstance(source, list | tuple) or source[index] is None:  # type: ignore[index]
                raise _no_result(node)
            return source[index]  # type: ignore[index]
        if isinstance(node.target, torch._ops.OpOverload):
            return self._call(node, node.target)
        if op_name(node) == "cond":
            return lower_cond(self, node)
        raise refuse_operator(node)

    def _attribute(self, node: fx.Node) -> Value:
        found = getattr(self.module, str(node.target))
        if isinstance(found, torch.Tensor) and found.numel() == 1 and not found.dim():
            return const(found.item(), DType.from_torch(found.dtype))
        return found  # type: ignore[no-any-return]

    def _call(self, node: fx.Node, target: torch._ops.OpOverload) -> Value:
        results = self.types(node)
        args = [self.value(arg) for arg in node.args]
        kwargs = {name: self.value(arg) for name, arg in node.kwargs.items()}
        op = op_name(node)
        named = _by_name(target, args, kwargs)
        if op in MAKERS or touches(named):
            pair = lower_complex(Call(op, named, results, frozenset(), self.sizes))
            if pair is not None:
                return pair
            args = [materialised(arg) for arg in args]
            kwargs = {name: materialised(arg) for name, arg in kwargs.items()}
            named = _by_name(target, args, kwargs)
        rule = RULES.get(op)
        if rule is not None:
            call = Call(op, named, results, _row_major(node, target), self.sizes)
            try:
                lowered = rule(call)
                if lowered is not None and self._fits(lowered, results):
                    return lowered
            except GraphError:
                pass  # ill-typed here, so torch itself runs it, and the report says so
        return aten_call(target, args, kwargs, results, f"{node.name} in {where(node)}")

    def types(self, node: fx.Node) -> tuple[TensorType | None, ...]:
        """Declared types of a call's results."""
        meta = node.meta.get("val")
        flat = meta if isinstance(meta, list | tuple) else (meta,)
        return tuple(self.sizes.type(v) if isinstance(v, torch.Tensor) else None for v in flat)

    def _fits(self, lowered: Result, declared: tuple[TensorType | None, ...]) -> bool:
        parts = lowered if isinstance(lowered, tuple) else (lowered,)
        return len(parts) == len(declared) and all(
            part is None
            or wanted is None
            or (part.dtype is wanted.dtype and self.sizes.agree(part.shape, wanted.shape))
            for part, wanted in zip(parts, declared, strict=True)
        )


def as_output(value: Value) -> Node:
    """An output as a node: numbers become scalars."""
    value = materialised(value)
    if isinstance(value, Node):
        return value
    if isinstance(value, bool):
        return const(value, DType.BOOL)
    return as_node(value, DType.F64 if isinstance(value, float) else DType.I64)


def _by_name(
    target: torch._ops.OpOverload, args: Sequence[Value], kwargs: Mapping[str, Value]
) -> dict[str, Value]:
    named: dict[str, Value] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(args):
            named[argument.name] = args[i]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def _row_major(node: fx.Node, target: torch._ops.OpOverload) -> frozenset[str]:
    names = [argument.name for argument in target._schema.arguments]
    return frozenset(
        name
        for name, arg in zip(names, node.args, strict=False)
        if isinstance(arg, fx.Node)
        and isinstance(arg.meta.get("val"), torch.Tensor)
        and arg.meta["val"].is_contiguous()
    )


def _constant_names(captured: Captured) -> frozenset[str]:
    """Placeholders of scalars that code fixes: constants, and buffers that no checkpoint has."""
    signature = captured.program.graph_signature
    return frozenset(
        spec.arg.name
        for spec in signature.input_specs
        if spec.kind is InputKind.CONSTANT_TENSOR
        or (spec.kind is InputKind.BUFFER and spec.persistent is False)
        if spec.arg.name in captured.weight_of
        and not captured.weights[captured.weight_of[spec.arg.name]].dim()
    )


def _hold(name: str, tensor: torch.Tensor) -> Weight:
    if tensor.device.type == "meta":
        raise CaptureError(
            f"weight {name}",
            expected="a value",
            found="a tensor on the meta device",
            remedy="Pass its weight expression to lower(..., weights=...).",
        )
    return Held(tensor, name)


def _checked(name: str, weight: Weight, tensor: torch.Tensor) -> Weight:
    wanted, found = (tensor.dtype, tuple(tensor.shape)), (weight.dtype, tuple(weight.shape))
    if wanted != found:
        raise CheckpointError(
            f"weight {name}",
            expected=f"{wanted[0]} {list(wanted[1])}",
            found=f"{found[0]} {list(found[1])}",
            remedy="Use the checkpoint that belongs to this configuration, or cast its tensors.",
        )
    return weight


def _no_result(node: fx.Node) -> CaptureError:
    return CaptureError(
        f"{node.name} in {where(node)}",
        expected="the first result of the op",
        found=f"a use of result {node.args[1]}",
        remedy="Write that part of the module with other ops.",
    )


def _output_names(captured: Captured, inputs: tuple[Node, ...], count: int) -> tuple[str, ...]:
    """The keys of a dict of tensors, else ``out0, out1, …``; never an input's name."""
    taken = {input_name(node) for node in inputs}
    structure = output_structure(captured)
    names = [f"out{i}" for i in range(count)]
    if isinstance(structure, Branch) and structure.kind == "dict":
        for key, part in zip(structure.keys, structure.items, strict=True):
            if isinstance(part, Leaf) and key.isidentifier() and key not in taken:
                names[part.index] = key
    return tuple(names)


def _leaves(structure: Structure) -> list[int]:
    if isinstance(structure, Branch):
        return [index for part in structure.items for index in _leaves(part)]
    return [structure.index] if isinstance(structure, Leaf) else []


def _renumbered(structure: Structure, places: Mapping[int, int]) -> Structure:
    match structure:
        case Leaf(index):
            return Leaf(places[index])
        case Fixed():
            return structure
        case Branch(kind, keys, items):
            return Branch(kind, keys, tuple(_renumbered(part, places) for part in items))
