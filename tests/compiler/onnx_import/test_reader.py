"""Files that are refused: each by a message that says what is wrong, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import tilewright as tw
from tilewright.compiler.cli.app import app
from tilewright.compiler.onnx_import.reader import read_onnx
from tilewright.errors import CaptureError, CheckpointError, UnsupportedError, UsageError


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    *,
    dims: tuple[int | str, ...] = (2, 3),
    opset: int = 24,
    domain: str = "",
    weights: tuple[TensorProto, ...] = (),
) -> Path:
    """A file of x[dims] and, by ``nodes``, y."""
    shapes = {"x": dims, "y": [f"y{axis}" for axis in range(len(dims))]}
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in shapes.items())
    graph = helper.make_graph(nodes, "g", [x], [y], list(weights))
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(domain, 1)] if domain else []
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def relu() -> list[onnx.NodeProto]:
    return [helper.make_node("Relu", ["x"], ["y"])]


def refuse(error: type[Exception], match: str, path: Path) -> None:
    with pytest.raises(error, match=match):
        tw.compile(path, backend="eager")


def test_a_damaged_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", relu())
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a model at all", bytes(100)):
        path.write_bytes(content)
        refuse(CheckpointError, "a valid ONNX model", path)


def test_an_ill_formed_graph(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", [helper.make_node("Relu", ["missing"], ["y"])])
    refuse(CheckpointError, "a valid ONNX model.*missing", path)


def external(name: str, location: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.ones((3, 3), np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_external_data(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = saved(folder / "m.onnx", nodes, weights=(external("w", "m.data"),))
    refuse(CheckpointError, "'m.data' of tensor 'w'.*no such file", path)
    (folder / "m.data").write_bytes(bytes(20))
    refuse(CheckpointError, "36 bytes or more, found 20 bytes", path)
    (tmp_path / "m.data").write_bytes(bytes(36))
    saved(path, nodes, weights=(external("w", "../m.data"),))
    refuse(CheckpointError, "outside of the folder", path)
    saved(path, nodes, weights=(external("w", "m.data"),))
    (folder / "m.data").write_bytes(np.eye(3, dtype=np.float32).tobytes())
    assert read_onnx(path).weights["w"].load().equal(torch.eye(3))


@pytest.mark.parametrize("opset", [9, 99])
def test_an_opset(opset: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", relu(), opset=opset)
    refuse(UnsupportedError, f"opset {opset} of .*expected opset 13 to", path)


def test_a_domain(tmp_path: Path) -> None:
    nodes = [helper.make_node("Foo", ["x"], ["y"], domain="org.example")]
    path = saved(tmp_path / "m.onnx", nodes, domain="org.example")
    refuse(UnsupportedError, "domain 'org.example'.*found Foo", path)


def test_ops_without_a_rule(tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["a"]), helper.make_node("Det", ["x"], ["y"])]
    refuse(UnsupportedError, r"found Det \(1\), NonZero \(1\)", saved(tmp_path / "m.onnx", nodes))
    nodes = [helper.make_node("QMoE", ["x"], ["y"], domain="com.microsoft")]
    path = saved(tmp_path / "m.onnx", nodes, domain="com.microsoft")
    refuse(UnsupportedError, r"com.microsoft.QMoE \(1\)", path)


def test_an_attribute_of_a_later_opset(tmp_path: Path) -> None:
    nodes = [helper.make_node("Attention", ["x", "x", "x"], ["y"], left_window_size=1)]
    path = saved(
        tmp_path / "m.onnx", nodes, dims=(1, 1, 2, 4), opset=onnx.defs.onnx_opset_version()
    )
    refuse(UnsupportedError, "Attention.*found left_window_size", path)


@pytest.mark.parametrize(
    ("attributes", "found"),
    [
        ({"K": 3, "N": 3, "bits": 4}, "nothing"),
        ({"K": 3, "N": "3", "bits": 4, "block_size": 16}, "3"),
    ],
)
def test_an_attribute_that_is_missing_or_of_another_type(attributes, found, tmp_path) -> None:
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **attributes
    )
    codes = numpy_helper.from_array(np.zeros((3, 1, 8), np.uint8), "q")
    scales = numpy_helper.from_array(np.ones((3, 1), np.float32), "s")
    path = saved(tmp_path / "m.onnx", [node], weights=(codes, scales), domain="com.microsoft")
    refuse(UnsupportedError, rf"MatMulNBits\): expected an integer as .*found {found}", path)


def test_sizes_that_depend_on_data(tmp_path: Path) -> None:
    cast = helper.make_node("Cast", ["x"], ["s"], to=TensorProto.INT64)
    nodes = [cast, helper.make_node("Expand", ["x", "s"], ["y"])]
    path = saved(tmp_path / "m.onnx", nodes, dims=(3,))
    refuse(UnsupportedError, "'s' to follow from sizes.*depend on data", path)


def test_operands_that_do_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "x"], ["y"])])
    refuse(CaptureError, "MatMul.*operands that its op takes", path)


def test_open_sizes_without_a_profile(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", relu(), dims=("batch", 3))
    refuse(UsageError, r"open sizes in x\[batch, 3\]", path)
    result = CliRunner().invoke(app, ["compile", str(path), "-o", str(tmp_path / "engine")])
    assert result.exit_code == 2 and not (tmp_path / "engine").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_another_dtype(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", relu())
    with pytest.raises(UsageError, match="'auto' for an ONNX file"):
        tw.compile(path, dtype="float16")


def test_sizes_follow_symbols(tmp_path: Path) -> None:
    """Shape, Gather, Mul, Concat and Reshape leave a reshape; the batch stays open."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["b"], axis=0),
        helper.make_node("Mul", ["b", "three"], ["n"]),
        helper.make_node("Concat", ["n", "one"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    numbers = {"zero": 0, "one": 1, "three": 3}
    weights = [numpy_helper.from_array(np.array([v], np.int64), n) for n, v in numbers.items()]
    path = saved(tmp_path / "m.onnx", nodes, dims=("batch", 3), weights=tuple(weights))
    batch = torch.export.Dim("batch", min=1, max=16)
    engine = tw.compile(
        path, {"x": torch.ones(2, 3)}, dynamic_shapes={"x": {0: batch}}, backend="eager"
    )
    x = torch.randn(5, 3)
    assert engine(x=x)["y"].equal(x.reshape(15, 1))  # type: ignore[operator, index]
    assert engine(x)["y"].shape == (15, 1)  # type: ignore[operator, index]
    assert "aten" not in str(engine.image.graphs[0][1])
