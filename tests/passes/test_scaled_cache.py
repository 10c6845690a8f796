"""Caches of codes: what the pass puts in, numbers of ragged steps against rounding by hand, what is
fused, and that a wrong one is caught.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_rounding import rounded
from ragged_oracle import DECODER, PagedRun
from rewriting import parse
from tilewright.errors import VerificationError
from tilewright.ir.build import make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph, param_name
from tilewright.ir.interpreter import interpret
from tilewright.ir.ops.scaled_cache import SCALED_PAGED_ATTENTION
from tilewright.ir.verifier import verify
from tilewright.ir.widen import widened
from tilewright.passes.cache_samples import adapt_to_pages
from tilewright.passes.driver import engine_tolerance, largest_error, run_passes
from tilewright.passes.fuse_append import fuse_append
from tilewright.passes.kv_cache import paged_cache_pass
from tilewright.passes.one_token import takes_one_token
from tilewright.passes.pipeline import decode_pipeline, pipeline
from tilewright.passes.token_rows import check_rows

CODES = pytest.mark.parametrize("codes", [DType.F8E4M3, DType.I8], ids=str)


def inserted(codes: DType) -> Graph:
    return verify(paged_cache_pass(codes).run(parse(DECODER)))


@pytest.mark.quick
@CODES
def test_golden(codes: DType) -> None:
    text = str(inserted(codes))
    c = str(codes)
    assert (
        f"k_cache_0: {c}[N, P, 2, 4], v_cache_0: {c}[N, P, 2, 4], "
        "k_scale_0: f32[N, P, 2, 1], v_scale_0: f32[N, P, 2, 1]"
    ) in text
    assert text.count(f"({c}[T, 2, 4], f32[T, 2, 1],) = quantize_rows(") == 2
    assert text.count(f"dtype={c}, group=0, tries=8)") == (2 if codes is DType.F8E4M3 else 0)
    assert text.count("kv_write(") == 4 and " paged_attention(" not in text
    assert "scaled_paged_attention(rope_0, kv_write_0, kv_write_1, " in text
    assert ", kv_write_2, kv_write_3, causal=True, scale=0.5, window=6)" in text
    check_rows(inserted(codes))
    assert takes_one_token(inserted(codes))


@CODES
def test_what_the_check_expects_is_rounding_by_hand(codes: DType) -> None:
    before = parse(DECODER)
    step = paged_cache_pass(codes)
    assert step.expected is not None
    graph = step.expected(before, inserted(codes))
    (call,) = (node for node in graph.nodes if node.op == "attention")
    (plain,) = (node for node in before.nodes if node.op == "attention")
    ids = [torch.randint(16, (1, 9))]
    names = ("k", "v")
    made = widened(replace(graph, outputs=call.operands[1:3], output_names=names), DType.F64)
    plain_ = widened(replace(before, outputs=plain.operands[1:3], output_names=names), DType.F64)
    found, given = (
        interpret(
            g,
            ids,
            {param_name(n): g.weights[param_name(n)].load().to(n.dtype.torch) for n in g.params},
        )
        for g in (made, plain_)
    )
    for mine, x in zip(found, given, strict=True):
        torch.testing.assert_close(mine, rounded(x, codes), rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    cut=st.integers(1, 7),
    page_size=st.integers(1, 5),
    codes=st.sampled_from([DType.F8E4M3, DType.I8]),
    fuses=st.booleans(),
)
def test_any_mix_of_chunks_gives_the_logits_of_each_sequence_alone(
    lengths: list[int], cut: int, page_size: int, codes: DType, fuses: bool
) -> None:
    """Requests have no part in one another's scales, and chunks none in those of their own."""
    before, step = parse(DECODER), paged_cache_pass(codes)
    assert step.expected is not None
    graph = step.run(before)
    expected = step.expected(before, graph)
    sequences = [torch.randint(16, (n,)) for n in lengths]
    needed = [-(-n // page_size) for n in lengths]
    free = (torch.randperm(sum(needed)) + 1).tolist()
    tables = [[free.pop() for _ in range(count)] for count in needed]
    run = PagedRun(fuse_append(graph) if fuses else graph, sum(needed) + 1, page_size)
    done, found = 0, [[] for _ in lengths]
    while done < max(lengths):
        active = [i for i, n in enumerate(lengths) if done < n]
        chunks = [(sequences[i][done : done + cut], done, tables[i]) for i in active]
        for i, logits in zip(active, run.step(chunks), strict=True):
            found[i].append(logits)
        done += cut
    for ids, parts in zip(sequences, found, strict=True):
        (wanted,) = interpret(expected, [ids[None]])
        torch.testing.assert_close(torch.cat(parts), wanted[0], rtol=1e-4, atol=1e-4)


@CODES
def test_the_writes_of_a_layer_are_one_call(codes: DType) -> None:
    graph = inserted(codes)
    fused = verify(fuse_append(graph))
    ops = [node.op for node in fused.nodes]
    assert ops.count("scaled_append_kv") == 1
    assert not {"kv_write", "quantize_rows", "rope"} & set(ops)
    inputs = adapt_to_pages(parse(DECODER), graph, [torch.randint(16, (1, 9))])
    for a, b in zip(interpret(graph, inputs), interpret(fused, inputs), strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_scales_of_other_codes_are_not_fused() -> None:
    graph = inserted(DType.I8)
    (attention,) = (node for node in graph.nodes if node.op == "scaled_paged_attention")
    args = list(attention.args)
    args[8], args[9] = args[9], args[8]
    swapped = make("scaled_paged_attention", *args, **dict(attention.attrs))
    other = Graph("g", graph.inputs, (swapped, *graph.outputs[1:]), graph.weights)
    assert "scaled_append_kv" not in {node.op for node in fuse_append(other).nodes}


@CODES
def test_all_passes_agree_with_rounding(codes: DType) -> None:
    graph, ids = parse(DECODER), [torch.randint(16, (1, 9))]
    steps = pipeline("paged", fuses=True, codes=codes)
    _, records = run_passes(graph, steps, level="full", samples=ids)
    fork = next(record.graph for record in records if record.name == "fuse-append")
    inputs = adapt_to_pages(graph, fork, ids)
    _, more = run_passes(fork, decode_pipeline(4), level="full", samples=inputs)
    assert max(record.max_error or 0.0 for record in (*records, *more)) < 1e-5


@pytest.mark.parametrize("wrong", ["no scale", "of the other codes"])
def test_a_pass_that_forgets_the_scales_is_caught(wrong: str) -> None:
    step = paged_cache_pass(DType.F8E4M3)

    def broken(graph: Graph) -> Graph:
        if wrong == "of the other codes":
            return paged_cache_pass(DType.I8).run(graph)
        right = step.run(graph)
        (node,) = (node for node in right.nodes if node.op == "scaled_paged_attention")
        args = [*node.args[:8], node.args[9], node.args[9]]
        scales = make("scaled_paged_attention", *args, **dict(node.attrs))
        values = {node: scales}
        for each in right.nodes:
            if each not in values:
                operands = [None if a is None else values[a] for a in each.args]
                values[each] = make(each.op, *operands, **dict(each.attrs))
        return right.with_outputs(tuple(values[output] for output in right.outputs))

    with pytest.raises(VerificationError, match="paged-cache"):
        ids = [torch.randint(16, (1, 9))]
        run_passes(parse(DECODER), [replace(step, run=broken)], level="full", samples=ids)


@pytest.mark.quick
def test_codes_may_be_neighbours_and_no_further_apart_than_their_numbers() -> None:
    for codes in (torch.tensor([127, 3, -5]).to(torch.int8), _fp8(448.0, 0.5, -13.0)):
        other = codes.view(torch.uint8) + torch.tensor([0, 1, 0], dtype=torch.uint8)
        least = 1e-2
        assert largest_error("x", [codes], [other.view(codes.dtype)], least) == 0.0
        with pytest.raises(VerificationError):
            largest_error("x", [codes], [other.view(codes.dtype)])
        with pytest.raises(VerificationError):
            far = torch.tensor([90, 3, -5]) if codes.dtype == torch.int8 else _fp8(320, 0.5, -13)
            largest_error("x", [codes], [far.to(codes.dtype)], least)
    with pytest.raises(VerificationError, match="NaN"):
        largest_error("x", [_fp8(1.0)], [_fp8(float("nan"))], 1e-2)


def _fp8(*values: float) -> torch.Tensor:
    return torch.tensor(values).to(torch.float8_e4m3fn)


@pytest.mark.quick
def test_an_engine_is_allowed_what_rounding_costs_and_no_more() -> None:
    assert engine_tolerance(parse(DECODER)) == 0.0
    for graph in (inserted(DType.I8), fuse_append(inserted(DType.I8))):
        assert engine_tolerance(graph) == 1e-2


def test_samples_cover_both_codes() -> None:
    samples = SCALED_PAGED_ATTENTION.samples(torch.Generator().manual_seed(0))
    kinds = {sample.args[1].dtype for sample in samples}  # type: ignore[union-attr]
    assert kinds == {torch.int8, torch.float8_e4m3fn}
