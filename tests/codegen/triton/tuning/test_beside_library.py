"""The library as a candidate of the tuner: one config, always tried, known by its calls; and what a
compile makes of a record that chose it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linear_forms
from handed_forms import Pair, drawn, graph_of, product_of, truth
from linear_forms import ERROR, B, Form, tensor
from linear_forms import node_of as linear_node
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.key import Conditions
from tilewright.autotune.lookup import explain, lookup
from tilewright.autotune.record import Record
from tilewright.autotune.search import quick_candidates
from tilewright.autotune.space import Config
from tilewright.autotune.store import Store
from tilewright.autotune.tunable import Ready, Refused
from tilewright.codegen.triton.backend import BACKEND
from tilewright.codegen.triton.hand_on import hands_on
from tilewright.codegen.triton.interpreted import InterpretedKernel
from tilewright.codegen.triton.kernels.linear_tiles import Cutting
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.tuning import runner
from tilewright.codegen.triton.tuning.beside_library import is_library, library_config
from tilewright.codegen.triton.tuning.choices import Choices
from tilewright.codegen.triton.tuning.conditions import conditions_here
from tilewright.codegen.triton.tuning.linear import gemm_of
from tilewright.codegen.triton.tuning.problem import bases_of
from tilewright.codegen.triton.tuning.problems import problems_of
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.widen import widened
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import TARGETS
from tuning_records import choice_of

CPU, H100 = TARGETS["cpu"], TARGETS["h100"]
FORM = Form(k=512, n=256, norm="weight", behind=("residual",), dtype=DType.BF16)
SMALL = Form(k=48, n=32, norm="weight", halves=True, dtype=DType.BF16)


def tunable(tokens: int, form: Form = FORM) -> KernelTunable:
    template = template_named("linear_gemv" if tokens == 1 else "linear_gemm")
    return KernelTunable.of(template, linear_node(form), {"B": tokens}, H100)


@pytest.mark.quick
@settings(max_examples=20, deadline=None)
@given(form=linear_forms.forms(large=True), tokens=st.sampled_from([1, 16, 64, 128]))
def test_the_library_is_one_config_of_every_space(form: Form, tokens: int) -> None:
    one = tunable(tokens, form)
    if one.template.takes(one.node):
        (config,) = filter(is_library, one.space.configs())
        assert config == library_config(one.space) and one.pinned == (config,)
        assert one.space.from_params(one.space.to_params(config)) == config
        assert one.numerics(config) == "library" != one.numerics(one.default)


@pytest.mark.quick
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_quick_always_tries_it_right_behind_the_default(tokens: int) -> None:
    one = tunable(tokens)
    limit = EFFORTS["quick"].allowed(one.space)
    default, second, *others = quick_candidates(one, limit=limit)
    assert default == one.default and is_library(second)
    assert others and not any(map(is_library, others))


@pytest.mark.quick
def test_its_prior_is_of_the_size_of_the_kernels() -> None:
    form = Form(k=4096, n=14336, norm="weight", halves=True, dtype=DType.BF16)
    for tokens in (1, 64):
        one = tunable(tokens, form)
        (config,) = one.pinned
        assert 1.0 < one.prior(config) / (4096 * 2 * 14336 * 2 / 3.35e12) < 2.0
        assert 0.5 < one.prior(config) / one.prior(one.default) < 2.0
    bare, more = tunable(16, Form(dtype=DType.BF16)), tunable(16, SMALL)
    assert bare.prior(bare.pinned[0]) < 1e-6  # one call of little work
    assert 4e-6 < more.prior(more.pinned[0]) < 6e-6  # and two launches more


def test_it_is_prepared_as_calls_with_a_digest_of_its_own() -> None:
    one = tunable(16)
    (config,) = one.pinned
    assert one.template.source(one.node, config, one.sizes, H100) is None
    assert one.template.calls(one.node, one.default, H100) is None
    program, sources = one.template.calls(one.node, config, H100) or pytest.fail("no calls")
    assert [call.kind for call in program.calls] == ["generated", "library", "generated"]
    assert len(sources) == 2
    found = one.prepare([config, one.default])
    digests = {r.digest for r in found.values() if isinstance(r, Ready)}
    assert len(digests) == 2
    again = tunable(16).prepare([config])[config]
    assert again == found[config]


def test_where_no_library_takes_the_product_it_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("tilewright.codegen.triton.unfused.takes", lambda node: False)
    one = tunable(16)
    assert isinstance(one.prepare(one.pinned)[one.pinned[0]], Refused)


class Interpreted(InterpretedKernel):
    """Stands for the runner's kernel on a device; without ``writes`` it does nothing."""

    poisons, writes = False, True

    def __init__(self, package, results, aliases, device) -> None:
        super().__init__(package.source, results, aliases, device)

    def launch(self, *args) -> None:
        if self.writes:
            super().launch(*args)

    def _result(self, *args) -> torch.Tensor:
        result = super()._result(*args)
        return result.fill_(torch.nan) if self.poisons else result


@pytest.fixture
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_CheckedKernel", Interpreted)
    monkeypatch.setattr(
        runner, "compile_sources", lambda sources, arch: [KernelPackage(s, {}) for s in sources]
    )


def of_runner(one: KernelTunable) -> tuple[runner._CheckedCalls, list[torch.Tensor | None]]:
    """The library's calls as a runner loads them, and operands that it times them with."""
    calls = one.template.calls(one.node, one.pinned[0], H100)
    assert calls is not None
    cpu = torch.device("cpu")
    operands = one.template.operands(one.node, one.sizes, cpu, 0)
    return runner._CheckedCalls(calls, one.node, H100.arch, cpu), list(operands)


