"""Weights in codes as numbers against the op's reference: equal to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewright as tw
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.dequantize import emit_dequantize
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.sass import code_listing, instruction_counts
from tilewright.ir.build import input_node, make
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.ops.quant import blocks, packed_width
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS
from tiny_models import PROMPTS, tiny_model
from triton_running import run_interpreted

H100 = TARGETS["h100"]
FLOATS = st.sampled_from([DType.F32, DType.F16, DType.BF16])
ZEROS = st.sampled_from([None, DType.F32, DType.F16, DType.BF16, DType.U8, DType.I8])


def weight(
    codes: DType = DType.U8,
    n: int = 5,
    k: int = 40,
    group: int = 16,
    rows: int = 1,
    scale: DType = DType.F32,
    zero: DType | None = None,
    dtype: DType = DType.BF16,
) -> Node:
    packed = codes is DType.U8
    width = packed_width(k, group) if packed else k
    shape = (blocks(n, rows), blocks(k, group))
    q = input_node("q", TensorType(codes, (n, width)))
    s = input_node("s", TensorType(scale, shape))
    z = None if zero is None else input_node("z", TensorType(zero, shape))
    own = k if packed else None
    return make("dequantize", q, s, z, dtype=dtype, rows=rows, group=group, width=own)


def operands_of(node: Node, seed: int) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor | None] = []
    for arg in node.args:
        if arg is None:
            found.append(None)
            continue
        shape = [int(size) for size in arg.shape]
        if arg.dtype in (DType.U8, DType.I8):
            low, high = (0, 256) if arg.dtype is DType.U8 else (-127, 128)
            value = torch.randint(low, high, shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator) * (9 if arg.dtype.is_float8 else 1)
        found.append(value.to(arg.dtype.torch))
    return found


def layouts_of(node: Node) -> list:
    return [None if arg is None else located(arg)[1] for arg in node.args]


def check(node: Node, seed: int = 0) -> None:
    source = emit_dequantize(node, layouts_of(node), H100)
    assert source is not None
    operands = operands_of(node, seed)
    (found,) = run_interpreted(source, node, operands, {})
    wanted = schema("dequantize").reference(*operands, **dict(node.attrs))
    assert torch.equal(found, wanted)


@settings(max_examples=25)
@given(
    st.sampled_from([DType.U8, DType.I8, DType.F8E4M3]),
    st.integers(1, 9),
    st.integers(1, 80),
    st.sampled_from([0, 2, 12, 16, 32, 64]),
    st.sampled_from([0, 1, 4]),
    FLOATS,
    ZEROS,
    FLOATS,
    st.integers(0, 999),
)
def test_any_form(codes, n, k, group, rows, scale, zero, dtype, seed) -> None:
    check(weight(codes, n, k, group, rows, scale, zero, dtype), seed)


@pytest.mark.parametrize("group", [0, 128, 96])
def test_rows_of_several_blocks(group) -> None:
    check(weight(n=3, k=2304, group=group))
    check(weight(DType.I8, n=9, k=1100, group=group))


def test_what_it_does_not_take() -> None:
    forms = ({"scale": DType.F64}, {"dtype": DType.F64}, {"zero": DType.F64})
    for node in (weight(**form) for form in forms):
        assert emit_dequantize(node, layouts_of(node), H100) is None
    node = weight(DType.F8E4M3)
    assert emit_dequantize(node, layouts_of(node), TARGETS["a100"]) is None
    assert emit_dequantize(node, layouts_of(node), TARGETS["l4"]) is not None
    first, *rest = layouts_of(node)
    assert emit_dequantize(node, [replace(first, offset=16), *rest], H100) is None
    assert emit_dequantize(node.args[0], [], H100) is None


def widths(counts: Mapping[str, int], kind: str) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name.startswith(kind)}


@pytest.mark.parametrize("codes", [DType.U8, DType.I8, DType.F8E4M3])
def test_it_compiles_without_spills_and_stores_widely(codes) -> None:
    node = weight(codes, 4096, 14336, 128)
    source = emit_dequantize(node, layouts_of(node), H100)
    assert source is not None
    (package,) = compile_sources([source], 90)
    (found,) = package.resources
    assert found.spills == 0 and found.registers <= 128
    (cubin,) = (data for name, data in package.files().items() if name.endswith(".cubin"))
    counts = instruction_counts(code_listing(cubin))
    # A thread has 32 numbers: as codes of 4 bits 16 bytes, else 32; as bfloat16 64.
    assert widths(counts, "STG") == {"STG.E.128": 4}
    codes_read = {k: n for k, n in widths(counts, "LDG").items() if k.endswith(".128")}
    assert sum(codes_read.values()) == (1 if codes is DType.U8 else 2)


@pytest.mark.parametrize(
    "scheme, form, dtype",
    [
        # In bfloat16 two of its tokens are exactly as likely, with a weight from torch as well.
        ("int4", {"group": 32, "symmetric": False}, "float32"),
        pytest.param("int8-weight", {}, "bfloat16", marks=pytest.mark.nightly),
    ],
)
def test_prefill_of_an_engine_runs_nothing_of_it_in_torch(scheme, form, dtype) -> None:
    options = {"target": "cpu", "max_model_len": 64, "verify": "off", "dtype": dtype}
    quantize = tw.QuantConfig(scheme, method="rtn", **form)
    engine = tw.compile(tiny_model("llama"), backend="triton", quantize=quantize, **options)
    kernels = [call.kernel for call in engine.image.program.calls]
    assert any(kernel.startswith("triton/template/dequantize-") for kernel in kernels)
    assert not any(kernel.startswith("eager/dequantize") for kernel in kernels)
    params = tw.SamplingParams(max_new_tokens=3, ignore_eos=True)
    eager = tw.compile(tiny_model("llama"), backend="eager", quantize=quantize, **options)
    found, wanted = (
        [one.token_ids for one in each.generate(PROMPTS[:2], params)] for each in (engine, eager)
    )
    assert found == wanted
