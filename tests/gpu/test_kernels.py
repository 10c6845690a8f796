"""Every kernel of a decode step on a GPU, against its op in float64: random forms and cuts, data in
poisoned memory, and chains of launches that overlap.

The kernels of a test are drawn and compiled at once, then each of them runs on each example.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import append_forms
import linear_forms
import paged_forms
import sample_forms
from fused_bodies import CLOSE, bodies, spots
from gpu_kernels import PHASES, examples, here, on_device, poisoned_kernels
from tilewright.codegen.triton.generate import emit_fused
from tilewright.codegen.triton.kernels import sample
from tilewright.codegen.triton.kernels.append_kv import SPACE as APPEND_SPACE
from tilewright.codegen.triton.kernels.append_kv import Tiles as AppendTiles
from tilewright.codegen.triton.kernels.append_kv import fits as append_fits
from tilewright.codegen.triton.kernels.linear import emit_linear, linear_source
from tilewright.codegen.triton.kernels.linear_tiles import GemmTiles, GemvTiles, shared_bytes
from tilewright.codegen.triton.kernels.paged_attention import emit_paged_attention
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem as PagedProblem
from tilewright.codegen.triton.kernels.paged_decode import paged_decode_source
from tilewright.codegen.triton.kernels.paged_decode_tiles import default_tiles as decode_tiles
from tilewright.codegen.triton.kernels.paged_decode_tiles import fits as decode_fits
from tilewright.codegen.triton.kernels.sample import Tiles as SampleTiles
from tilewright.codegen.triton.kernels.sample import default_tiles as sample_tiles
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.source import KernelSource, has_pdl
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from triton_bodies import call_of, drawn, placed

pytestmark = pytest.mark.gpu
FLOATS = st.sampled_from([DType.F32, DType.BF16, DType.F16])
TOKENS = st.sampled_from([1, 1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 130])
SEEDS = st.integers(0, 9999)


@st.composite
def linears(draw: st.DrawFn) -> tuple[linear_forms.Form, KernelSource]:
    """A form with the default tiles, or with others that fit."""
    form = draw(linear_forms.forms(large=True))
    node, target = linear_forms.node_of(form), here()
    if draw(st.booleans()):
        source = emit_linear(node, tuple(located(o)[1] for o in node.operands), target)
        assert source is not None
        return form, source
    problem = linear_forms.problem_of(node)
    assert problem is not None
    narrow = form.dtype is DType.F32  # whose dots take operands in registers
    tiles = GemmTiles(
        block_m=draw(st.sampled_from([16, 32] + [64] * (not narrow))),
        block_n=draw(st.sampled_from([16, 32] if narrow else [16, 64, 128])) // problem.parts,
        block_k=draw(st.sampled_from([16, 32] if narrow else [16, 64, 128])),
        num_warps=4,
        num_stages=draw(st.integers(1, 4)),
        splits=draw(st.integers(1, 6)),
        ahead=draw(st.sampled_from([0, 1024])),
    )
    tiles = tiles if tiles.has_work(form.k) else replace(tiles, splits=1)
    if shared_bytes(problem, tiles) > target.shared_memory_per_block:
        tiles = replace(tiles, num_stages=1)
    widths = (st.sampled_from(values) for values in ([1, 2, 8], [32, 256, 1024], [1, 4, 8]))
    source = linear_source(problem, target, draw(st.builds(GemvTiles, *widths)), [tiles])
    assert source is not None
    return form, source


def test_linears() -> None:
    forms = examples(linears(), 20)
    nodes = [linear_forms.node_of(form) for form, _ in forms]
    kernels = poisoned_kernels([(s, n) for (_, s), n in zip(forms, nodes, strict=True)])

    @settings(max_examples=12, phases=PHASES)
    @given(tokens=TOKENS, seed=SEEDS)
    def agree(tokens: int, seed: int) -> None:
        for (form, _), kernel in zip(forms, kernels, strict=True):
            bases, operands = linear_forms.operands_of(form, tokens, seed, "cuda")
            found = kernel(bases, {"B": tokens})[0]
            wanted = linear_forms.in_float64(linear_forms.body_of(form), operands)
            linear_forms.assert_close(form, found, wanted)
            again = kernel(bases, {"B": tokens})[0]  # parts are added up in one order
            assert torch.equal(found, again)

    agree()


@st.composite
def paged_shapes(draw: st.DrawFn) -> paged_forms.Shape:
    """Shapes of any head dim, as models have them and as they do not."""
    widths = [(16, 16), (17, 8), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
    head_dim, value_dim = draw(st.sampled_from(widths))
    shape = draw(paged_forms.SHAPES)
    return replace(shape, head_dim=head_dim, value_dim=value_dim, dtype=draw(FLOATS))


Attending = tuple[paged_forms.Shape, Node, KernelSource]


@st.composite
def decodes(draw: st.DrawFn) -> Attending:
    """A shape with the default tiles, or with others that fit."""
    shape, target = draw(paged_shapes()), here()
    node = paged_forms.decode_call(shape, **draw(paged_forms.FEATURES))
    problem = PagedProblem.of(node, paged_forms.layouts_of(node))
    assert problem is not None
    tiles = decode_tiles(problem, target)
    assert tiles is not None
    other = replace(
        tiles,
        block_n=draw(st.sampled_from([16, 32, tiles.block_n])),
        num_stages=draw(st.integers(1, 4)),
        waves=draw(st.sampled_from([1, 2, 8])),
        min_keys=draw(st.sampled_from([16, 64, 256])),
        prefetch=draw(st.sampled_from([0, 1, 4])),
        by_page=draw(st.booleans()),
        evict_first=draw(st.booleans()),
        fixed_split_keys=draw(st.sampled_from([None, None, 64])),
    )
    if draw(st.booleans()) and decode_fits(problem, other, target):
        tiles = other
    return shape, node, paged_decode_source(problem, tiles, target)


LENGTHS = st.lists(
    st.sampled_from([0, 1, 7, 8, 16, 17, 63, 64, 65, 135, 300, 1100]), min_size=1, max_size=4
)


def test_paged_decode() -> None:
    drawn_calls = examples(decodes(), 20)
    kernels = poisoned_kernels([(source, node) for _, node, source in drawn_calls])

    @settings(max_examples=10, phases=PHASES)
    @given(lengths=LENGTHS, seed=SEEDS)
    def agree(lengths: list[int], seed: int) -> None:
        torch.manual_seed(seed)
        for (shape, node, _), kernel in zip(drawn_calls, kernels, strict=True):
            operands, sizes = paged_forms.decode_operands(shape, lengths)
            _attend(shape, node, kernel, operands, sizes)

    agree()


@st.composite
def attentions(draw: st.DrawFn) -> Attending:
    """A shape with the tiles of both variants."""
    shape = draw(paged_shapes())
    node = paged_forms.ragged_call(shape, **draw(paged_forms.FEATURES))
    source = emit_paged_attention(node, paged_forms.layouts_of(node), here())
    assert source is not None
    return shape, node, source


STEPS = st.lists(
    st.tuples(st.sampled_from([0, 1, 30, 135, 700]), st.integers(0, 1)), min_size=1, max_size=5
)


def test_paged_attention() -> None:
    drawn_calls = examples(attentions(), 12)
    # As a mix may run a step of one token a sequence too: the variant of any tokens alone.
    ragged = [replace(source, variants=source.variants[-1:]) for _, _, source in drawn_calls]
    nodes = [node for _, node, _ in drawn_calls]
    sources = [*(source for _, _, source in drawn_calls), *ragged]
    kernels = poisoned_kernels(list(zip(sources, nodes + nodes, strict=True)))

    @settings(max_examples=12, phases=PHASES)
    @given(
        sequences=paged_forms.RAGGED | STEPS,
        padding=st.sampled_from([0, 0, 1, 9]),
        seed=SEEDS,
    )
    def agree(sequences: list[tuple[int, int]], padding: int, seed: int) -> None:
        torch.manual_seed(seed)
        for index, (shape, node, _) in enumerate(drawn_calls):
            operands, sizes = paged_forms.ragged_operands(shape, sequences, padding)
            for kernel in kernels[index :: len(drawn_calls)]:
                _attend(shape, node, kernel, operands, sizes)

    agree()


def _attend(shape, node, kernel, operands, sizes) -> None:
    """The kernel's result on these operands is that of the reference in float64."""
    given = [on_device(operand) for operand in operands]
    (found,) = kernel(given, sizes)
    relative, absolute = paged_forms.OP.tolerance[shape.dtype]
    wanted = paged_forms.truth(shape, node, given)
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)