@pytest.mark.parametrize("form", [SMALL, Form(k=40, strided=True, behind=("gelu", "residual"))])
def test_the_calls_that_a_runner_times_compute_the_problem(form: Form, _interpreted) -> None:
    one = tunable(16, form)
    calls, operands = of_runner(one)
    (found,) = calls(operands, one.sizes)
    bases = dict(zip(bases_of(one.node), operands, strict=True))
    wide = [bases[node].double() for node in one.graph.inputs]
    (wanted,) = interpret(widened(one.graph, DType.F64), wide)
    error = float((found.double() - wanted).abs().max())
    assert error <= ERROR[form.dtype] * (1.0 + float(wanted.abs().max()))


def test_a_kernel_around_the_library_that_writes_nothing_is_seen(_interpreted, monkeypatch) -> None:
    one = tunable(16, SMALL)
    calls, operands = of_runner(one)
    calls.poisons = True
    assert calls(operands, one.sizes)[0].isfinite().all()
    monkeypatch.setattr(Interpreted, "writes", False)
    assert calls(operands, one.sizes)[0].isnan().all()


def chosen(one: KernelTunable, config: Config, *runners_up: Config) -> Record:
    others = tuple((c, 1.2e-5) for c in runners_up)
    return choice_of(one, config, conditions=conditions_here(), runners_up=others)


def store_of(path: Path, graph: Graph, library_at: tuple[int, ...]) -> Store:
    """A store that has the library for these buckets, and the default for the others."""
    store = Store(path / "tuning.jsonl")
    for one in problems_of(graph, H100, 128):
        tokens = dict(one.key.problem)["tokens"]
        store.add(chosen(one, one.pinned[0] if tokens in library_at else one.default))
    return store


@pytest.mark.parametrize("tokens", [1, 64, 65, 128])
def test_a_compile_takes_the_library_where_a_record_chose_it(tmp_path, tokens: int) -> None:
    graph = graph_of(product_of("one", SMALL, tensor("x", SMALL.dtype, B, SMALL.k)))
    store = store_of(tmp_path, graph, (128,))
    lowered = BACKEND.lower(graph, CPU, max_sequences=128, tuning=store)
    kinds = [call.kind for call in lowered.program.at({"B": tokens}).calls]
    assert kinds == (["generated", "library", "generated"] if tokens > 64 else ["template"])
    inputs, weights = drawn(graph, tokens)
    made = ProgramRunner(lowered.program, weights, lowered.files.__getitem__)
    (found,) = made.run(inputs).values()
    (wanted,) = truth(graph, inputs, weights)
    error = float((found.double() - wanted).abs().max())
    assert error <= 2 * ERROR[SMALL.dtype] * (1.0 + float(wanted.abs().max()))
    lines = [json.loads(line) for line in lowered.files["tuning.jsonl"].splitlines()]
    products = [line["key"]["problem"] | line for line in lines if "n" in line["key"]["problem"]]
    by_tokens = {line["tokens"]: line for line in products}
    assert by_tokens[128]["config"]["candidate"] == "library" and by_tokens[128]["used"]
    assert by_tokens[64]["config"]["candidate"] == "triton" and not by_tokens[64]["used"]


def test_explain_names_the_candidate(tmp_path) -> None:
    one = tunable(16)
    store = Store(tmp_path / "tuning.jsonl")
    store.add(chosen(one, one.pinned[0]))
    assert "candidate=library" in explain(lookup(store, one.key, conditions_here()))


def another(one: KernelTunable) -> Config:
    """A cut that is not the default."""
    configs = one.space.configs()
    return next(c for c in configs if c != one.default and not is_library(c))


def choices(path: Path, *records: Record, conditions: Conditions | None = None) -> Choices:
    store = Store(path / "tuning.jsonl")
    for one in records:
        store.add(one)
    return Choices(store, H100, conditions or conditions_here())


def test_a_cut_where_the_library_may_not_be_is_the_best_of_ours(tmp_path) -> None:
    one, node = tunable(16), linear_node(FORM)
    other = another(one)
    (library,) = one.pinned
    for number, (runners, wanted) in enumerate(
        [((other, one.default), gemm_of(other)), ((one.default, other), None), ((), None)]
    ):
        made = choices(tmp_path / str(number), chosen(one, library, *runners))
        assert made.library(node, 16) and made.gemm(node, 16) == wanted
    ours = choices(tmp_path / "ours", chosen(one, other, library))
    assert not ours.library(node, 16) and ours.gemm(node, 16) is not None


def test_of_other_conditions_only_the_choice_is_taken(tmp_path) -> None:
    one, node = tunable(16), linear_node(FORM)
    record = chosen(one, one.pinned[0], another(one))
    made = choices(tmp_path, record, conditions=Conditions("3.0", None, "0"))
    assert made.library(node, 16) and made.gemm(node, 16) is None


def test_linked_products_take_the_library_where_nothing_is_handed_on(tmp_path) -> None:
    graph = Pair(
        Form(k=32, n=128, dtype=DType.BF16, behind=("residual",)),
        Form(k=128, n=24, dtype=DType.BF16, norm="weight"),
    ).graph
    store = store_of(tmp_path, graph, (1, 16, 32, 64, 128))
    cutting = Cutting(128, Choices(store, H100, conditions_here()))
    program, _, _ = lower_graph(graph, H100, cutting=cutting)
    for tokens in (1, 16, 64, 65):
        calls = program.at({"B": tokens}).calls
        handed = 1 < tokens <= 64
        assert any(map(hands_on, calls)) is handed
        assert any(call.kind == "library" for call in calls) is not handed
