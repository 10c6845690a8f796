"""Cleans an exported graph: no checks, no context blocks, no idle views, no buffer writes."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from ..errors import CaptureError

CHECKS = frozenset(
    [
        "_assert_async",
        "_assert_scalar",
        "_assert_tensor_metadata",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_functional_assert_async",
        "_functional_assert_scalar",
        "_functional_sym_constrain_range",
        "_functional_sym_constrain_range_for_size",
    ]
)
SAME = (
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.detach_.default,
)
_COPIES = (
    torch.ops.aten.clone.default,
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.device,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten.type_as.default,
)


_KINDS = {
    OutputKind.BUFFER_MUTATION: "buffer",
    OutputKind.PARAMETER_MUTATION: "parameter",
    OutputKind.USER_INPUT_MUTATION: "input",
}


def op_name(node: fx.Node) -> str:
    """``aten.add`` of ``aten.add.Tensor``; the target's own name for what is no ATen overload."""
    target = node.target
    return str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else str(target)


def clean(program: ExportedProgram) -> list[str]:
    """Cleans `program`'s graph in place and returns notes about what was left out.

    Raises:
        CaptureError: a buffer or an input that the outputs depend on is written to.
    """
    module = program.graph_module
    for part in list(module.modules()):
        if isinstance(part, fx.GraphModule):  # the graph itself and the bodies of torch.cond
            inline_contexts(part)
            _drop_idle(part.graph)
    notes = _drop_writes(program)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            part.graph.eliminate_dead_code(is_impure_node=_is_interface)
            part.recompile()
    return notes


def _is_interface(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def _drop_idle(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if op_name(node).rpartition(".")[2] in CHECKS:
            graph.erase_node(node)
        elif node.target in SAME or _is_whole_slice(node) or _is_same_copy(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_same_copy(node: fx.Node) -> bool:
    """Whether a copy (of a dropout, say) or a cast changes nothing.

    It keeps the strides too, so that views behind it stay valid.
    """
    if node.target is torch.ops.aten.dropout.default and node.args[2] is False:
        return True
    if node.target not in _COPIES or node.kwargs.get("memory_format"):
        return False
    before, after = (n.meta.get("val") for n in (node.all_input_nodes[0], node))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    same = before.dtype is after.dtype and before.device == after.device
    return same and str(before.stride()) == str(after.stride())


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return bool(start in (None, 0) and end in (None, 2**63 - 1) and step == 1)


def inline_contexts(module: fx.GraphModule) -> None:
    """Inlines the bodies of wrap_with_set_grad_enabled, and of wrap_with_autocast that is off."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in (
            "wrap_with_set_grad_enabled",
            "wrap_with_autocast",
        ):
            continue
        place = 1 if name == "wrap_with_set_grad_enabled" else 4
        if place == 4 and node.args[2]:
            raise CaptureError(
                f"{node.name} in {where(node)}",
                expected="autocast switched off",
                found=f"autocast to {node.args[1]} inside forward()",
                remedy="Cast explicitly in the module, or capture it in the dtype it computes in.",
            )
        _inline(module, node, node.args[place], node.args[place + 1 :])


def _inline(
    module: fx.GraphModule, call: fx.Node, body: fx.Node, operands: tuple[fx.Node, ...]
) -> None:
    inner = getattr(module, str(body.target))
    inline_contexts(inner)
    values = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
    with module.graph.inserting_before(call):
        outputs = module.graph.graph_copy(inner.graph, values)
    parts = outputs if isinstance(outputs, tuple | list) else (outputs,)
    for user in list(call.users):
        index = user.args[1]
        assert isinstance(index, int)
        user.replace_all_uses_with(parts[index])
        module.graph.erase_node(user)
    module.graph.erase_node(call)
    if not body.users:
        module.graph.erase_node(body)


def where(node: fx.Node) -> str:
    """Module path and source line of a node, as export recorded them."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values() if entry[0]]
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File" in line
    ]
    return " at ".join([path[-1] if path else "the module", *lines[-1:]])


def _reads(node: fx.Node, seen: set[fx.Node]) -> set[fx.Node]:
    stack = [node]
    while stack:
        top = stack.pop()
        if top not in seen:
            seen.add(top)
            stack.extend(top.all_input_nodes)
    return seen


def _drop_writes(program: ExportedProgram) -> list[str]:
    signature = program.graph_signature
    output = program.graph_module.graph.output_node()
    results = list(output.args[0])
    writes, kept, read = [], [], set[fx.Node]()
    for spec, node in zip(signature.output_specs, results, strict=True):
        if spec.kind in _KINDS:
            writes.append((spec, node))
            continue
        kept.append((spec, node))
        if isinstance(node, fx.Node):
            _reads(node, read)
    names = {node.name for node in read if node.op == "placeholder"}
    placeholder = {s.target: s.arg.name for s in signature.input_specs if s.target is not None}
    for spec, node in writes:
        if spec.kind is OutputKind.USER_INPUT_MUTATION or placeholder[spec.target] in names:
            raise CaptureError(
                f"{_KINDS[spec.kind]} {spec.target}",
                expected="a module that keeps no state between calls",
                found=f"it is written to by {node.name} in {where(node)}",
                remedy="Return the new value, or call model.eval() if training mode updates it.",
            )
    output.args = (tuple(node for _, node in kept),)
    signature.output_specs[:] = [spec for spec, _ in kept]
    return [
        f"writes to buffer {spec.target}, which no output reads, were left out"
        for spec, _ in writes
    ]
