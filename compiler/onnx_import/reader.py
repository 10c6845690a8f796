"""Reads an ONNX file, and refuses what cannot be compiled before anything is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir
from onnx import ModelProto, inliner

from ...errors import CheckpointError, UnsupportedError
from ...formats.weights import Held
from .call import OURS
from .model import Attribute, Input, Model, Step
from .rules.dtypes import DTYPES
from .rules.table import MICROSOFT, RULES
from .tensors import check_external, read_tensor
from .weights import Coded, is_constant

OLDEST = 13
"""The first opset that is read: in earlier ones axes and splits are attributes."""
_LATER = frozenset({("com.microsoft", "MatMulNBits")})  # its weight has to be read first


def read_onnx(path: Path) -> Model:
    """The graph of a file.

    Raises:
        CheckpointError: a file that is damaged, no valid ONNX, or whose external data is missing.
        UnsupportedError: an opset, a domain or an op that there is no rule for.
    """
    proto = _load(path)
    _check_opsets(proto, path)
    _check_valid(proto, path)
    proto = _inlined(proto, path)
    _check_ops(proto, path)
    try:
        model = onnx_ir.from_proto(proto)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            check_external(value.const_value, path)
    onnx_ir.external_data.set_base_dir(model.graph, str(path.parent))
    return _model(model, str(path))


def _load(path: Path) -> ModelProto:
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors have no common base
        raise _damaged(path, error) from error
    if not proto.ir_version or not proto.graph.node:
        raise _damaged(path, "no graph")
    return proto


def _check_valid(proto: ModelProto, path: Path) -> None:
    try:
        onnx.checker.check_model(_light(proto))
    except onnx.checker.ValidationError as error:
        if "No Op registered" not in str(error):  # of which `_check_ops` says more
            raise _damaged(path, error) from error


def _light(proto: ModelProto) -> ModelProto:
    """The model without tensors that lie elsewhere: `check_external` says more of these."""
    light = ModelProto()
    light.CopyFrom(proto)
    for tensor in light.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    inline = [t for t in light.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del light.graph.initializer[:]
    light.graph.initializer.extend(inline)
    return light


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(
        str(path),
        expected="a valid ONNX model",
        found=" ".join(str(why).split())[:300] or type(why).__name__,
        remedy="Export or copy the file again.",
    )


def _check_opsets(proto: ModelProto, path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    used = {_domain(node.domain) for node in proto.graph.node}
    local = {_domain(function.domain) for function in proto.functions}
    for opset in proto.opset_import:
        domain = _domain(opset.domain)
        if domain not in used:
            continue
        if domain not in RULES and domain not in local or domain == OURS:
            raise UnsupportedError(
                f"domain {opset.domain!r} of {path}",
                expected=f"ops of ONNX's own domain or {MICROSOFT}",
                found=", ".join(
                    sorted({n.op_type for n in proto.graph.node if n.domain == domain})
                ),
                remedy="Export the model with standard ops.",
            )
        if domain == "" and not OLDEST <= opset.version <= newest:
            raise UnsupportedError(
                f"opset {opset.version} of {path}",
                expected=f"opset {OLDEST} to {newest}",
                found=str(opset.version),
                remedy="Convert it with onnx.version_converter.convert_version."
                if opset.version < OLDEST
                else "Update the onnx package, or export with an earlier opset.",
            )


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _inlined(proto: ModelProto, path: Path) -> ModelProto:
    """The model with the bodies of its own functions, and of standard ops that have a body and no
    rule, in their places.
    """
    try:
        if proto.functions:
            proto = inliner.inline_local_functions(proto)
        missing = sorted({(n.domain, n.op_type) for n in _without_rule(proto)})
        bodies = [key for key in missing if _domain(key[0]) == "" and _has_body(key[1])]
        if bodies:
            return inliner.inline_selected_functions(proto, bodies, inline_schema_functions=True)
    except (RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error
    return proto


def _has_body(op: str) -> bool:
    if not onnx.defs.has(op):
        return False
    found = onnx.defs.get_schema(op)
    return bool(found.has_function or found.has_context_dependent_function)


def _without_rule(proto: ModelProto) -> Iterable[onnx.NodeProto]:
    for node in proto.graph.node:
        domain = _domain(node.domain)
        if node.op_type not in RULES.get(domain, {}) and (domain, node.op_type) not in _LATER:
            yield node


def _check_ops(proto: ModelProto, path: Path) -> None:
    found = Counter(f"{n.domain and n.domain + '.'}{n.op_type}" for n in _without_rule(proto))
    if found:
        raise UnsupportedError(
            f"ops of {path}",
            expected="ops that there is a rule for, or a body in the standard",
            found=", ".join(f"{name} ({count})" for name, count in sorted(found.items())),
            remedy="Export the model without them, or compile the PyTorch model it came from.",
        )


def _model(model: onnx_ir.Model, path: str) -> Model:
    graph = model.graph
    held = {
        name: value.const_value
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    tensors = {name: read_tensor(tensor, path) for name, tensor in held.items()}
    four_bits = {n for n, tensor in held.items() if tensor.dtype.name in ("INT4", "UINT4")}
    coded = Coded(tensors, four_bits, {})
    versions = {_domain(name): version for name, version in model.opset_imports.items()}
    steps: list[Step] = []
    for number, node in enumerate(graph):
        step = coded.replaced(_step(node, number, versions, path))
        if step is not None:
            steps.append(step)
    _check_codes(steps)
    outputs = tuple(str(value.name) for value in graph.outputs)
    read = {name for step in steps for name in step.inputs} | set(outputs)
    used = {name: tensor for name, tensor in tensors.items() if name in read}
    constants = {name: tensor for name, tensor in used.items() if is_constant(tensor)}
    weights = {n: Held(tensor, n) for n, tensor in used.items() if n not in constants}
    inputs = tuple(_input(v, path) for v in graph.inputs if v.name not in tensors)
    return Model(path, inputs, outputs, tuple(steps), constants, {**weights, **coded.weights})


def _check_codes(steps: list[Step]) -> None:
    for step in steps:
        if (step.domain, step.op) in _LATER:
            raise UnsupportedError(
                str(step),
                expected="4 bits, or 8 around 128, in constants, without g_idx",
                found=f"bits={step.attributes.get('bits')}, inputs {', '.join(step.inputs)}",
                remedy="Export the model with another scheme.",
            )


def _step(node: onnx_ir.Node, number: int, versions: dict[str, int], path: str) -> Step:
    domain = _domain(node.domain)
    outputs = tuple(value.name or "" for value in node.outputs)
    return Step(
        node.op_type,
        domain,
        versions.get(domain, 1),
        node.name or next((name for name in outputs if name), f"#{number}"),
        tuple("" if value is None else value.name or "" for value in node.inputs),
        outputs,
        {name: _attribute(attribute, path) for name, attribute in node.attributes.items()},
    )


def _attribute(attribute: object, path: str) -> Attribute:
    assert isinstance(attribute, onnx_ir.Attr)
    if attribute.type is onnx_ir.AttributeType.TENSOR:
        return read_tensor(attribute.as_tensor(), path)
    value = attribute.value
    found: Attribute = tuple(value) if isinstance(value, list | tuple) else value
    return found


def _input(value: onnx_ir.Value, path: str) -> Input:
    dtype = None if value.dtype is None else DTYPES.get(int(value.dtype))
    if dtype is None or value.shape is None:
        raise UnsupportedError(
            f"input {value.name!r} of {path}",
            expected="a tensor of numbers with a rank",
            found=str(value.type),
            remedy="Export the model with typed inputs.",
        )
    dims = tuple(d if isinstance(d, int) else str(d.value or "") for d in value.shape)
    return Input(str(value.name), dtype, dims)


__all__ = ["OLDEST", "read_onnx"]
