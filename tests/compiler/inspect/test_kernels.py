"""Kernels as `inspect` shows them, for an engine made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tilewright.codegen.program import Call, Program
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.source import KernelSource, Launch, Pointer, Scalar, Variant
from tilewright.compiler.inspect.facts import DECODE, PREFILL, bindings, call_costs, compute_dtype
from tilewright.compiler.inspect.kernel_view import (
    kernel_columns,
    kernel_data,
    kernel_lines,
    kernel_rows,
    sum_lines,
)
from tilewright.compiler.inspect.kernels import kernel_report, nodes_of_calls, pick_kernel
from tilewright.errors import EngineError, UsageError
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.parser import parse_graph, parse_type_text
from tilewright.runtime.image import EngineImage, LMConfig
from tilewright.targets import TARGETS

H100, T = TARGETS["h100"], symbol("T")
SETTINGS = (DECODE, PREFILL)
CACHE = "bf16[N, P, 2, 32]"
GRAPH = f"""def model(x: bf16[T, 64], k_cache_0: {CACHE}, k_cache_1: {CACHE}):
    layers_0_w: bf16[64, 64] = param("layers.0.w")
    linear_0: bf16[T, 64] = linear(x, layers_0_w)
    add_0: bf16[T, 64] = add(linear_0, linear_0)
    layers_1_w: bf16[64, 64] = param("layers.1.w")
    linear_1: bf16[T, 64] = linear(add_0, layers_1_w)
    add_1: bf16[T, 64] = add(linear_1, linear_1)
    norm_w: bf16[64] = param("norm.w")
    mul_0: bf16[T, 64] = mul(add_1, norm_w)
    reshape_0: bf16[T, 8, 8] = reshape(mul_0, shape=(T, 8, 8))
    return {{"y": reshape_0, "k_cache_0": k_cache_0, "k_cache_1": k_cache_1}}
"""
TEXT = """import triton
import triton.language as tl


@triton.jit
def doubled(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < count).to(tl.float32)  # <b>&"not markup"</b></script>
    tl.store(out_ptr + index, (x + x).to(tl.bfloat16), mask=index < count)
