"""Captures an nn.Module as a functional fx graph through torch.export."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any  # what torch.export takes under each name is any tree

import torch
from torch import SymInt, Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from ..errors import CaptureError, TilewrightError, UsageError
from ..runtime.structure import Fixed, Leaf
from .capture_clean import clean
from .capture_decompose import decompositions, make_functional, needs_decomposition
from .capture_errors import explain
from .capture_structure import structure_of
from .capture_types import Captured, CapturedInput, Route, Symbol

DynamicShapes = dict[str, Any] | tuple[object, ...] | list[object] | None
Examples = tuple[object, ...] | Mapping[str, object]

_UNLIMITED = 2**62


def capture_module(
    module: nn.Module,
    example_inputs: Examples,
    dynamic_shapes: DynamicShapes = None,
    *,
    name: str | None = None,
    route: Route = "plain",
    notes: Sequence[str] = (),
) -> Captured:
    """Captures `module` in eval mode; its train/eval state is as before afterwards.

    Args:
        module: any nn.Module; its parameters may be fake or on the meta device.
        example_inputs: positional arguments as a tuple, or keyword arguments as a dict.
        dynamic_shapes: as `torch.export.export` takes it; all sizes are fixed when None.
        name: of the model in messages and reports; the class name when None.
        route, notes: recorded in the result.

    Raises:
        UsageError: no module, no example inputs, or inputs that are not where the module is.
        CaptureError: what torch.export cannot follow, or a module that keeps state.
    """
    args, kwargs = _examples(module, example_inputs)
    label = name or type(module).__name__
    with _evaluating(module), torch.no_grad(), warnings.catch_warnings(), _quiet():
        try:
            # torch copies its own tree specs in a way that it calls deprecated
            warnings.simplefilter("ignore", FutureWarning)
            # what a module caches in attributes while it runs is undone by _evaluating
            warnings.filterwarnings("ignore", "The tensor attribute")
            program = torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=_shapes(dynamic_shapes, args),
                strict=False,
                # a slice [:S] of a buffer of length 16 would otherwise guard on S != 16
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            if needs_decomposition(program):
                program = program.run_decompositions(decompositions())
            else:
                make_functional(program)
        except TilewrightError:
            raise
        except Exception as error:
            raise explain(label, error) from error
    notes = (*notes, *clean(program))
    return replace(_captured(module, program, args, kwargs), name=label, route=route, notes=notes)


def _shapes(dynamic_shapes: DynamicShapes, args: tuple[object, ...]) -> DynamicShapes:
    # a list is what a user writes for positional arguments, export wants the tuple
    return tuple(dynamic_shapes) if isinstance(dynamic_shapes, list) and args else dynamic_shapes


def _examples(module: nn.Module, given: Examples) -> tuple[tuple[object, ...], dict[str, object]]:
    if not isinstance(module, nn.Module):
        raise UsageError(
            "model",
            expected="a torch.nn.Module",
            found=f"{type(module).__name__}",
            remedy="Pass the module itself.",
        )
    if not isinstance(given, tuple | list | Mapping):
        raise UsageError(
            "example_inputs",
            expected="a tuple of positional or a dict of keyword arguments",
            found="nothing" if given is None else type(given).__name__,
            remedy="Pass example_inputs=(x,) or example_inputs={'x': x}.",
        )
    args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})
    home = {parameter.device.type for parameter in module.parameters()} - {"meta"} or {"cpu"}
    for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.device.type not in home:
            raise UsageError(
                f"example_inputs{pytree.keystr(path[1:])}",
                expected=f"a tensor on {' or '.join(sorted(home))}, where the module is",
                found=f"one on {leaf.device}",
                remedy="Move it with .to(...).",
            )
    return _distinct(args, kwargs)


def _distinct(
    args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments, none of them one tensor: export would trace two such inputs as one."""
    seen: set[int] = set()

    def own(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return leaf.clone()

    found: tuple[tuple[object, ...], dict[str, object]] = pytree.tree_map(own, (args, kwargs))
    return found


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each attribute, buffer and parameter is what it was.

    Some modules cache tensors in attributes while they run (transformers' long-rope tables), which
    would be fake ones.
    """
    tables = ("_parameters", "_buffers", "_modules")
    before = [
        (part, dict(part.__dict__), [dict(part.__dict__[table]) for table in tables])
        for part in module.modules()
    ]
    module.eval()
    try:
        yield
    finally:
        for part, attributes, contents in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            for table, content in zip(tables, contents, strict=True):
                part.__dict__[table].clear()
                part.__dict__[table].update(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from printing the graph and the traceback of an error that is raised anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _captured(
    module: nn.Module,
    program: ExportedProgram,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> Captured:
    nodes = {node.name: node for node in program.graph_module.graph.find_nodes(op="placeholder")}
    weight_of, weights = _weights(program, nodes)
    leaves = [path for path, _ in pytree.tree_leaves_with_path((args, kwargs))]
    inputs: list[CapturedInput] = []
    flat_call: list[Leaf | Fixed] = []
    user = [
        spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
    ]
    for path, spec in zip(leaves, user, strict=True):
        node = nodes[spec.arg.name]
        fake = node.meta.get("val")
        if isinstance(fake, Tensor):
            flat_call.append(Leaf(len(inputs)))
            dims = tuple(
                size if isinstance(size, int) else str(size.node.expr) for size in fake.shape
            )
            inputs.append(CapturedInput(node.name, _path(path), fake, dims))
        else:
            value = getattr(spec.arg, "value", None)
            flat_call.append(Fixed(value))
            node.replace_all_uses_with(value)
            program.graph_module.graph.erase_node(node)
    program.graph_module.recompile()
    return Captured(
        name=type(module).__name__,
        program=program,
        inputs=tuple(inputs),
        weight_of=weight_of,
        weights=weights,
        call=structure_of(program.call_spec.in_spec, flat_call),
        arguments=tuple(inspect.signature(module.forward).parameters),
        output=structure_of(program.call_spec.out_spec, _outputs(program)),
        symbols=_symbols(program, inputs),
        route="plain",
        notes=(),
    )


def _path(path: pytree.KeyPath) -> str:
    text = pytree.keystr(path[1:])
    positional = isinstance(path[0], pytree.SequenceKey) and path[0].idx == 0
    return f"args{text}" if positional else f"kwargs{text}"


def _outputs(program: ExportedProgram) -> list[Leaf | Fixed]:
    flat: list[Leaf | Fixed] = []
    for place, spec in enumerate(program.graph_signature.output_specs):
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"output {spec.arg}",
                expected="plain outputs",
                found=f"an output of kind {spec.kind.name}",
                remedy="Capture the module for inference, without a loss.",
            )
        if hasattr(spec.arg, "value"):
            flat.append(Fixed(spec.arg.value))
        else:
            flat.append(Leaf(place))
    return flat


def _weights(
    program: ExportedProgram, nodes: Mapping[str, fx.Node]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Placeholder → weight name → tensor, for those used; tied weights share the first name."""
    weight_of: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CaptureError(
                str(spec.target),
                expected="parameters, buffers and tensor constants",
                found=f"an input of kind {spec.kind.name}",
                remedy="Replace the object by tensors.",
            )
        name = str(spec.target)
        tensor = program.state_dict.get(name)
        tensor = program.constants[name] if tensor is None else tensor
        name = first.setdefault(id(tensor), name)
        if nodes[spec.arg.name].users:
            weight_of[spec.arg.name] = name
            weights[name] = _plain(tensor)
    return weight_of, weights


def _plain(tensor: Tensor) -> Tensor:
    if isinstance(tensor, torch._subclasses.FakeTensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return tensor.detach()


def _symbols(program: ExportedProgram, inputs: Sequence[CapturedInput]) -> tuple[Symbol, ...]:
    # the stubs call all sizes int
    shapes: list[Sequence[object]] = [given.fake.shape for given in inputs]
    sizes = [size for shape in shapes for size in shape if isinstance(size, SymInt)]
    used = {str(symbol) for size in sizes for symbol in size.node.expr.free_symbols}
    found = []
    for symbol, limits in program.range_constraints.items():
        if str(symbol) in used:
            upper = int(limits.upper) if limits.upper.is_Integer else _UNLIMITED
            found.append(
                Symbol(str(symbol), int(limits.lower), None if upper >= _UNLIMITED else upper)
            )
    return tuple(sorted(found, key=lambda symbol: symbol.name))
