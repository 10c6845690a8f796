"""Experts on a GPU: float64's results at the sizes of real layers, the same bits every time, and
mixtures whose decode steps are CUDA graphs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

import tilewright as tw
from experts_forms import (
    FORMS,
    OP,
    ROUTINGS,
    Form,
    assert_near,
    layouts_of,
    node_of,
    operands_of,
    problem_of,
    routed,
    source_of,
    truth_of,
)
from gpu_kernels import examples, here, on_device, poisoned_kernels
from tilewright.codegen.triton.kernels.experts import emit_experts, emit_invariant_experts
from tilewright.codegen.triton.kernels.experts_tiles import most_row_tokens
from tilewright.codegen.triton.kernels.wide_experts_tiles import WideTiles
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dtypes import DType
from tiny_models import PROMPTS, greedy, tiny_model

pytestmark = pytest.mark.gpu
LAYERS = {
    "mixtral": Form(8, 2, 3584, 4096, DType.BF16),  # a quarter of its experts' width
    "qwen3_moe": Form(128, 8, 768, 2048, DType.BF16),
    "gpt_oss": Form(32, 4, 2880, 2880, DType.BF16, "gpt_oss", biases=True, transposed=True),
    "float16": Form(16, 4, 768, 1024, DType.F16, "gelu_tanh", wide=True),
    "odd": Form(6, 3, 1000, 520, DType.BF16, "gelu", biases=True),
}
TOKENS = (1, 2, 4, 5, 33, 130, 300, 1500)
PARAMS = tw.SamplingParams(max_new_tokens=24, ignore_eos=True)


def default_of(form: Form) -> KernelSource:
    node = node_of(form)
    source = emit_experts(node, layouts_of(node), here())
    assert source is not None
    return source


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_as_near_to_float64_as_torch(name: str) -> None:
    form = LAYERS[name]
    node = node_of(form)
    (kernel,) = poisoned_kernels([(default_of(form), node)])
    operands = operands_of(form, routed(form, TOKENS[-1], "any"), device="cuda")
    x, ids, weights, *given = operands
    assert x is not None and ids is not None and weights is not None
    truth = truth_of(form, node, operands)
    plain = replace(form, wide=False, transposed=False)
    rows = x[:, 3:-3].contiguous() if form.wide else x
    matrices = [g.mT if form.transposed and g is not None and g.dim() == 3 else g for g in given]
    torchs = OP.reference(rows, ids, weights, *matrices, **dict(node_of(plain).attrs))
    assert isinstance(torchs, torch.Tensor)
    for tokens in TOKENS:
        part = [x[:tokens].clone(), ids[:tokens].clone(), weights[:tokens].clone(), *given]
        (found,) = kernel(part, {"T": tokens})
        error = (found.double() - truth[:tokens]).norm()
        assert error <= 1.05 * (torchs[:tokens].double() - truth[:tokens]).norm(), tokens


def wide_of(form: Form, tiles: WideTiles) -> KernelSource:
    """The kernels by descriptors alone."""
    groups = (((replace(tiles, shared=False), tiles), None),)
    return source_of(node_of(form), None, groups, here())


WIDE_FORMS = st.builds(
    Form,
    experts=st.sampled_from([8, 13]),
    slots=st.sampled_from([1, 2, 3, 8]),
    inner=st.sampled_from([8, 72, 200]),
    width=st.sampled_from([16, 136, 264]),
    dtype=st.sampled_from([DType.F16, DType.BF16]),
    activation=st.sampled_from(["silu", "gelu", "relu", "gpt_oss"]),
    biases=st.booleans(),
    wide=st.booleans(),
    routed=st.sampled_from([(DType.I64, DType.F32), (DType.I32, DType.BF16)]),
)
WIDE_TILES = st.builds(
    WideTiles,
    block_m=st.sampled_from([64, 128]),
    block_n=st.sampled_from([64, 128]),
    block_k=st.just(64),
    num_warps=st.just(8),
    num_stages=st.sampled_from([2, 3]),
    group=st.sampled_from([1, 8]),
    flat=st.booleans(),
    shared=st.booleans(),
)


def test_any_form_by_descriptors() -> None:
    if here().arch != 90:
        pytest.skip("these kernels are for Hopper alone")
    tokens = st.sampled_from([1, 17, 200, 1333])
    cases = examples(st.tuples(WIDE_FORMS, WIDE_TILES, ROUTINGS, tokens), 16)
    sources = [(wide_of(form, tiles), node_of(form)) for form, tiles, _, _ in cases]
    kernels = poisoned_kernels(sources)
    for (form, _, kind, tokens), kernel, (_, node) in zip(cases, kernels, sources, strict=True):
        operands = operands_of(form, routed(form, tokens, kind))
        (found,) = kernel([on_device(operand) for operand in operands], {"T": tokens})
        assert_near(form, node, operands, found)


@pytest.mark.parametrize("kind", ["the same", "not the first"])
def test_routings_that_leave_experts_alone(kind: str) -> None:
    form = replace(LAYERS["odd"], dtype=DType.F32)
    node = node_of(form)
    (kernel,) = poisoned_kernels([(default_of(form), node)])
    for tokens in (1, 7, 200):
        operands = operands_of(form, routed(form, tokens, kind), device="cuda")
        (found,) = kernel(operands, {"T": tokens})
        wanted = truth_of(form, node, operands)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_any_form() -> None:
    cases = examples(st.tuples(FORMS, ROUTINGS, st.sampled_from([1, 2, 17, 90])), 16)
    sources = []
    for form, _, _ in cases:
        node = node_of(form)
        sources.append((source_of(node, None, target=here()), node))
    kernels = poisoned_kernels(sources)
    for (form, kind, tokens), kernel, (_, node) in zip(cases, kernels, sources, strict=True):
        operands = operands_of(form, routed(form, tokens, kind))
        (found,) = kernel([on_device(operand) for operand in operands], {"T": tokens})
        wanted = truth_of(form, node, operands)
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_same_bits_every_time() -> None:
    form = LAYERS["qwen3_moe"]
    (kernel,) = poisoned_kernels([(default_of(form), node_of(form))])
    assert most_row_tokens(problem_of(node_of(form))) == 4
    for tokens in (3, 70, 1200, 4096):
        operands = operands_of(form, routed(form, tokens, "any"), device="cuda")
        (first,) = kernel(operands, {"T": tokens})
        for _ in range(8):
            assert torch.equal(kernel(operands, {"T": tokens})[0], first), tokens


def test_a_token_does_not_depend_on_its_batch_where_it_must_not() -> None:
    form = LAYERS["mixtral"]
    node = node_of(form)
    source = emit_invariant_experts(node, layouts_of(node), here())
    assert source is not None
    (kernel,) = poisoned_kernels([(source, node)])
    x, ids, weights, *rest = operands_of(form, routed(form, 333, "any"), device="cuda")
    assert x is not None and ids is not None and weights is not None
    (together,) = kernel([x, ids, weights, *rest], {"T": 333})
    for place in (0, 100, 332):
        at = slice(place, place + 1)
        alone = [x[at].clone(), ids[at].clone(), weights[at].clone(), *rest]
        assert torch.equal(kernel(alone, {"T": 1})[0][0], together[place])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_decode_of_a_mixture_is_one_replay_with_the_eager_engines_tokens(name: str) -> None:
    model = tiny_model(name)
    engine = tw.compile(model, backend="triton", max_batch_size=8)
    eager = tw.compile(model, backend="eager", max_batch_size=8)
    alone = engine.generate(PROMPTS[:1], PARAMS)[0].token_ids
    assert engine.executor.graphs.captured.keys() == {1}
    found = [c.token_ids for c in engine.generate([*PROMPTS, *PROMPTS], PARAMS)]
    assert engine.executor.graphs.captured.keys() == {1, 8}
    assert found == [c.token_ids for c in eager.generate([*PROMPTS, *PROMPTS], PARAMS)]
    assert found[0] == alone == greedy(model, PROMPTS[0], 24)
