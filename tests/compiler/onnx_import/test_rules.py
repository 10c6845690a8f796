"""ONNX's own node tests of the ops that have rules, as the onnx package has them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.case import node as node_cases

import tilewright as tw
from tilewright.compiler.onnx_import.module import OnnxGraph, parameter_name
from tilewright.compiler.onnx_import.reader import read_onnx
from tilewright.errors import CaptureError, UnsupportedError

FAMILIES = {
    "elementwise": (
        "add", "and_", "celu", "clip", "div", "elu", "equal", "erf", "gelu", "hardsigmoid",
        "hardswish", "isinf", "leakyrelu", "less", "mod", "pow", "prelu", "round", "selu",
        "softplus", "swish", "thresholdedrelu", "where",
    ),
    "shapes": (
        "concat", "constant", "cumsum", "expand", "flatten", "gather", "gatherelements",
        "gathernd", "pad", "reshape", "scatterelements", "shape", "size", "slice", "split",
        "squeeze", "tensorscatter", "tile", "topk", "transpose", "trilu", "unsqueeze",
    ),
    "reductions": (
        "argmax", "logsoftmax", "reducel2", "reducemax", "reducemean", "reducesum",
        "reduce_log_sum_exp", "softmax",
    ),
    "contractions": ("conv", "einsum", "gemm", "globalaveragepool", "matmul", "matmulinteger"),
    "norms": (
        "batch_normalization", "groupnormalization", "layernormalization", "rmsnormalization",
    ),
    "attention": ("attention", "rotaryembedding"),
    "quantized": ("dequantizelinear", "dynamicquantizelinear", "quantizelinear"),
}  # fmt: skip
LEAST = {
    "elementwise": 95, "shapes": 126, "reductions": 69, "contractions": 32, "norms": 42,
    "attention": 61, "quantized": 8,
}  # fmt: skip
SHAPE_LIKE = frozenset(
    [
        "axes",
        "axis",
        "ends",
        "k",
        "pads",
        "repeats",
        "shape",
        "split",
        "starts",
        "steps",
        "new_shape",
    ]
)
TYPES = frozenset(
    ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]
)
COMPILED = (
    "test_add_bcast", "test_attention_4d_gqa_causal", "test_concat_2d_axis_1", "test_erf",
    "test_gather_negative_indices", "test_gemm_all_attributes", "test_layer_normalization_4d_axis2",
    "test_matmul_3d", "test_rms_normalization_4d_axis_negative_1", "test_rotary_embedding",
    "test_softmax_axis_2", "test_transpose_default", "test_where_example",
)  # fmt: skip


def cases_of(modules: Sequence[str]) -> list[Any]:
    """The cases that these modules of the onnx package bring."""
    for module in modules:
        importlib.import_module(f"{node_cases.__name__}.{module}")
    ours = {module.replace("_", "") for module in modules}
    found = [case for case in node_cases._NodeTestCases if "expanded" not in case.name]
    return [c for c in found if ours & {node.op_type.lower() for node in c.model.graph.node}]


def with_constants(case: Any) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The model of a case, its axes, shapes and splits constants as exporters write them, and the
    inputs that are left by name, with their place in a data set.
    """
    model, left = onnx.ModelProto(), {}
    model.CopyFrom(case.model)
    (inputs, _), *_ = case.data_sets
    for place, given in enumerate(case.model.graph.input):
        array = np.asarray(inputs[place])
        shape_like = place and given.name in SHAPE_LIKE and array.ndim < 2
        if shape_like and array.dtype == np.int64:
            model.graph.initializer.append(numpy_helper.from_array(array, given.name))
        else:
            left[given.name] = place
    kept = [given for given in model.graph.input if given.name in left]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model, left


def feed_of(left: dict[str, int], inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A data set by the names that the module has for the inputs."""
    return {
        parameter_name(name): torch.from_numpy(np.array(inputs[place]))
        for name, place in left.items()
    }


def agree(case: Any, found: dict[str, torch.Tensor], wanted: Sequence[np.ndarray]) -> None:
    """Shapes, element types and numbers are those of the case."""
    for output, array in zip(case.model.graph.output, wanted, strict=True):
        got = found[output.name].numpy()
        assert got.shape == np.shape(array), case.name
        assert got.dtype == array.dtype, case.name
        atol = 2e-3 if array.dtype == np.float16 else 1e-5
        np.testing.assert_allclose(got, array, rtol=1e-3, atol=atol, err_msg=case.name)


def _odd(case: Any) -> bool:
    """Element types that numpy or torch lacks, and values that are no tensors."""
    arrays = [array for data in case.data_sets for side in data for array in side]
    return any(
        not isinstance(a, np.ndarray | np.generic) or str(a.dtype) not in TYPES for a in arrays
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_node_cases(family: str, tmp_path: Path) -> None:
    """Every case runs right, or is refused by a message that names the node or the file."""
    right, path = 0, tmp_path / "case.onnx"
    for case in cases_of(FAMILIES[family]):
        if _odd(case):
            continue
        model, left = with_constants(case)
        onnx.save(model, path)
        try:
            module = OnnxGraph(read_onnx(path))
            results = [module(**feed_of(left, inputs)) for inputs, _ in case.data_sets]
        except (CaptureError, UnsupportedError) as error:
            assert "node" in str(error) or str(path) in str(error)
            continue
        for found, (_, wanted) in zip(results, case.data_sets, strict=True):
            agree(case, found, wanted)
        right += 1
    assert right >= LEAST[family]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, tmp_path: Path) -> None:
    every = {c.name: c for modules in FAMILIES.values() for c in cases_of(modules)}
    case, path = every[name], tmp_path / "case.onnx"
    model, left = with_constants(case)
    onnx.save(model, path)
    engine = tw.compile(path, backend="eager", verify="off", tune="none")
    for inputs, wanted in case.data_sets:
        agree(case, engine(**feed_of(left, inputs)), wanted)  # type: ignore[operator]