@st.composite
def appends(draw: st.DrawFn) -> tuple[append_forms.Form, AppendTiles | None]:
    """A form with the default tiles, or with others that fit."""
    form = draw(append_forms.forms())
    values = (st.sampled_from(APPEND_SPACE[name]) for name in ("block_heads", "num_warps"))
    tiles = draw(st.none() | st.builds(AppendTiles, *values))
    problem = append_forms.problem_of(append_forms.call(form))
    assert problem is not None
    return form, tiles if tiles is not None and append_fits(problem, tiles) else None


def test_append_kv() -> None:
    forms = examples(appends(), 24)
    nodes = [append_forms.call(form) for form, _ in forms]
    pdl = has_pdl(here())
    sources = [
        append_forms.source_of(node, tiles, pdl)
        for (_, tiles), node in zip(forms, nodes, strict=True)
    ]
    kernels = poisoned_kernels(list(zip(sources, nodes, strict=True)))

    @settings(max_examples=10, phases=PHASES)
    @given(slots=append_forms.slot_lists(), seed=SEEDS)
    def agree(slots: list[int], seed: int) -> None:
        torch.manual_seed(seed)
        for (form, _), node, kernel in zip(forms, nodes, kernels, strict=True):
            before = append_forms.buffers_of(node, slots)
            after = {base: on_device(tensor) for base, tensor in before.items()}
            given = [None if arg is None else after[located(arg)[0]] for arg in node.args]
            found = kernel(given, append_forms.sizes_of(slots))
            append_forms.assert_appended(form, slots, before, [x.cpu() for x in found])

    agree()


