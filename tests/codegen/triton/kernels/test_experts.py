"""Experts in Triton against the op's reference in float64: every form, every routing, every cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts_forms import (
    FORMS,
    GROUPS,
    H100,
    OP,
    ROUTINGS,
    ROWS,
    Form,
    T,
    layouts_of,
    node_of,
    operands_of,
    problem_of,
    routed,
    source_of,
    truth_of,
)
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.experts import (
    emit_experts,
    emit_invariant_experts,
    experts_source,
)
from tilewright.codegen.triton.kernels.experts_tiles import (
    PRODUCTS,
    SPACE,
    GroupTiles,
    RowTiles,
    buckets,
    default_groups,
    default_rows,
    most_row_tokens,
    shared_bytes,
)
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.codegen.triton.source import KernelSource, has_pdl
from tilewright.errors import UnsupportedError
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import evaluate
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.runtime.decode_graphs import obstacles
from tilewright.targets import TARGETS, Target
from triton_bodies import run

MIXTRAL = Form(8, 2, 14336, 4096, DType.BF16)
QWEN = Form(128, 8, 768, 2048, DType.BF16)
GPT_OSS = Form(32, 4, 2880, 2880, DType.BF16, "gpt_oss", biases=True, transposed=True)
LAYERS = {"mixtral": MIXTRAL, "qwen3_moe": QWEN, "gpt_oss": GPT_OSS}


def found_by(source: KernelSource, form: Form, ids: torch.Tensor) -> torch.Tensor:
    """The kernel's result, which is close to the truth."""
    node = node_of(form)
    operands = operands_of(form, ids)
    (found,) = run(source, node, operands, {"T": len(ids)})
    wanted = truth_of(form, node, operands)
    relative, absolute = OP.tolerance[form.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)
    return found


@settings(max_examples=4)
@given(FORMS, ROUTINGS, st.sampled_from([1, 5, 18]))
def test_any_form_and_routing_in_groups(form: Form, kind: str, tokens: int) -> None:
    found_by(source_of(node_of(form), None), form, routed(form, tokens, kind))


@settings(max_examples=3)
@given(FORMS.map(lambda form: replace(form, transposed=False)), ROUTINGS)
def test_any_form_and_routing_in_rows(form: Form, kind: str) -> None:
    found_by(source_of(node_of(form), ROWS, ()), form, routed(form, 2, kind))


@pytest.mark.quick
@pytest.mark.parametrize("activation", ["silu", "gpt_oss"])
def test_several_tiles_of_one_expert_and_experts_without_any(activation: str) -> None:
    """21 pairs an expert, in tiles of 16: the last tile of each has a rest that is no pair."""
    form = Form(experts=4, slots=2, inner=12, activation=activation, biases=True)
    found_by(source_of(node_of(form), None), form, routed(form, 21, "the same"))


@pytest.mark.parametrize(
    ("dtype", "rows"), [(DType.BF16, ROWS), (DType.F16, ROWS), (DType.BF16, None)]
)
def test_half_precision_is_as_near_as_torch(dtype: DType, rows: object) -> None:
    form = Form(experts=2, slots=2, inner=32, width=32, dtype=dtype, biases=True)
    ids, node = routed(form, 1 if rows else 9, "any"), node_of(form)
    groups = () if rows else GROUPS
    found = found_by(source_of(node, ROWS if rows else None, groups), form, ids).double()
    operands = operands_of(form, ids)
    truth = truth_of(form, node, operands)
    torchs = OP.reference(*operands, **dict(node.attrs)).double()
    assert (found - truth).norm() <= 1.05 * (torchs - truth).norm()


