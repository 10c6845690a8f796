"""Generated kernels of whole bodies, against the interpreter of the IR, in poisoned memory."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewright as tw
from fused_bodies import CLOSE, bodies, spots
from rewriting import parse
from tilewright.codegen.triton.aot import ARCHS, compile_sources
from tilewright.codegen.triton.layout import Layout
from tilewright.codegen.triton.sass import _tool
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.ops.control import body_of
from tilewright.ir.parser import parse_graph
from tiny_models import tiny_model
from triton_bodies import call_of, drawn, emitted, guarded, placed, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter


def compare(body: Graph, values: list[torch.Tensor], sizes: dict[str, int], where=None) -> None:
    """Runs the kernel of a body with its operands ``where`` (keywords of ``placed``)."""
    where = where or [{}] * len(values)
    buffers = [
        placed(value, node.type, **spot)
        for value, node, spot in zip(values, body.inputs, where, strict=True)
    ]
    source = emitted(body, [layout for _, layout in buffers])
    assert source is not None, str(body)
    found = run(source, call_of(body), [buffer for buffer, _ in buffers], sizes)
    for ours, wanted in zip(found, interpret(body, values), strict=True):
        same = ours.dtype == wanted.dtype and ours.shape == wanted.shape
        assert same, f"{ours.dtype} {ours.shape}"
        if not ours.is_floating_point():
            assert torch.equal(ours, wanted), source.text
            continue
        off = CLOSE[DType.from_torch(ours.dtype)]
        torch.testing.assert_close(
            ours.double(),
            wanted.double(),
            rtol=off,
            atol=off,
            equal_nan=True,
            msg=lambda text: f"{text}\n{source.text}",
        )


def check(text: str, sizes: dict[str, int], seed: int = 0, **values: torch.Tensor) -> None:
    """As ``compare``, for a body as text, with random operands but for those given."""
    body = parse(text)
    torch.manual_seed(seed)
    names = [str(node.attr("name")) for node in body.inputs]
    operands = [
        values.get(name, drawn(node.type, sizes))
        for name, node in zip(names, body.inputs, strict=True)
    ]
    compare(body, operands, sizes)


@pytest.mark.parametrize("reduces", [False, True], ids=["pointwise", "rows"])
def test_random_bodies_agree_with_the_interpreter(reduces):
    @settings(max_examples=40)
    @given(st.data())
    def agree(data):
        body = data.draw(bodies(reduces))
        sizes = {"T": data.draw(st.sampled_from([1, 2, 5, 13]))}
        torch.manual_seed(0)
        values = [drawn(node.type, sizes) for node in body.inputs]
        where = [spots(data.draw, node.type) for node in body.inputs]
        compare(body, values, sizes, where)

    agree()


@pytest.mark.parametrize("width", [5000, 9000])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_wide_rows_are_walked_in_chunks(width, dtype, monkeypatch):
    monkeypatch.setattr("tilewright.codegen.triton.generate_index.MAX_THREADS", 128)
    text = f"""
def body(a: {dtype}[T, {width}], b: {dtype}[T, {width}], w: {dtype}[{width}]):
    add_0: {dtype}[T, {width}] = add(a, b)
    layer_norm_0: {dtype}[T, {width}] = layer_norm(add_0, w, w, eps=1e-05)
    softmax_0: {dtype}[T, {width}] = softmax(layer_norm_0, dim=1)
    sum_0: {dtype}[T, 1] = sum(layer_norm_0, dims=(1,), keepdim=True)
    amax_0: {dtype}[T] = amax(softmax_0, dims=(1,), keepdim=False)
    reshape_0: {dtype}[T, 1] = reshape(amax_0, shape=(T, 1))
    div_0: {dtype}[T, {width}] = div(softmax_0, reshape_0)
    return {{"out0": div_0, "out1": add_0, "out2": sum_0, "out3": amax_0}}
"""
    body = parse(text)
    source = emitted(body)
    assert source is not None and source.text.count("for start in range") == 6
    check(text, {"T": 2})


@pytest.mark.parametrize("count", [1, 7, 4100])
def test_a_symbolic_width(count):
    text = """
def body(x: f32[3, T], w: f32[T], s: f32[()]):
    mul_0: f32[3, T] = mul(x, s)
    mean_0: f32[3, 1] = mean(mul_0, dims=(1,), keepdim=True)
    sub_0: f32[3, T] = sub(mul_0, mean_0)
    mul_1: f32[3, T] = mul(sub_0, w)
    return {"out0": mul_1, "out1": mean_0}
"""
    check(text, {"T": count})
    check(
        """
def body(x: i64[T]):
    cast_0: f32[T] = cast(x, dtype=f32)
    return {"out0": cast_0}