SAMPLES: tuple[tuple[int, DType, SampleTiles | None, int], ...] = (  # …, capacity of a row's list
    (1, DType.F32, sample_forms.SMALL, 16384),
    (17, DType.BF16, sample_forms.SMALL, 16384),
    (64, DType.F16, SampleTiles(16, 128, 4, 1), 16384),
    (300, DType.BF16, sample_forms.SMALL, 16),  # no list holds what survives
    (1500, DType.F32, SampleTiles(128, 512, 4, 3), 32),
    (1500, DType.BF16, None, 16384),
    (5000, DType.F32, None, 16384),
    (50_257, DType.F16, None, 16384),
    (128_256, DType.BF16, None, 16384),
)


def test_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for vocab, dtype, tiles, capacity in SAMPLES:
        monkeypatch.setattr(sample, "_CAPACITY", capacity)
        node = sample_forms.wide_call(vocab, dtype)
        problem = sample_forms.problem_of(node)
        assert problem is not None
        own = tiles or sample_tiles(problem)
        calls.append((sample_forms.source_of(node, own, has_pdl(here())), node))
    kernels = poisoned_kernels(calls)

    @settings(max_examples=60, phases=PHASES)
    @given(data=st.data(), index=st.integers(0, len(SAMPLES) - 1), count=st.integers(1, 3))
    def agree(data: st.DataObject, index: int, count: int) -> None:
        vocab, dtype, _, _ = SAMPLES[index]
        logits = data.draw(sample_forms.logits_of(count, vocab, dtype))
        rows = [data.draw(sample_forms.rows_of(vocab)) for _ in range(count)]
        operands = [sample_forms.widened(logits), *sample_forms.parameters(rows)]
        (found,) = kernels[index]([on_device(x) for x in operands], {"R": count})
        sample_forms.assert_acceptable(logits, rows, found.tolist())

    agree()


def test_padding_rows_of_a_step_that_samples_are_harmless() -> None:
    """Whatever stands in rows that nobody reads: a token or -1, and no read outside of the row."""
    node = sample_forms.wide_call(300, DType.F32)
    problem = sample_forms.problem_of(node)
    assert problem is not None
    source = sample_forms.source_of(node, sample_tiles(problem), has_pdl(here()))
    (kernel,) = poisoned_kernels([(source, node)])
    inf, nan = sample_forms.INFINITY, sample_forms.NAN
    rows = [
        (nan, -5, nan, nan, nan),
        (1.0, 2**31 - 1, -1.0, 7.0, 2.0),
        (1e-45, -(2**31), 0.0, -1.0, -1.0),
        (inf, 3, inf, inf, inf),
    ]
    logits = torch.randn(4, 300)
    logits[0] = nan
    operands = [sample_forms.widened(logits), *sample_forms.parameters(rows)]
    (found,) = kernel([on_device(x) for x in operands], {"R": 4})
    assert found[0] == -1 and all(0 <= token < 300 for token in found[1:].tolist())


@st.composite
def generated(draw: st.DrawFn) -> tuple[Graph, list[dict[str, object]]]:
    """A body, and where its operands lie (keywords of ``placed``)."""
    body = draw(bodies(draw(st.booleans()), steady=True))
    return body, [spots(draw, node.type) for node in body.inputs]


def test_generated_kernels() -> None:
    forms = examples(generated(), 24)
    calls = []
    for body, where in forms:
        values = [drawn(node.type, {"T": 1}) for node in body.inputs]
        layouts = tuple(
            placed(value, node.type, **spot)[1]
            for value, node, spot in zip(values, body.inputs, where, strict=True)
        )
        node = call_of(body)
        source = emit_fused(node, layouts, here())
        assert source is not None, str(body)
        calls.append((source, node))
    kernels = poisoned_kernels(calls)

    @settings(max_examples=10, phases=PHASES)
    @given(tokens=st.sampled_from([1, 2, 5, 13, 100]), seed=SEEDS)
    def agree(tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        for (body, where), kernel in zip(forms, kernels, strict=True):
            values = [drawn(node.type, {"T": tokens}) for node in body.inputs]
            operands = [
                placed(value, node.type, **spot)[0]
                for value, node, spot in zip(values, body.inputs, where, strict=True)
            ]
            found = kernel([on_device(operand) for operand in operands], {"T": tokens})
            assert_body(body, values, found)

    agree()


def assert_body(body: Graph, values: list[torch.Tensor], found) -> None:
    """Results are those of the body in the types that it declares, but for an error of its largest
    value: exponentials and sums of a GPU differ from a CPU's in their last bits.
    """
    largest = 1.0

    def watch(node: Node, value) -> None:
        nonlocal largest
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            finite = value[value.isfinite()].double()
            largest = max(largest, float(finite.abs().max()) if len(finite) else 0.0)

    for ours, wanted in zip(found, interpret(body, values, watch=watch), strict=True):
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
        off = CLOSE[DType.from_torch(ours.dtype)] * largest
        torch.testing.assert_close(
            ours.cpu().double(), wanted.double(), rtol=0, atol=off, equal_nan=True
        )