def test_numbers_that_are_no_expert_read_nothing_else() -> None:
    """The nearest expert computes them: no result is right, but none reads what is not there."""
    form = Form(experts=3, slots=2)
    node, ids = node_of(form), torch.tensor([[0, 7], [-2, 1]])
    operands = operands_of(form, ids)
    wanted = truth_of(form, node, [operands[0], ids.clamp(0, 2), *operands[2:]])
    for source in (source_of(node, ROWS, ()), source_of(node, None)):
        (found,) = run(source, node, operands, {"T": 2})
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_chunk_of_pairs_is_not_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.codegen.triton.kernels.experts_entries._CHUNK", 16)
    form = Form(experts=2, slots=2, inner=8)
    found_by(source_of(node_of(form), None), form, routed(form, 45, "any"))


def test_a_token_alone_and_in_a_batch_is_the_same_where_it_must_be() -> None:
    form = Form(experts=4, slots=2, inner=24, dtype=DType.BF16)
    node = node_of(form)
    source = emit_invariant_experts(node, layouts_of(node), H100)
    assert source is not None and len(source.variants) == 1
    ids = routed(form, 7, "any")
    operands = operands_of(form, ids)
    (together,) = run(source, node, operands, {"T": 7})
    x, chosen, weights, *rest = operands
    assert x is not None and chosen is not None and weights is not None
    alone = [x[5:6].clone(), chosen[5:6].clone(), weights[5:6].clone(), *rest]
    (one,) = run(source, node, alone, {"T": 1})
    assert torch.equal(one[0], together[5])


def test_the_default_serves_each_number_of_tokens() -> None:
    form = Form(experts=16, slots=2, inner=16)
    node = node_of(form)
    source = emit_experts(node, layouts_of(node), H100)
    assert source is not None
    names = [[launch.function for launch in v.launches] for v in source.variants]
    assert names[0] == ["experts_gate_up_rows", "experts_down_rows"]
    grouped = ["gate_up", "down", "weighted"]
    orders = [["place"], ["place"], ["count", "find_order"]]
    assert names[1:] == [[f"experts_{name}" for name in [*order, *grouped]] for order in orders]
    for tokens in (2, 3):
        found_by(source, form, routed(form, tokens, "any"))


def in_graph(form: Form) -> Graph:
    """A graph of the call alone."""
    node = node_of(form)
    inputs = tuple(n for n in Graph("g", (), (node,)).nodes if n.op == "input")
    return Graph("g", inputs, (node,))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_graph_of_experts_is_one_call_that_no_cuda_graph_minds(deterministic: bool) -> None:
    program, sources, notes = lower_graph(in_graph(GPT_OSS), H100, deterministic)
    assert [call.loader for call in program.calls] == ["triton"] and len(sources) == 1
    assert notes == () and obstacles(program) == []


def test_what_no_kernel_takes_runs_in_torch_and_stays_out_of_cuda_graphs() -> None:
    graph = in_graph(Form(dtype=DType.F64))
    program, _, notes = lower_graph(graph, H100)
    assert obstacles(program) == ["moe_experts"] and "moe_experts" in notes[0]
    with pytest.raises(UnsupportedError, match="deterministic=True with moe_experts"):
        lower_graph(graph, H100, deterministic=True)


def strided(form: Form, operand: int, **step: int) -> Node:
    """The call with every second element of an operand along one axis."""
    node = node_of(form)
    args = list(node.args)
    arg = args[operand]
    assert arg is not None
    dim = step["dim"]
    shape = [2 * size if axis == dim else size for axis, size in enumerate(arg.shape)]
    wide = input_node("wide", TensorType(arg.dtype, tuple(shape)))
    args[operand] = make("slice", wide, dim=dim, start=0, stop=shape[dim], step=2)
    return make("moe_experts", *args, **dict(node.attrs))


DECLINED = {
    "float64": node_of(Form(dtype=DType.F64)),
    "float64 weights": node_of(Form(routed=(DType.I64, DType.F64))),
    "x in pieces": strided(Form(), 0, dim=1),
    "gate_up in pieces": strided(Form(), 3, dim=2),
    "down in pieces": strided(Form(), 4, dim=2),
    "a bias in pieces": strided(Form(biases=True), 5, dim=1),
}


@pytest.mark.parametrize("why", DECLINED)
def test_what_it_declines(why: str) -> None:
    node = DECLINED[why]
    for emit in (emit_experts, emit_invariant_experts):
        assert emit(node, layouts_of(node), H100) is None