"""


def doubled() -> KernelSource:
    """Up to 64 rows in one launch, more in two of another block size."""

    def launch(block: int) -> Launch:
        pointers = (
            Pointer("x_ptr", DType.BF16, "operand", 0),
            Pointer("out_ptr", DType.BF16, "result", 0),
        )
        count = T * 64
        arguments = (*pointers, Scalar("count", count))
        grid = ((count + (block - 1)) // block, 1, 1)
        return Launch("doubled", arguments, grid, {"BLOCK": block})

    small, large = launch(256), launch(1024)
    variants = (Variant((small,), (), (64 - T,)), Variant((large, large)))
    return KernelSource("add", "generated", TEXT, variants)


@pytest.fixture(scope="module")
def image() -> EngineImage:
    (package,) = compile_sources([doubled()], 90)
    ours = f"triton/generated/{package.id}"
    rows = "bf16[T, 64]"
    buffers = {
        **dict.fromkeys(("x", "linear_0", "add_0", "linear_1", "add_1", "mul_0"), rows),
        **dict.fromkeys(("layers_0_w", "layers_1_w"), "bf16[64, 64]"),
        **dict.fromkeys(("k_cache_0", "k_cache_1"), CACHE),
        "norm_w": "bf16[64]",
        "reshape_0": "bf16[T, 8, 8]",
    }
    linear, views = "triton/library/linear", {"views": (None, None)}
    calls = (
        Call(linear, ("x", "layers_0_w"), ("linear_0",), views, origin=("linear",)),
        Call(ours, ("linear_0", "linear_0"), ("add_0",), origin=("add",)),
        Call(linear, ("add_0", "layers_1_w"), ("linear_1",), views, origin=("linear",)),
        Call(ours, ("linear_1", "linear_1"), ("add_1",), origin=("add",)),
        Call("eager/mul", ("add_1", "norm_w"), ("mul_0",), origin=("mul",)),
        Call(
            "eager/reshape", ("mul_0",), ("reshape_0",), {"shape": (T, 8, 8)}, origin=("reshape",)
        ),
    )
    weights = {"layers_0_w": "layers.0.w", "layers_1_w": "layers.1.w", "norm_w": "norm.w"}
    outputs = (("y", "reshape_0"), ("k_cache_0", "k_cache_0"), ("k_cache_1", "k_cache_1"))
    program = Program(
        "model",
        {name: parse_type_text(text) for name, text in buffers.items()},
        ("x", "k_cache_0", "k_cache_1"),
        weights,
        outputs,
        calls,
    )
    return EngineImage(
        "model",
        "causal_lm",
        "h100",
        "triton",
        program,
        package.files(),
        {},
        (("captured", GRAPH),),
        lm=LMConfig(64, 512, 8, 16, "paged", ()),
    )


def test_each_call_is_known_by_the_node_that_it_computes(image):
    graph = parse_graph(GRAPH)
    made = [[node.op for node in nodes] for nodes in nodes_of_calls(graph, image.program)]
    assert made == [["linear"], ["add"], ["linear"], ["add"], ["mul"], ["reshape"]]
    inputs = [nodes[0].operands[0] for nodes in nodes_of_calls(graph, image.program)[:2]]
    assert [node.op for node in inputs] == ["input", "linear"]


def test_launches_follow_the_variant_that_fits_and_views_launch_nothing(image):
    report = kernel_report(image, SETTINGS)
    found = {k.name.split("-")[0]: k for k in report.kernels}
    launches = {name: [k.steps[s.name].launches for s in SETTINGS] for name, k in found.items()}
    # The small variant of one launch at T = 1, the large one of two at T = 512.
    assert launches == {
        "linear": [2, 2],
        "add": [2, 4],
        "eager/mul": [1, 1],
        "eager/reshape": [0, 0],
    }
    assert {name: k.kind for name, k in found.items()} == {
        "linear": "library",
        "add": "generated",
        "eager/mul": "eager",
        "eager/reshape": "eager",
    }
    assert [report.whole[s.name].launches for s in SETTINGS] == [5, 7]
    assert report.layers == 2 and report.a_layer == {"decode": 2.0, "prefill": 3.0}


def test_costs_are_those_of_the_nodes_at_the_rates_of_their_types(image):
    found = {
        k.name.split("-")[0]: k.steps["prefill"] for k in kernel_report(image, SETTINGS).kernels
    }
    rows = 512 * 64 * 2
    assert found["add"].flops == 2 * 512 * 64 and found["add"].bytes == 2 * 2 * rows
    assert found["linear"].flops == 2 * 2 * 512 * 64 * 64
    moved = 2 * (2 * rows + 64 * 64 * 2)
    seconds = max(found["linear"].flops / 989.4e12, moved / 3352e9)
    assert found["linear"].bytes == moved and found["linear"].seconds == pytest.approx(seconds)
    assert found["eager/reshape"].bytes == 0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("dtype", "target", "expected"),
    [
        ("bf16", "h100", "bfloat16"),
        ("f16", "a100", "float16"),
        ("f32", "h100", "float32"),
        ("f64", "h100", "float32"),
        ("i64", "h100", "float32"),
        ("i8", "h100", "float32"),
        ("f8e4m3", "h100", "float8_e4m3fn"),
        ("f8e4m3", "a100", "float32"),
    ],
)
def test_a_node_computes_in_its_own_type_where_the_device_has_a_rate(dtype, target, expected):
    graph = parse_graph(f'def g(x: {dtype}[4]):\n    return {{"y": x}}\n')
    assert compute_dtype(graph.inputs[0], TARGETS[target]) == expected


@pytest.mark.quick
def test_a_product_in_bfloat16_runs_at_the_rate_of_bfloat16():
    texts = (
        f"def g(x: {t}[4096, 4096], w: {t}[4096, 4096]):\n    linear_0: {t}[4096, 4096] = "
        'linear(x, w)\n    return {"y": linear_0}\n'
        for t in ("bf16", "f32")
    )
    half, full = (call_costs(parse_graph(text), H100, {})[0].seconds for text in texts)
    assert half == pytest.approx(2 * 4096**3 / 989.4e12) and full / half == pytest.approx(
        989.4 / 66.9
    )


def test_the_table_has_a_row_a_kernel_with_what_it_takes(image):
    report = kernel_report(image, SETTINGS)
    (package,) = (k.package for k in report.kernels if k.package is not None)
    columns = kernel_columns(SETTINGS)
    rows = {
        row[0]: dict(zip(columns, row, strict=True)) for row in kernel_rows(report, H100, SETTINGS)
    }
    ours, library = rows[package.id], rows["linear"]
    resources = next(iter(package.binaries.values())).resources
    assert ours["registers"] == str(resources.registers) and ours["spills"] == "0"
    assert (ours["threads"], ours["occupancy"], ours["prefill"]) == ("128", "100%", "4")
    assert ours["blocks/SM"] == "16"
    assert library["registers"] == library["occupancy"] == "–" and library["kind"] == "library"
    decode, prefill = sum_lines(report, SETTINGS)
    assert decode.startswith("decode: 5 launches a step, 2 a layer (2 layers); ")
    assert prefill.startswith("prefill: 7 launches a step, 3 a layer (2 layers); ")


def test_one_kernel_shows_each_launch_and_says_which_binaries_run(image):
    kernel = pick_kernel(kernel_report(image, SETTINGS).kernels, "add")
    lines = kernel_lines(kernel, H100, SETTINGS)
    launches = [text for label, text in lines if label == "launch doubled"]
    assert [text.rpartition(", ")[2] for text in launches] == ["BLOCK=256", "BLOCK=1024"]
    assert launches[0].startswith("grid ") and launches[0].endswith(" × 1 × 1, 4 warps, BLOCK=256")
    assert sum(label == "on h100" for label, _ in lines) == 2
    data = kernel_data(kernel, H100)
    assert data["source"] == TEXT and data["launches"] == {"decode": 2, "prefill": 4}
    assert [one["runs_at"] for one in data["binaries"]] == [["decode"], ["prefill"]]
    assert all(
        one["blocks_per_sm"] == 16 and one["limited_by"] == "warps" for one in data["binaries"]
    )


def test_an_unknown_kernel_lists_those_there_are(image):
    kernels = kernel_report(image, SETTINGS).kernels
    with pytest.raises(UsageError, match=r"kernel 'nonesuch'.*linear.*no kernel of that name"):
        pick_kernel(kernels, "nonesuch")
    twice = [replace(k, name=f"add-{i}") for i, k in enumerate(kernels[:2])]
    with pytest.raises(UsageError, match="2 that begin so"):
        pick_kernel(twice, "add")


def test_a_kernel_whose_files_are_missing_is_named(image):
    kept = {name: content for name, content in image.files.items() if "meta" not in name}
    with pytest.raises(EngineError, match="kernel add-"):
        kernel_report(replace(image, files=kept), SETTINGS)


def test_kernels_that_were_only_interpreted_have_no_resources(image):
    from tilewright.codegen.triton.package import KernelPackage

    bare = replace(image, target="cpu", files=KernelPackage(doubled(), {}).files())
    report = kernel_report(bare, SETTINGS)
    rows = [row for row in kernel_rows(report, TARGETS["cpu"], SETTINGS) if row[1] == "generated"]
    assert [row[4:10] for row in rows] == [("–",) * 6]


def test_launches_are_shared_out_where_layers_are_not_numbered(image):
    text = GRAPH.replace("layers.0.w", "a.w").replace("layers.1.w", "b.w")
    report = kernel_report(replace(image, graphs=(("captured", text),)), SETTINGS)
    assert report.a_layer == {"decode": 2.5, "prefill": 3.5}


def test_the_setting_binds_every_symbol(image):
    assert bindings(parse_graph(GRAPH), image, PREFILL) == {"T": 512, "N": 32, "P": 16}


def test_the_page_carries_the_sources_and_cannot_be_left_by_them(image):
    from tilewright.compiler.inspect.html import render_page

    text = render_page(image)
    assert "</b></script>" not in text and "\\u003c/b>\\u003c/script>" in text
    assert "http://" not in text and "https://" not in text