""",
        {"T": count},
    )


@pytest.mark.parametrize("op", ["sum", "prod", "amax", "amin", "any", "all"])
@pytest.mark.parametrize("dtype", ["i64", "i32", "i8", "u8", "bool", "f32", "bf16"])
@pytest.mark.parametrize("width", [1, 5, 16])
def test_reductions_of_each_type(op, dtype, width):
    result = "bool" if op in ("any", "all") else dtype
    check(
        f"""
def body(x: {dtype}[T, {width}]):
    {op}_0: {result}[T] = {op}(x, dims=(1,), keepdim=False)
    {op}_1: {result}[T, 1] = {op}(x, dims=(1,), keepdim=True)
    return {{"out0": {op}_0, "out1": {op}_1}}
""",
        {"T": 19},
    )


def test_nan_and_infinities_run_through_reductions():
    x = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 1.0, 2.0], [-float("inf")] * 3])
    check(
        """
def body(x: f32[3, 3]):
    amax_0: f32[3, 1] = amax(x, dims=(1,), keepdim=True)
    amin_0: f32[3, 1] = amin(x, dims=(1,), keepdim=True)
    sum_0: f32[3, 1] = sum(x, dims=(1,), keepdim=True)
    softmax_0: f32[3, 3] = softmax(x, dim=1)
    any_0: bool[3, 1] = any(x, dims=(1,), keepdim=True)
    return {"a": amax_0, "b": amin_0, "c": sum_0, "d": softmax_0, "e": any_0}
""",
        {},
        x=x,
    )


TYPES = ("f64", "f32", "bf16", "f16", "i64", "i32", "i16", "u8", "bool")


@pytest.mark.parametrize(("source", "target"), list(permutations(TYPES, 2)))
def test_casts(source, target):
    body = parse(
        f"""
def body(x: {source}[9]):
    cast_0: {target}[9] = cast(x, dtype={target})
    return {{"out0": cast_0}}
"""
    )
    dtype = body.inputs[0].dtype.torch
    numbers = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0, 77.0, 31.0, 5.0, 12.0], dtype=torch.float64)
    if dtype.is_floating_point:
        numbers = numbers + 0.3
    if dtype.is_signed and target not in ("u8",) and dtype is not torch.bool:
        numbers[1::2] *= -1
    value = numbers.to(dtype)
    (found,) = run(emitted(body), call_of(body), [value], {})
    assert torch.equal(found, value.to(body.outputs[0].dtype.torch))


@pytest.mark.parametrize("index", ["i64", "i32"])
def test_rows_picked_by_an_index_stay_within_the_table(index):
    text = f"""
def body(table: f32[V, 12], ids: {index}[T], w: f32[12]):
    embedding_0: f32[T, 12] = embedding(table, ids)
    rms_norm_0: f32[T, 12] = rms_norm(embedding_0, w, eps=1e-06)
    return {{"out0": rms_norm_0}}
"""
    dtype = torch.int64 if index == "i64" else torch.int32
    ids = torch.tensor([0, 4, 3, 3, 1], dtype=dtype)
    check(text, {"T": 5, "V": 5}, ids=ids)
    body = parse(text)
    wild = torch.tensor([5, -1, 2**31 - 1, -(2**31), 2], dtype=dtype)
    buffers = [guarded((5, 12), torch.float32), wild, torch.ones(12)]
    buffers[0].copy_(torch.randn(5, 12))
    (found,) = run(emitted(body), call_of(body), buffers, {"T": 5, "V": 5})
    assert found.isfinite().all()
    empty = [guarded((0, 12), torch.float32), wild, torch.ones(12)]
    (found,) = run(emitted(body), call_of(body), empty, {"T": 5, "V": 0})
    assert (found == 0).all()


def test_index_select_of_any_rank():
    check(
        """
def body(x: f32[6, 2, 10], index: i64[T, 3], y: f32[10]):
    index_select_0: f32[T, 3, 2, 10] = index_select(x, index, dim=0)
    add_0: f32[T, 3, 2, 10] = add(index_select_0, y)
    return {"out0": add_0}
""",
        {"T": 4},
    )
    check(
        """
def body(x: f32[6], index: i64[T, 3], y: f32[T, 1]):
    index_select_0: f32[T, 3] = index_select(x, index, dim=0)
    add_0: f32[T, 3] = add(index_select_0, y)
    return {"out0": add_0}
""",
        {"T": 4},
    )


def test_views_are_loads():
    check(
        """
