"""Decides whether an exported program must be retraced into simpler ops before it is lowered.

The retrace is most of the time of a capture, and lowering takes most composite ops as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import BuiltinFunctionType, FunctionType

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

from .capture_clean import CHECKS, SAME, op_name

_aten = torch.ops.aten
# Ops that lowering takes whole, so that nothing has to be recognised from its decomposition.
KEPT_OPS = frozenset(
    [
        _aten.scaled_dot_product_attention.default,
        _aten.linear.default,
        _aten.matmul.default,
        _aten.layer_norm.default,
        _aten.native_layer_norm.default,
        _aten.rms_norm.default,
        _aten.group_norm.default,
        _aten.softmax.int,
        _aten.log_softmax.int,
        _aten._softmax.default,
        _aten._log_softmax.default,
        _aten.gelu.default,
        _aten.silu.default,
        _aten.softplus.default,
        _aten.embedding.default,
        _aten.tril.default,
        _aten.triu.default,
        _aten.conv1d.default,
        _aten.conv2d.default,
        _aten.conv3d.default,
    ]
)
# Ops that a retrace would take apart, and whose rules give what the parts would be lowered to.
_DIRECT_OPS = frozenset(
    [
        _aten.sym_size.int,
        *(_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other),
        *(_aten.type_as.default, _aten.contiguous.default, _aten.detach.default),
        *(_aten.reshape.default, _aten.flatten.using_ints, _aten.unflatten.int),
        *(_aten.view_as.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims),
        *(_aten.transpose.int, _aten.t.default, _aten.numpy_T.default),
        *(_aten.expand_as.default, _aten.broadcast_to.default),
        _aten.repeat_interleave.self_int,
        *(_aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default),
        *(_aten.unbind.int, _aten.stack.default, _aten.concat.default),
        *(_aten.arange.default, _aten.arange.start, _aten.arange.start_step),
        *(_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default),
        *(_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default),
        *(_aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar),
        *(_aten.masked_fill.Scalar, _aten.max.other, _aten.min.other),
        *(_aten.square.default, _aten.rsub.Scalar),
        *(_aten.floor_divide.default, _aten.baddbmm.default, _aten.logsumexp.default),
    ]
)
_IN_PLACE = frozenset(
    f"aten.{op}_"
    for op in ("add", "sub", "mul", "div", "clamp", "masked_fill", "scatter", "relu", "silu")
)
# composite, so their schemas promise nothing, but they compute what they return
_COMPUTING = (
    *(_aten.linear.default, _aten.matmul.default, _aten.softmax.int, _aten.layer_norm.default),
)


def decompositions() -> dict[OpOverload, Callable[..., object]]:
    """torch's own table, without `KEPT_OPS`."""
    table = torch.export.default_decompositions()
    for op in KEPT_OPS:
        table.pop(op, None)
    return dict(table)


def needs_decomposition(program: ExportedProgram) -> str | None:
    """The first op of `program` that lowering may not take as it is; None when there is none."""
    core = _core()
    for node in _calls(program):
        target = node.target
        if not isinstance(target, OpOverload):
            if not (_is_python(node) or _is_idle_context(node)):
                return op_name(node)
        elif target._schema.is_mutable:
            if target not in SAME and not _is_on_fresh(node):
                return str(target)
        elif target in _CONDITIONAL:
            if not _CONDITIONAL[target](node):
                return str(target)
        elif not _is_taken(target) and (_is_composite(target) or target in core):
            return str(target)
    return None


def make_functional(program: ExportedProgram) -> None:
    """Makes the writes of a program that needs no decomposition return new values instead."""
    for node in _calls(program):
        if isinstance(node.target, OpOverload) and op_name(node) in _IN_PLACE:
            node.target = _functional(node.target)


@cache
def _core() -> frozenset[OpOverload]:
    """What torch takes apart: its own ops, which stay the same, unlike those that others add."""
    return frozenset(dict(torch.export.default_decompositions()))


def _calls(program: ExportedProgram) -> Iterator[fx.Node]:
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            yield from (node for node in part.graph.nodes if node.op.startswith("call_"))


def _is_python(node: fx.Node) -> bool:
    """Arithmetic of sizes, and the choice of one result among several."""
    return isinstance(node.target, BuiltinFunctionType | FunctionType)


def _is_idle_context(node: fx.Node) -> bool:
    """Whether a block changes nothing: a gradient mode, or autocast that is off."""
    name = getattr(node.target, "__name__", "")
    return name == "wrap_with_set_grad_enabled" or (
        name == "wrap_with_autocast" and not node.args[2]
    )


def _is_logical(node: fx.Node) -> bool:
    return node.meta["val"].dtype is torch.bool


def _is_idle_dropout(node: fx.Node) -> bool:
    return node.args[2] is False


# of the direct ops, those that are only in some uses
_CONDITIONAL: dict[OpOverload, Callable[[fx.Node], bool]] = {
    _aten.__and__.Tensor: _is_logical,
    _aten.__or__.Tensor: _is_logical,
    _aten.dropout.default: _is_idle_dropout,
}


def _is_taken(target: OpOverload) -> bool:
    name = str(target.overloadpacket).rpartition(".")[2]
    return target in KEPT_OPS or target in _DIRECT_OPS or target in SAME or name in CHECKS


def _is_composite(target: OpOverload) -> bool:
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    )


def _functional(target: OpOverload) -> OpOverload:
    name = target._schema.name.removeprefix("aten::").removesuffix("_")
    found: OpOverload = getattr(getattr(_aten, name), target._overloadname)
    return found


def _is_on_fresh(node: fx.Node) -> bool:
    """Whether nothing but its result can see what an op writes.

    It writes to a value that was computed, of which no views were taken and which nothing reads
    later; all operands are of one element type, so that the result needs no cast.
    """
    written = node.args[0]
    if op_name(node) not in _IN_PLACE or not isinstance(written, fx.Node):
        return False
    operands = [given for given in _tensors(node) if given.is_floating_point() or given.dim()]
    dtypes = {given.dtype for given in operands if given.dtype is not torch.bool}
    if "scatter" not in op_name(node) and len(dtypes) != 1:
        return False
    users = [user for user in written.users if user is not node]
    return _is_fresh(written) and all(user < node and _makes_new(user) for user in users)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    values = [given.meta.get("val") for given in node.all_input_nodes]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _is_fresh(node: fx.Node) -> bool:
    if node.target.__class__ is OpOverload and op_name(node) in _IN_PLACE:
        return _is_on_fresh(node)
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        source, index = node.args[0], node.args[1]
        assert isinstance(source, fx.Node)
        same = [user for user in source.users if user.args[1:] == (index,)]
        return len(same) == 1 and _makes_new(source)
    return isinstance(node.meta.get("val"), torch.Tensor) and _makes_new(node)


def _makes_new(node: fx.Node) -> bool:
    """Whether the results of a call share no memory with its operands."""
    if not isinstance(node.target, OpOverload):
        return node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt)
    if node.target is _aten.sym_size.int or op_name(node).rpartition(".")[2] in CHECKS:
        return True
    returns = node.target._schema.returns
    honest = node.target in _COMPUTING or not _is_composite(node.target)
    return honest and all(result.alias_info is None for result in returns)
