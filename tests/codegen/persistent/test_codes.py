"""Products of the one launch whose weights are codes: what is read, computed, cut and refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persistent_codes import Coded
from persistent_forms import Model, by_interpreter, step_inputs, together
from tilewright.codegen.persistent.cut import Cut
from tilewright.codegen.persistent.decode import PersistentDecode, in_interpreter
from tilewright.codegen.persistent.lowering import with_one_launch
from tilewright.codegen.persistent.reading import Product, read_decode
from tilewright.codegen.persistent.source import persistent_source
from tilewright.codegen.persistent.table import make_items
from tilewright.codegen.persistent.tiling import Tiling
from tilewright.errors import UnsupportedError
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.ops.quant import unpack4
from tilewright.ir.parser import parse_graph
from tilewright.ir.schema import schema
from tilewright.targets import Target

F8, U8 = DType.F8E4M3, DType.U8
MODEL = Model(layers=1, ffn=32, vocab=32)
ROWS = Coded(F8, rounds=True)
BLOCKS = Coded(F8, group=32, block=16, rounds=True)
FOUR = Coded(U8, group=32)
TILING = Tiling(rows=8, num_warps=1, ahead=1, splits=2, block_n=16, programs=1)
PAGES = [3, 1, 2]


def spread(scale: torch.Tensor, n: int, k: int, coded: Coded) -> torch.Tensor:
    """The scale of each weight, float64 [n, k]."""
    rows = scale.double().repeat_interleave(coded.block, 0)[:n]
    return rows.repeat_interleave(coded.group or k, 1)[:, :k]


def exact_qkv(model: Model, coded: Coded, tensors: dict[str, torch.Tensor], token: int):
    """The first product of a step in float64; x is rounded before where it becomes codes."""
    x, norm = tensors["embed"][token : token + 1], tensors["norm_0"]
    if not coded.rounds:
        x, norm = x.double(), norm.double()
    x = schema("rms_norm").reference(x, norm, eps=1e-5, stepwise=True)
    codes, scale = tensors["qkv_0.codes"], tensors["qkv_0.scale"]
    wide = unpack4(codes)[:, : model.width].double() - 8 if coded.kind is U8 else codes.double()
    weight = wide * spread(scale, len(codes), model.width, coded)
    if coded.rounds:
        x, by = schema("quantize_rows").reference(x, dtype=F8, group=coded.group)
        by = by.repeat_interleave(coded.group or model.width, 1)[:, : model.width]
        return (x.double() * by.double()) @ weight.T
    return x.double() @ weight.T


@pytest.mark.parametrize(
    ("coded", "model", "batch"),
    [
        (ROWS, replace(MODEL, width=520), 1),  # more of x than registers hold, not whole chunks
        (BLOCKS, MODEL, 1),
        (FOUR, MODEL, 2),
        (Coded(U8, group=128), replace(MODEL, ffn=40), 1),  # a last group that is filled up
    ],
)
def test_it_computes_what_the_graph_says(coded: Coded, model: Model, batch: int) -> None:
    graph = coded.graph(model.graph())
    tensors = coded.tensors(model.tensors(1, 8))
    shape, tiling = read_decode(graph), replace(TILING, batch=batch)
    launch = in_interpreter(persistent_source(shape, tiling, device=False))
    ours = PersistentDecode(shape, tiling, tensors, launch, torch.device("cpu"), limit=10)
    steps = [step_inputs([page + i for page in PAGES], 6, 5, model.page) for i in range(batch)]
    inputs = together(steps)
    logits = by_interpreter(graph, tensors, inputs)["logits"].float()
    ours.run(inputs, tensors)
    ours.check()
    exact = exact_qkv(model, coded, tensors, 5)
    found = ours.results[shape.calls[1].out].double()
    torch.testing.assert_close(found, exact.expand_as(found), rtol=2**-8, atol=1e-4)
    # Where x is rounded, another order of sums may take another code here and there.
    far = 0.2 if coded.rounds else 0.06
    torch.testing.assert_close(ours.logits.float(), logits, rtol=0.05, atol=far)


@given(
    coded=st.sampled_from([ROWS, BLOCKS, FOUR, Coded(F8, group=128)]),
    num_warps=st.sampled_from([1, 2]),
    programs=st.integers(1, 5),
)
@settings(max_examples=6)
def test_each_chunk_names_its_codes_and_scales(coded: Coded, num_warps: int, programs: int) -> None:
    shape = read_decode(coded.graph(replace(MODEL, width=544, vocab=64).graph()))
    tiling = replace(TILING, num_warps=num_warps, programs=programs)
    cut, codes = Cut.of(shape, tiling), shape.codes
    assert codes is not None
    names = {name for s in shape.calls for name in (s.weight, s.scale) if name}
    where = {name: (index + 1) << 40 for index, name in enumerate(sorted(names))}
    entries = make_items(shape, tiling, where).reshape(-1, 4).unique(dim=0).tolist()
    for step in shape.calls:
        form = shape.form(step)
        if not isinstance(form, Product):
            continue
        columns, bits = cut.columns(form), form.bits
        own = [entry for entry in entries if entry[0] >> 40 == where[step.weight] >> 40]
        seen = set()
        for address, pitch, words, scales in own:
            row, byte = divmod(address - where[step.weight], form.row_bytes)
            column = byte * 8 // bits
            seen |= {(r, column) for r in range(row, row + tiling.rows)}
            assert pitch * 4 * cut.per_thread == form.row_bytes
            assert words & 0xFFFFFFFF == min(form.k - column, columns) * bits // 32
            if step.scale and codes.group:
                groups = -(-form.k // codes.group)
                at = row // codes.block * groups + column // codes.group
                assert scales == where[step.scale] + at * codes.scale_bytes
                assert words >> 32 == (groups if codes.block == 1 else 0)
        assert seen == {(r, c) for r in range(form.n) for c in range(0, form.k, columns)}


def test_the_bytes_of_codes_are_counted() -> None:
    def of_layers(graph: Graph) -> int:
        shape = read_decode(graph)
        forms = [shape.form(step) for step in shape.calls[:-1]]
        return sum(form.weight_bytes for form in forms if isinstance(form, Product))

    graph = MODEL.graph()
    for coded in (ROWS, BLOCKS, FOUR):
        held = coded.tensors(MODEL.tensors(1, 2))
        parts = [t for name, t in held.items() if name.endswith((".codes", ".scale"))]
        assert of_layers(coded.graph(graph)) == sum(t.numel() * t.element_size() for t in parts)


def with_zero_points() -> str:
    """A graph whose first product has them."""
    text = str(FOUR.graph(MODEL.graph()))
    for old, new in (
        ("w_scale: bf16[128, 2]", "w_scale: bf16[128, 2], zero: u8[128, 2]"),
        ("dequantize(w_codes, w_scale,", "dequantize(w_codes, w_scale, zero,"),
        ("qkv_0_scale, body", "qkv_0_scale, points, body"),
        ("    qkv_0_scale:", '    points: u8[128, 2] = param("points")\n    qkv_0_scale:'),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    return text


def of_two_kinds() -> str:
    """A graph whose first product has scales by groups, and the others by rows."""
    text = str(ROWS.graph(MODEL.graph()))
    for old, new in (
        ("w_scale: f32[128, 1]", "w_scale: f32[128, 2]"),
        (
            "f32[B, 1],) = quantize_rows(rms_norm_0, dtype=f8e4m3, group=0)",
            "f32[B, 2],) = quantize_rows(rms_norm_0, dtype=f8e4m3, group=32)",
        ),
        ("item_1: f32[B, 1]", "item_1: f32[B, 2]"),
        ("dtype=bf16, group=0", "dtype=bf16, group=32"),
        ("qkv_0_scale: f32[128, 1]", "qkv_0_scale: f32[128, 2]"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    return text


@pytest.mark.parametrize(
    ("graph", "named"),
    [
        (replace(ROWS, tries=4).graph(MODEL.graph()), "rms_norm . quantize_rows . scaled_linear"),
        (Coded(DType.I8).graph(MODEL.graph()), "rms_norm . dequantize . linear"),
        (replace(BLOCKS, group=48).graph(MODEL.graph()), "rms_norm . quantize_rows"),
        (replace(BLOCKS, block=8).graph(MODEL.graph()), "rms_norm . quantize_rows"),
        (BLOCKS.graph(replace(MODEL, ffn=40).graph()), "rms_norm . quantize_rows"),
        (parse_graph(with_zero_points()), "rms_norm . dequantize . linear"),
        (parse_graph(of_two_kinds()), "quantize_rows . scaled_linear . add"),
    ],
)
def test_codes_that_it_does_not_know_stop_it_by_name(graph: Graph, named: str) -> None:
    with pytest.raises(UnsupportedError, match=f"one launch for all layers: {named}"):
        read_decode(graph)


def test_codes_are_for_devices_that_convert_them() -> None:
    graph = ROWS.graph(MODEL.graph())
    with pytest.raises(UnsupportedError, match=r"f8e4m3: expected a device.*sm_80"):
        with_one_launch(None, graph, Target.parse("a100"))  # type: ignore[arg-type]