def body(x: bf16[T, 4, 50], y: bf16[T, 9], z: bf16[4]):
    slice_0: bf16[T, 4, 20] = slice(x, dim=2, start=3, step=2, stop=43)
    slice_1: bf16[T, 4] = slice(y, dim=1, start=5, step=1, stop=9)
    reshape_0: bf16[T, 4, 1] = reshape(slice_1, shape=(T, 4, 1))
    reshape_1: bf16[1, 4, 1] = reshape(z, shape=(1, 4, 1))
    expand_0: bf16[T, 4, 20] = expand(reshape_1, shape=(T, 4, 20))
    mul_0: bf16[T, 4, 20] = mul(slice_0, reshape_0)
    add_0: bf16[T, 4, 20] = add(mul_0, expand_0)
    sum_0: bf16[T, 4, 1] = sum(expand_0, dims=(2,), keepdim=True)
    add_1: bf16[T, 4, 20] = add(add_0, sum_0)
    return {"out0": add_1}
""",
        {"T": 3},
    )


def test_norms_take_weights_of_another_type():
    check(
        """
def body(x: bf16[T, 40], w: f32[40], b: f64[40]):
    layer_norm_0: bf16[T, 40] = layer_norm(x, w, b, eps=1e-05)
    rms_norm_0: bf16[T, 40] = rms_norm(layer_norm_0, b, eps=1e-05)
    layer_norm_1: bf16[T, 40] = layer_norm(rms_norm_0, None, w, eps=1e-05)
    return {"out0": layer_norm_1}
""",
        {"T": 3},
    )


def test_names_of_a_body_do_not_meet_those_of_its_kernel():
    check(
        """
def body(row: f32[T, 3, 20], cols: f32[20], out0: f32[T, 1, 1], tl: f32[3, 1]):
    add_0: f32[T, 3, 20] = add(row, cols)
    mul_0: f32[T, 3, 20] = mul(add_0, out0)
    add_1: f32[T, 3, 20] = add(mul_0, tl)
    return {"a result": add_1, "in_rows": mul_0}
""",
        {"T": 5},
    )


def test_no_rows_are_no_programs():
    check(
        """
def body(x: f32[T, 40]):
    abs_0: f32[T, 40] = abs(x)
    return {"out0": abs_0}
""",
        {"T": 0},
    )


DECLINED = {
    "complex": """
def body(x: c64[T, 4]):
    neg_0: c64[T, 4] = neg(x)
    return {"out0": neg_0}
""",
    "two spaces": """
def body(x: f32[T, 4], y: f32[T, 5]):
    abs_0: f32[T, 4] = abs(x)
    abs_1: f32[T, 5] = abs(y)
    return {"out0": abs_0, "out1": abs_1}
""",
    "a value that changes places": """
def body(x: f32[4, 4], y: f32[4, 4]):
    sum_0: f32[4] = sum(x, dims=(1,), keepdim=False)
    add_0: f32[4, 4] = add(sum_0, y)
    return {"out0": add_0}
""",
    "a slice of a value of its own": """
def body(x: f32[T, 8], y: f32[T, 8]):
    abs_0: f32[T, 8] = abs(x)
    slice_0: f32[T, 1] = slice(abs_0, dim=1, start=0, step=1, stop=1)
    add_0: f32[T, 8] = add(slice_0, y)
    return {"out0": add_0}
""",
    "another axis": """
def body(x: f32[T, 8]):
    sum_0: f32[1, 8] = sum(x, dims=(0,), keepdim=True)
    return {"out0": sum_0}
""",
    "empty rows": """
def body(x: f32[T, 0]):
    sum_0: f32[T, 1] = sum(x, dims=(1,), keepdim=True)
    return {"out0": sum_0}
""",
    "huge axes": """
def body(x: f32[1, 2147483648]):
    abs_0: f32[1, 2147483648] = abs(x)
    return {"out0": abs_0}
""",
    "scalars": """
def body(x: f32[()]):
    abs_0: f32[()] = abs(x)
    return {"out0": abs_0}
""",
    "a table of its own": """
def body(x: f32[T, 8], ids: i64[T]):
    abs_0: f32[T, 8] = abs(x)
    embedding_0: f32[T, 8] = embedding(abs_0, ids)
    return {"out0": embedding_0}
""",
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_declined(case):
    assert emitted(parse(DECLINED[case])) is None


def test_offsets_beyond_32_bits_are_computed_in_64():
    text = """
def body(x: f32[{rows}, 4096]):
    abs_0: f32[{rows}, 4096] = abs(x)
    return {{"out0": abs_0}}
"""
    small, large = (emitted(parse(text.format(rows=n))).text for n in (2**19 - 1, 2**19 + 1))
    assert "tl.int64" not in small and "tl.program_id(0).to(tl.int64)" in large
    assert "tl.int64" in emitted(parse(text.format(rows="T"))).text
    far = emitted(parse(text.format(rows=2)), [Layout(0, (1, 2**20))])
    assert "cols.to(tl.int64) * 1048576" in far.text


def test_masks_only_where_sizes_do_not_divide():
    text = """
