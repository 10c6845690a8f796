"""Templates as the tuner sees them: defaults are in their spaces, configs are kernels, problems are
text that reads back, and the prior ranks what was measured on an H100.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import experts_forms
import linear_forms
import paged_forms
import quant_forms
import walk_forms
from linear_forms import Form
from linear_forms import node_of as linear_node
from tilewright.autotune.space import Config
from tilewright.autotune.tunable import Ready, Refused
from tilewright.codegen.triton.kernels.paged_decode_tiles import default_tiles as paged_default
from tilewright.codegen.triton.tuning.attention import prefill_sizes
from tilewright.codegen.triton.tuning.beside_library import is_library
from tilewright.codegen.triton.tuning.decode import problem_of as decode_problem
from tilewright.codegen.triton.tuning.decode import sizes_of
from tilewright.codegen.triton.tuning.expert_spaces import groups_of
from tilewright.codegen.triton.tuning.experts import group_sizes
from tilewright.codegen.triton.tuning.experts import row_sizes as expert_sizes
from tilewright.codegen.triton.tuning.problem import bases_of, call_of, problem_graph
from tilewright.codegen.triton.tuning.problems import WALKS
from tilewright.codegen.triton.tuning.registry import TEMPLATES, template_named
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.codegen.triton.tuning.walks import row_sizes
from tilewright.errors import UsageError
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.parser import parse_graph
from tilewright.ir.types import TensorType
from tilewright.ir.widen import widened
from tilewright.targets import TARGETS

H100 = TARGETS["h100"]
BENCHMARKS = Path(__file__).parents[4] / "benchmarks"


def decode_call(page: int = 16) -> Node:
    """Decode attention whose q is a slice of a larger buffer, as in a model."""
    b, m, n = map(symbol, "BMN")
    qkv = input_node("qkv", TensorType(DType.BF16, (b, 48, 128)))
    q = make("slice", qkv, dim=1, start=0, step=1, stop=32)
    cache = [input_node(x, TensorType(DType.BF16, (n, page, 8, 128))) for x in "kv"]
    tables = input_node("tables", TensorType(DType.I32, (b, m)))
    lens = input_node("lens", TensorType(DType.I32, (b,)))
    return make("paged_attention", q, *cache, tables, lens, None, None, None, scale=0.1)


def linear_call() -> Node:
    return linear_node(Form(k=512, n=256, norm="weight", behind=("residual",), dtype=DType.BF16))


def coded_call(rounds: bool) -> Node:
    form = linear_call_form()
    if rounds:
        return quant_forms.scaled_node(quant_forms.ScaledForm(form))
    return quant_forms.quant_node(quant_forms.QuantForm(form, group=128, scale=DType.BF16))


def linear_call_form() -> Form:
    return Form(k=2048, n=256, norm="weight", behind=("residual",), dtype=DType.BF16)


def prefill_call() -> Node:
    shape = paged_forms.Shape(head_dim=64, value_dim=64, dtype=DType.BF16)
    return paged_forms.ragged_call(shape)


def scaled_call(node: Node, codes: DType) -> Node:
    """The same over codes."""
    args = list(node.args[:8])
    for place in (1, 2):
        cache = args[place]
        args[place] = input_node(f"codes_{place}", TensorType(codes, cache.shape))
        args.append(input_node(f"scales_{place}", TensorType(DType.F32, (*cache.shape[:-1], 1))))
    return make("scaled_paged_attention", *args, **dict(node.attrs))


def attention_call() -> Node:
    """Causal attention of grouped heads whose k and v are slices of one buffer, with a mask."""
    q = input_node("q", TensorType(DType.BF16, (2, 8, 24, 64)))
    kv = input_node("kv", TensorType(DType.BF16, (2, 4, 24, 64)))
    k, v = (make("slice", kv, dim=1, start=s, step=1, stop=s + 2) for s in (0, 2))
    mask = input_node("mask", TensorType(DType.BOOL, (24, 24)))
    return make("attention", q, k, v, mask, None, None, scale=0.1, causal=True)


WIDE = Form(k=64, n=4224, halves=True, dtype=DType.BF16)  # as many tiles as multiprocessors
EXPERTS = experts_forms.Form(32, 4, 512, 256, DType.BF16, biases=True)
CASES = {
    "linear_gemv": (linear_call, {"B": 1}),
    "linear_gemm": (linear_call, {"B": 24}),
    "quant_linear_gemv": (lambda: coded_call(False), {"B": 1}),
    "quant_linear_gemm": (lambda: coded_call(True), {"B": 24}),
    "paged_decode": (decode_call, {"B": 4, "M": 8, "N": 40}),
    "paged_attention": (prefill_call, {"T": 100, "B": 2, "M": 4, "N": 9, "P": 16}),
    "scaled_decode": (
        lambda: scaled_call(decode_call(), DType.F8E4M3),
        {"B": 4, "M": 8, "N": 40},
    ),
    "scaled_attention": (
        lambda: scaled_call(prefill_call(), DType.I8),
        {"T": 100, "B": 2, "M": 4, "N": 9, "P": 16},
    ),
    "rows": (lambda: walk_forms.norm_call(8192), {"T": 32}),
    "elementwise": (lambda: walk_forms.gated_call(2048), {"T": 32}),
    "wide_linear": (lambda: linear_node(WIDE), {"B": 512}),
    "attention": (attention_call, {}),
    "expert_rows": (lambda: experts_forms.node_of(EXPERTS), {"T": 2}),
    "expert_groups": (lambda: experts_forms.node_of(EXPERTS), {"T": 50}),
}
KERNELS = [name for name in CASES if name != "attention"]  # of the libraries alone
# Those left out are cut as the plain ones are, or compiled in tests of their own.
COMPILED = [name for name in KERNELS if not name.startswith(("scaled", "expert", "wide"))]


def tunable(name: str) -> KernelTunable:
    make_node, sizes = CASES[name]
    return KernelTunable.of(template_named(name), make_node(), sizes, H100)


def test_each_template_has_a_case() -> None:
    assert {template.name for template in TEMPLATES} == set(CASES)


@pytest.mark.quick
@pytest.mark.parametrize("name", KERNELS)
def test_the_default_is_a_config_of_the_space_and_its_kernel_the_default_one(name: str) -> None:
    one = tunable(name)
    assert one.space.why_not(one.default) is None
    assert one.space.count() > 20
    source = one.template.source(one.node, one.default, one.sizes, H100)
    assert source is not None and source.variants


@settings(max_examples=60)
@given(form=linear_forms.forms(large=True), tokens=st.sampled_from([1, 2, 17, 64, 130, 2048]))
def test_any_linear_has_its_default_in_its_space(form: Form, tokens: int) -> None:
    for template in (*TEMPLATES[:2], template_named("wide_linear")):
        one = KernelTunable.of(template, linear_node(form), {"B": tokens}, H100)
        if template.serves(one.node, H100):
            assert one.space.why_not(one.default) is None, one.name


@settings(max_examples=40)
@given(
    node=st.one_of(
        quant_forms.quant_forms(large=True).map(quant_forms.quant_node),
        quant_forms.scaled_forms(large=True).map(quant_forms.scaled_node),
        quant_forms.packed_forms(large=True).map(quant_forms.quant_node),
    ),
    tokens=st.sampled_from([1, 2, 17, 130]),
)
def test_any_linear_over_codes_has_its_default_in_its_space(node: Node, tokens: int) -> None:
    for name in ("quant_linear_gemv", "quant_linear_gemm"):
        one = KernelTunable.of(template_named(name), node, {"B": tokens}, H100)
        if one.template.serves(node, H100):
            assert one.space.why_not(one.default) is None, one.name


@pytest.mark.parametrize(("name", "tokens"), [("gemv", 1), ("gemm", 24)])
def test_what_may_round_has_a_kernel_and_a_key_of_its_own(name: str, tokens: int) -> None:
    form = quant_forms.QuantForm(linear_call_form(), group=128, scale=DType.BF16)
    template = template_named(f"quant_linear_{name}")
    nodes = [quant_forms.quant_node(f) for f in (form, replace(form, compute=DType.I8))]
    plain, packed = (KernelTunable.of(template, node, {"B": tokens}, H100) for node in nodes)
    assert plain.key != packed.key
    assert template.rounding(plain.node) == 0.0 < template.rounding(packed.node) < 0.05
    source = template.source(packed.node, packed.default, {"B": tokens}, H100)
    assert source is not None and "_pack_rows" in source.text


@settings(max_examples=60)
@given(
    shape=st.builds(
        paged_forms.Shape,
        head_dim=st.sampled_from([64, 80, 128, 256, 512, 700]),
        page=st.sampled_from([8, 12, 256]),
        dtype=st.sampled_from([DType.F32, DType.BF16, DType.F16]),
    )
)
def test_any_decode_attention_has_its_default_in_its_space(shape: paged_forms.Shape) -> None:
    shape = replace(shape, value_dim=shape.head_dim)
    node = paged_forms.decode_call(shape)
    one = KernelTunable.of(template_named("paged_decode"), node, sizes_of(node, 3, 100), H100)
    if paged_default(decode_problem(node), H100) is not None:
        assert one.space.why_not(one.default) is None, one.name


@settings(max_examples=60)
@given(
    shape=st.builds(
        paged_forms.Shape,
        group=st.sampled_from([1, 4, 71]),
        head_dim=st.sampled_from([64, 80, 128, 256, 512, 700]),
        dtype=st.sampled_from([DType.F32, DType.BF16]),
    )
)
def test_any_prefill_attention_has_its_default_in_its_space(shape: paged_forms.Shape) -> None:
    node = paged_forms.ragged_call(replace(shape, value_dim=shape.head_dim))
    one = KernelTunable.of(template_named("paged_attention"), node, prefill_sizes(node), H100)
    if one.template.serves(node, H100):
        assert one.space.why_not(one.default) is None, one.name
    assert one.template.takes(node)


@settings(max_examples=30)
@given(
    form=st.builds(
        experts_forms.Form,
        experts=st.sampled_from([2, 8, 128]),
        slots=st.sampled_from([1, 2]),
        inner=st.sampled_from([33, 768, 14336]),
        width=st.sampled_from([16, 2048, 9000]),
        dtype=st.sampled_from([DType.F32, DType.BF16]),
        transposed=st.booleans(),
    ),
    target=st.sampled_from(["h100", "a100", "l4"]),
    most=st.sampled_from([None, 1, 64]),
)
def test_any_experts_have_their_defaults_in_their_spaces(form, target, most) -> None:
    node, device = experts_forms.node_of(form), TARGETS[target]
    rows, groups = template_named("expert_rows"), template_named("expert_groups")
    cases = [(groups, sizes) for _, sizes in group_sizes(node, most)]
    if rows.serves(node, device):
        cases.append((rows, expert_sizes(node)))
    for template, sizes in cases:
        assert template.serves(node, device)
        one = KernelTunable.of(template, node, sizes, device)
        assert one.space.why_not(one.default) is None, one.name
    tiles = [groups_of(groups.default(node, sizes, device))[0].block_m for _, sizes in cases[:1]]
    assert tiles == [block_m for block_m, _ in group_sizes(node, most)][:1]


@settings(max_examples=60)
@given(
    call=st.sampled_from([walk_forms.norm_call, walk_forms.gated_call]),
    width=st.sampled_from([1, 3, 64, 100, 1024, 5000, 8192, 40000]),
    dtype=st.sampled_from([DType.F32, DType.BF16]),
    rows=st.sampled_from([1, 5, walk_forms.T]),
    most=st.sampled_from([1, 20, 5000, None]),
)
def test_any_generated_kernel_has_its_default_in_its_space(call, width, dtype, rows, most) -> None:
    node = call(width, dtype, rows)
    (template,) = (one for one in WALKS if one.takes(node))
    one = KernelTunable.of(template, node, row_sizes(node, most), H100)
    assert one.space.why_not(one.default) is None, one.name


@pytest.mark.quick
def test_kernels_whose_time_hangs_on_more_than_a_number_of_tokens_are_left_alone() -> None:
    wide = walk_forms.norm_call(64, rows=symbol("A") * symbol("B"))
    cases = (walk_forms.looked_up_call(64), wide, linear_call(), decode_call())
    assert not any(template.takes(node) for template in WALKS for node in cases)


@pytest.mark.quick
@pytest.mark.parametrize("name", CASES)
def test_a_problem_is_text_that_reads_back_and_views_stay_views(name: str) -> None:
    one = tunable(name)
    again = parse_graph(str(one.graph))
    assert again == one.graph and call_of(again) is one.node
    assert one.template.takes(one.node)
    assert set(bases_of(one.node)) - {None} == set(one.graph.inputs)
    assert problem_graph(one.node) == one.graph


@pytest.mark.quick
@pytest.mark.parametrize("name", KERNELS)
def test_every_config_has_a_kernel_a_prior_and_a_class(name: str) -> None:
    one = tunable(name)
    for config in list(one.space.configs())[::23]:
        kernel = one.template.source(one.node, config, one.sizes, H100)
        assert (kernel is None) is is_library(config), config
        assert 1e-7 < one.prior(config) < 1e-2
        assert one.numerics(config)


@pytest.mark.parametrize("name", COMPILED)
def test_configs_are_compiled_and_those_that_spill_or_do_not_fit_are_refused(name: str) -> None:
    one = tunable(name)
    configs = [one.default, next(iter(one.space.configs()))]
    found = one.prepare(configs)
    assert isinstance(found[one.default], Ready) and set(found) == set(configs)
    digests = {r.digest for r in found.values() if isinstance(r, Ready)}
    assert len(digests) > 1


@pytest.mark.quick
@pytest.mark.parametrize("name", ["scaled_decode", "scaled_attention"])
def test_a_problem_names_the_codes_of_its_cache(name: str) -> None:
    make_node = {"scaled_decode": decode_call, "scaled_attention": prefill_call}[name]
    sizes = CASES[name][1]
    keys = [
        KernelTunable.of(template_named(name), scaled_call(make_node(), codes), sizes, H100).key
        for codes in (DType.F8E4M3, DType.I8)
    ]
    assert keys[0].differences(keys[1]) == ("problem.cache",)
    plain = template_named({"scaled_decode": "paged_decode"}.get(name, "paged_attention"))
    assert not plain.takes(scaled_call(make_node(), DType.I8))
    assert "cache" not in dict(KernelTunable.of(plain, make_node(), sizes, H100).key.problem)


def test_a_cut_that_spills_is_refused_in_words() -> None:
    one = KernelTunable.of(
        template_named("paged_decode"), decode_call(), {"B": 1, "M": 64, "N": 64}, H100
    )
    config = Config(tuple({**one.default.as_dict(), "block_n": 64, "num_warps": 1}.items()))
    assert isinstance(refused := one.prepare([config])[config], Refused)
    assert "spills" in refused.reason


@pytest.mark.quick
def test_keys_differ_by_what_matters_and_by_nothing_else() -> None:
    one = tunable("linear_gemm")
    assert one.key.differences(tunable("linear_gemm").key) == ()
    more = replace(one, sizes={"B": 64})
    assert one.key.differences(more.key) == ("space_hash", "problem.tokens")
    other = replace(one, target=TARGETS["a100"])
    assert set(other.key.differences(one.key)) >= {"arch", "device"}
    wider = linear_node(Form(k=512, n=512, norm="weight", behind=("residual",), dtype=DType.BF16))
    assert "problem.n" in one.key.differences(replace(one, graph=problem_graph(wider)).key)
    code = "linear_kernel"
    assert code in [module.__name__.rpartition(".")[2] for module in one.template.modules]


@pytest.mark.quick
def test_an_unknown_template_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match="linear_gemv, .*, paged_attention, .*rows"):
        template_named("gemm")


@pytest.mark.parametrize("name", CASES)
def test_operands_and_reference_fit_together(name: str) -> None:
    """On a CPU: what a runner on a GPU makes, run by the reference."""
    one = tunable(name)
    operands = one.template.operands(one.node, one.sizes, torch.device("cpu"), 0)
    bases = dict(zip(bases_of(one.node), operands, strict=True))
    given = [x for node in one.graph.inputs if (x := bases[node]) is not None]
    exact_graph = widened(one.graph, DType.F64)
    wide = [x.to(n.dtype.torch) for x, n in zip(given, exact_graph.inputs, strict=True)]
    results = zip(interpret(exact_graph, wide), interpret(one.graph, given), strict=True)
    for exact, found in results:
        assert exact.dtype is torch.float64 and exact.isfinite().all()
        assert (found.double() - exact).abs().max() <= 2e-2 * exact.abs().max()
    assert len(one.graph.outputs) == len(one.node.types)


def _benchmark(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_prior_ranks_what_was_measured() -> None:
    """Of each space, 3% of the best within the prior's first ten; also where it was not fitted."""
    fit = _benchmark("fit_prior")
    for problem in fit.measured(fit.DATA):
        first, _, ten = problem.regrets(problem.tunable.template.constants)
        assert ten < 0.03, (problem.name, ten)
        assert first < 0.30, (problem.name, first)
        default = problem.tunable.default
        # The kernel whose programs stay came after what was measured.
        assert default in problem.seconds or default.get("programs")
