"""Kernels over a cache of codes on a GPU, against float64 over what the codes stand for: random
forms and cuts, data in poisoned memory; and an engine that generates with one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import append_forms
import paged_forms
import tilewright as tw
from gpu_kernels import PHASES, examples, here, on_device, poisoned_kernels
from tilewright.codegen.triton.kernels.scaled_attention import emit_scaled_attention
from tilewright.codegen.triton.kernels.scaled_decode import scaled_decode_source
from tilewright.codegen.triton.kernels.scaled_tiles import (
    decode_fits,
    decode_tiles,
    scaled_problem,
)
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.source import KernelSource, has_pdl
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tiny_models import PROMPTS, tiny_model

pytestmark = pytest.mark.gpu
FLOATS = st.sampled_from([DType.F32, DType.BF16, DType.F16])
SEEDS = st.integers(0, 9999)


def codes() -> st.SearchStrategy[DType]:
    """Those that the device has a type for."""
    return st.sampled_from([DType.I8, DType.F8E4M3] if here().arch >= 89 else [DType.I8])


@st.composite
def shapes(draw: st.DrawFn) -> paged_forms.Shape:
    """Shapes of any head dim, as models have them and as they do not."""
    widths = [(16, 16), (17, 8), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)]
    head_dim, value_dim = draw(st.sampled_from(widths))
    shape = replace(draw(paged_forms.SHAPES), head_dim=head_dim, value_dim=value_dim)
    return replace(shape, dtype=draw(FLOATS), codes=draw(codes()))


Attending = tuple[paged_forms.Shape, Node, KernelSource]


@st.composite
def decodes(draw: st.DrawFn) -> Attending:
    """A shape with the default tiles, or with others that fit."""
    shape, target = draw(shapes()), here()
    node = paged_forms.decode_call(shape, **draw(paged_forms.FEATURES))
    problem = scaled_problem(node, paged_forms.layouts_of(node), target)
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
    return shape, node, scaled_decode_source(problem, tiles, target)


LENGTHS = st.lists(
    st.sampled_from([0, 1, 7, 8, 16, 17, 63, 64, 65, 135, 300, 1100]), min_size=1, max_size=4
)


def test_scaled_decode() -> None:
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
    """A shape with its default tiles."""
    shape = draw(shapes())
    node = paged_forms.ragged_call(shape, **draw(paged_forms.FEATURES))
    source = emit_scaled_attention(node, paged_forms.layouts_of(node), here())
    assert source is not None
    return shape, node, source


def test_scaled_attention() -> None:
    drawn_calls = examples(attentions(), 12)
    kernels = poisoned_kernels([(source, node) for _, node, source in drawn_calls])

    @settings(max_examples=12, phases=PHASES)
    @given(sequences=paged_forms.RAGGED, padding=st.sampled_from([0, 0, 1, 9]), seed=SEEDS)
    def agree(sequences: list[tuple[int, int]], padding: int, seed: int) -> None:
        torch.manual_seed(seed)
        for (shape, node, _), kernel in zip(drawn_calls, kernels, strict=True):
            operands, sizes = paged_forms.ragged_operands(shape, sequences, padding)
            _attend(shape, node, kernel, operands, sizes)

    agree()


def _attend(shape, node, kernel, operands, sizes) -> None:
    """The kernel's result on these operands is that of the reference in float64."""
    given_ = [on_device(operand) for operand in operands]
    (found,) = kernel(given_, sizes)
    relative, absolute = paged_forms.OP.tolerance[shape.dtype]
    wanted = paged_forms.truth(shape, node, given_)
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)


def narrow(form: append_forms.Form, codes: DType, tries: int | None) -> append_forms.Form:
    """The form over codes, without float64."""
    dtypes = {name: getattr(form, name) for name in ("dtype", "tables", "weights")}
    dtypes = {name: DType.F32 if d is DType.F64 else d for name, d in dtypes.items()}
    return replace(form, codes=codes, tries=tries, **dtypes)


def test_scaled_append_kv() -> None:
    tries = st.sampled_from([None, 8])
    forms = examples(st.builds(narrow, append_forms.forms(), codes(), tries), 20)
    nodes = [append_forms.call(form) for form in forms]
    pdl = has_pdl(here())
    sources = [append_forms.source_of(node, None, pdl) for node in nodes]
    kernels = poisoned_kernels(list(zip(sources, nodes, strict=True)))

    @settings(max_examples=10, phases=PHASES)
    @given(slots=append_forms.slot_lists(), seed=SEEDS)
    def agree(slots: list[int], seed: int) -> None:
        torch.manual_seed(seed)
        for form, node, kernel in zip(forms, nodes, kernels, strict=True):
            before = append_forms.buffers_of(node, slots)
            after = {base: on_device(tensor) for base, tensor in before.items()}
            given_ = [None if arg is None else after[located(arg)[0]] for arg in node.args]
            found = kernel(given_, append_forms.sizes_of(slots))
            append_forms.assert_appended(form, slots, before, [x.cpu() for x in found])

    agree()


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_an_engine_gives_the_tokens_of_the_eager_one(dtype: str) -> None:
    """The same codes on both sides, and no logits of these prompts that are nearly equal."""
    if dtype == "fp8" and here().arch < 89:
        pytest.skip("the device has no e4m3")
    params = tw.SamplingParams(max_new_tokens=8, ignore_eos=True)
    config = tw.KVCacheConfig(page_size=8, dtype=dtype)  # type: ignore[arg-type]
    found = []
    for backend, target in (("triton", "auto"), ("eager", "cpu")):
        model = tiny_model("llama")
        engine = tw.compile(model, backend=backend, target=target, kv_cache=config)
        found.append([c.token_ids for c in engine.generate(list(PROMPTS), params)])
    assert found[0] == found[1]