def body(x: f32[{rows}, {width}]):
    abs_0: f32[{rows}, {width}] = abs(x)
    return {{"out0": abs_0}}
"""
    assert "mask" not in emitted(parse(text.format(rows="T", width=4096))).text
    assert "mask" not in emitted(parse(text.format(rows="16*T", width=64))).text
    assert "in_rows" in emitted(parse(text.format(rows="T", width=64))).text
    assert "in_cols" in emitted(parse(text.format(rows="T", width=4100))).text


@cache
def fused_nodes(model: str, dtype: torch.dtype) -> dict[Graph, Node]:
    """The distinct fused bodies of a tiny model, as its engine's last graph has them."""
    engine = tw.compile(tiny_model(model).to(dtype), backend="eager", verify="off")
    graph = parse_graph(engine.image.graphs[-1][1])
    return {body_of(node): node for node in graph.nodes if node.op == "fused"}


SIZES = {"T": 5, "R": 3, "B": 2, "M": 2, "N": 4, "P": 4}


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="f32", marks=pytest.mark.nightly),
        pytest.param(torch.bfloat16, id="bf16"),
    ],
)
@pytest.mark.parametrize("model", ["llama", "gemma2", "qwen3", "gpt2", "mixtral"])
def test_every_group_of_a_model_is_a_kernel(model, dtype):
    bodies = fused_nodes(model, dtype)
    assert len(bodies) > 3
    for body in bodies:
        values = [drawn(node.type, SIZES) for node in body.inputs]
        compare(body, values, SIZES)


def test_the_kernels_of_a_model_compile_without_spills():
    bodies = {**fused_nodes("gemma2", torch.bfloat16), **fused_nodes("gpt2", torch.bfloat16)}
    for package in compile_sources([emitted(body) for body in bodies], 90):
        assert [r.spills for r in package.resources] == [0], package.source.text


ADD_NORM = """
def add_rms_norm(a: bf16[T, {d}], b: bf16[T, {d}], w: bf16[{d}]):
    add_0: bf16[T, {d}] = add(a, b)
    rms_norm_0: bf16[T, {d}] = rms_norm(add_0, w, eps=1e-06)
    return {{"out0": add_0, "out1": rms_norm_0}}
"""
GATED = """
def gated(x: bf16[T, 28672]):
    slice_0: bf16[T, 14336] = slice(x, dim=1, start=0, step=1, stop=14336)
    slice_1: bf16[T, 14336] = slice(x, dim=1, start=14336, step=1, stop=28672)
    gated_0: bf16[T, 14336] = gated(slice_0, slice_1, activation="silu")
    return {"out0": gated_0}
"""
ANGLES = """
def mul_cos_sin(x: f32[T, 1], b: f32[64]):
    mul_0: f32[T, 64] = mul(x, b)
    cos_0: f32[T, 64] = cos(mul_0)
    sin_0: f32[T, 64] = sin(mul_0)
    return {"out0": cos_0, "out1": sin_0}
"""
SOFTMAX = """
def softmax(x: f32[T, 128256]):
    softmax_0: f32[T, 128256] = softmax(x, dim=1)
    return {"out0": softmax_0}
"""
LAYER_NORM = """
def add_layer_norm(a: f32[T, 16384], b: f32[T, 16384], c: f32[T, 16384], w: f32[16384]):
    add_0: f32[T, 16384] = add(a, b)
    add_1: f32[T, 16384] = add(add_0, c)
    layer_norm_0: f32[T, 16384] = layer_norm(add_1, w, w, eps=1e-05)
    return {"out0": layer_norm_0, "out1": add_1}
"""


@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=() if a == 90 else pytest.mark.nightly) for a in ARCHS],
)
def test_kernels_of_true_widths_compile_without_spills(arch):
    texts = [ADD_NORM.format(d=4096), GATED]
    if arch == 90:
        texts += [ADD_NORM.format(d=16384), ANGLES, SOFTMAX, LAYER_NORM]
    sources = [emitted(parse(text)) for text in texts]
    for package in compile_sources(sources, arch):
        assert [r.spills for r in package.resources] == [0], package.source.name


def test_rows_are_read_and_written_16_bytes_at_a_time(tmp_path):
    sources = [emitted(parse(text)) for text in (ADD_NORM.format(d=4096), GATED)]
    for package in compile_sources(sources, 90):
        (binary,) = package.binaries.values()
        path = tmp_path / "kernel.cubin"
        path.write_bytes(binary.cubin)
        command = [_tool("cuobjdump"), "-sass", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        moves = re.findall(r"\b((?:LDG|STG)\.E\S*)", text)
        assert moves and all(".128" in move for move in moves), moves
