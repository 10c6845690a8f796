"""First keys behind a window on a GPU: the kernels of attention over pages against float64, in
poisoned memory, and engines that go on without end in constant memory.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paged_forms
import tilewright as tw
from gpu_kernels import PHASES, examples, here, on_device, poisoned_kernels
from tilewright.codegen.triton.kernels.paged_attention import emit_paged_attention
from tilewright.codegen.triton.kernels.paged_decode import emit_paged_decode
from tilewright.codegen.triton.kernels.scaled_attention import emit_scaled_attention
from tilewright.codegen.triton.kernels.scaled_decode import emit_scaled_decode
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.runtime.engine import CausalLMEngine
from tiny_models import PROMPTS, tiny_model

pytestmark = pytest.mark.gpu
SEEDS = st.integers(0, 9999)
WINDOWS = st.sampled_from([1, 7, 16, 60, 300])
Attending = tuple[paged_forms.Shape, Node, KernelSource]


@st.composite
def shapes(draw: st.DrawFn) -> paged_forms.Shape:
    """Shapes over numbers and over the codes that the device has a type for."""
    width = draw(st.sampled_from([16, 17, 64, 80, 128, 256]))
    codes = [None, None, DType.I8, *([DType.F8E4M3] if here().arch >= 89 else [])]
    return replace(
        draw(paged_forms.SHAPES),
        head_dim=width,
        value_dim=width,
        alibi=False,
        dtype=draw(st.sampled_from([DType.F32, DType.BF16, DType.F16])),
        codes=draw(st.sampled_from(codes)),
        first=draw(st.sampled_from([1, 4, 16, 33])),
    )


@st.composite
def calls(draw: st.DrawFn, decodes: bool) -> Attending:
    """A shape with its default tiles."""
    shape = draw(shapes())
    call = paged_forms.decode_call if decodes else paged_forms.ragged_call
    node = call(shape, window=draw(WINDOWS), softcap=draw(st.sampled_from([None, 4.0])))
    if decodes:
        emit = emit_paged_decode if shape.codes is None else emit_scaled_decode
    else:
        emit = emit_paged_attention if shape.codes is None else emit_scaled_attention
    source = emit(node, paged_forms.layouts_of(node), here())
    assert source is not None
    return shape, node, source


LENGTHS = st.lists(
    st.sampled_from([0, 1, 7, 16, 17, 64, 65, 135, 300, 1100]), min_size=1, max_size=4
)


def test_decode() -> None:
    drawn = examples(calls(decodes=True), 16)
    kernels = poisoned_kernels([(source, node) for _, node, source in drawn])

    @settings(max_examples=10, phases=PHASES)
    @given(lengths=LENGTHS, seed=SEEDS)
    def agree(lengths: list[int], seed: int) -> None:
        torch.manual_seed(seed)
        for (shape, node, _), kernel in zip(drawn, kernels, strict=True):
            _attend(shape, node, kernel, *paged_forms.decode_operands(shape, lengths))

    agree()


def test_prefill_and_mixed_steps() -> None:
    drawn = examples(calls(decodes=False), 12)
    kernels = poisoned_kernels([(source, node) for _, node, source in drawn])

    @settings(max_examples=10, phases=PHASES)
    @given(sequences=paged_forms.RAGGED, padding=st.sampled_from([0, 1, 9]), seed=SEEDS)
    def agree(sequences: list[tuple[int, int]], padding: int, seed: int) -> None:
        torch.manual_seed(seed)
        for (shape, node, _), kernel in zip(drawn, kernels, strict=True):
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


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_an_endless_engine_gives_the_tokens_of_the_eager_one(dtype: str) -> None:
    """In graphs of decode steps that are launched ahead, over pages that change hands. Codes that
    round another way make other tokens some day.
    """
    count = 120 if dtype == "auto" else 24
    params = tw.SamplingParams(max_new_tokens=count, ignore_eos=True)
    config = tw.KVCacheConfig(page_size=8, window=16, sinks=2, dtype=dtype)  # type: ignore[arg-type]
    found = []
    for backend, target in (("triton", "auto"), ("eager", "cpu")):
        model = tiny_model("llama")
        engine = tw.compile(model, backend=backend, target=target, kv_cache=config)
        assert isinstance(engine, CausalLMEngine)
        found.append([c.token_ids for c in engine.generate(list(PROMPTS), params)])
    assert found[0] == found[1]


def test_memory_is_constant_over_a_stream_far_beyond_the_context() -> None:
    config = tw.KVCacheConfig(page_size=16, window=64, sinks=4)
    model = tiny_model("llama")
    engine = tw.compile(model, backend="triton", kv_cache=config, max_batch_size=2)
    assert isinstance(engine, CausalLMEngine)
    pages = engine.config.most_pages
    assert engine.pool.num_pages == 2 * pages + 1
    torch.cuda.synchronize()
    prompt = PROMPTS[1] * 200  # 2200 tokens, of a context of 256
    engine.generate([prompt], tw.SamplingParams(max_new_tokens=40, ignore_eos=True))
    before = torch.cuda.memory_allocated()
    (one,) = engine.generate([prompt], tw.SamplingParams(max_new_tokens=3000, ignore_eos=True))
    assert len(one.token_ids) == 3000 and one.usage.cached_tokens > 0
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert engine.pool.num_dropped > 300