def test_no_tile_fits_a_target_without_memory() -> None:
    node = node_of(MIXTRAL)
    small = replace(H100, shared_memory_per_block=2048)
    assert emit_experts(node, layouts_of(node), small) is None
    assert emit_invariant_experts(node, layouts_of(node), small) is None


@pytest.mark.quick
def test_rows_are_for_tokens_whose_pairs_are_few_beside_the_experts() -> None:
    assert [most_row_tokens(problem_of(node_of(form))) for form in LAYERS.values()] == [1, 4, 0]
    for form, limits in ((MIXTRAL, (32, 64, 128)), (QWEN, (128, 256, 512))):
        problem = problem_of(node_of(form))
        wanted = [*zip((16, 32, 64), limits, strict=True), (128, None)]
        assert buckets(problem, None) == wanted
        assert buckets(problem, 64)[-1] == (wanted[1][0] if form is MIXTRAL else 16, None)
        assert len(buckets(problem, 1)) == 1


@pytest.mark.quick
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("target", ["h100", "a100", "l4"])
def test_defaults_are_of_the_space_and_fit(name: str, target: str) -> None:
    problem = problem_of(node_of(LAYERS[name]))
    for product in PRODUCTS:
        cuts: list[RowTiles | GroupTiles] = [default_rows(problem, product)]
        for block_m, _ in buckets(problem, None):
            tiles = default_groups(problem, product, TARGETS[target], block_m)
            assert tiles is not None
            assert shared_bytes(problem, product, tiles) <= TARGETS[target].shared_memory_per_block
            cuts.append(tiles)
        assert all(getattr(c, n) in v for c in cuts for n, v in SPACE.items() if hasattr(c, n))


def default_of(form: Form, target: Target, block_m: int) -> KernelSource:
    """The default for few tokens, and that of one number of pairs a tile."""
    problem = problem_of(node_of(form))
    rows = default_rows(problem, "gate_up"), default_rows(problem, "down")
    gate_up, down = (default_groups(problem, p, target, block_m) for p in PRODUCTS)
    assert gate_up is not None and down is not None
    cuts = [((gate_up, down), None)]
    with_rows = problem.in_rows and has_pdl(target)  # one architecture will do
    return experts_source(problem, target, rows if with_rows else None, cuts)


@pytest.mark.parametrize(
    ("target", "cases"),
    [
        ("h100", {"gpt_oss": 16}),
        pytest.param("h100", {"mixtral": 128}, marks=pytest.mark.nightly),  # `regress` has it too
        pytest.param("a100", {"mixtral": 64}, marks=pytest.mark.nightly),
    ],
)
def test_defaults_compile_without_spills(target: str, cases: dict[str, int]) -> None:
    device = TARGETS[target]
    sources = [default_of(LAYERS[name], device, block_m) for name, block_m in cases.items()]
    for source, package in zip(sources, compile_sources(sources, device.arch), strict=True):
        launches = [launch for variant in source.variants for launch in variant.launches]
        assert all(launch.pdl is has_pdl(device) for launch in launches)
        for binary in package.binaries.values():
            assert binary.resources.spills == 0, binary.function
            assert binary.resources.shared <= device.shared_memory_per_block


def test_the_call_is_over_a_symbol_of_tokens() -> None:
    assert node_of(MIXTRAL).shape == (T, 4096)


@pytest.mark.quick
@pytest.mark.parametrize(("tokens", "used"), [(1, 2), (3, 6), (4, 8), (1000, 8)])
def test_a_call_moves_the_weights_of_as_many_experts_as_it_has_pairs(
    tokens: int, used: int
) -> None:
    moved = evaluate(OP.cost(node_of(MIXTRAL)).bytes, {"T": tokens})
    an_expert = 3 * 14336 * 4096 * 2
    assert moved == used * an_expert + tokens * (2 * 4096 * 2 + 2 * (8 + 4))
