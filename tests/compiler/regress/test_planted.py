"""Defects of several kinds, planted one at a time: each is found, and named where it belongs.

What is planted here is wrong on purpose, and never run: only what it costs is looked at.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from regress_suites import HEAD, LLAMA, suite_of
from tilewright.autotune.verdicts import Verdict
from tilewright.codegen.triton import candidates, generate, generate_ops, lowering
from tilewright.codegen.triton.kernels import append_kv, paged_decode
from tilewright.codegen.triton.kernels import paged_attention_tiles as tiles
from tilewright.compiler import graphs
from tilewright.compiler.regress import collect as module
from tilewright.compiler.regress.baseline import Baseline
from tilewright.compiler.regress.collect import collect, versions
from tilewright.compiler.regress.compare import compare_snapshots
from tilewright.compiler.regress.counting import PYTHON
from tilewright.compiler.regress.gates import bare
from tilewright.compiler.regress.markdown import render_markdown
from tilewright.compiler.regress.model import Side
from tilewright.ir.build import cast
from tilewright.ir.dtypes import DType
from tilewright.ir.schema import schema
from tilewright.passes import kv_cache, merge_projections
from tilewright.passes.pipeline import pipeline

KEY = ("tiny", "h100")
ONE_LAYER = LLAMA.replace("num_hidden_layers = 2", "num_hidden_layers = 1")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return suite_of(tmp_path_factory.mktemp("suite"), HEAD + ONE_LAYER)


@pytest.fixture(scope="module")
def baseline(suite):
    return Baseline(Side("healthy", versions=versions()), suite.name, "", collect(suite))


@pytest.fixture
def compared(suite, baseline):
    """What comparing with the healthy snapshot gives; nothing planted gets into the cache."""

    def compare():
        new = module._collect_one(suite.cases[0], "h100", warm=True)
        return compare_snapshots(suite, baseline, {KEY: new})

    return compare


def _found(comparison, verdict=Verdict.REGRESSION):
    return {(row.subject, row.series): row for row in comparison.of(verdict)}


def _subjects(comparison, tier=2):
    return {row.subject for row in comparison.findings if row.tier == tier}


def _change_sources(monkeypatch, change):
    """Each kernel source is changed on its way to the compiler, and so are the calls of it."""
    real = lowering.lower_graph

    def lower_graph(*args):
        program, sources, notes = real(*args)
        changed = [change(source) for source in sources]
        ids = {
            lowering.kernel_id(old): lowering.kernel_id(new)
            for old, new in zip(sources, changed, strict=True)
        }
        heads = [call.kernel.rsplit("/", 1) for call in program.calls]
        calls = [
            replace(call, kernel=f"{head}/{ids.get(last, last)}")
            for call, (head, last) in zip(program.calls, heads, strict=True)
        ]
        return replace(program, calls=tuple(calls)), tuple(changed), notes

    monkeypatch.setattr(lowering, "lower_graph", lower_graph)


@pytest.mark.nightly
def test_projections_that_are_not_merged_are_found_in_each_step(monkeypatch, compared):
    groups = merge_projections._groups

    def only_pairs(graph):
        return {node: some for node, some in groups(graph).items() if len(some) == 2}

    monkeypatch.setattr(merge_projections, "_groups", only_pairs)
    found = compared()
    # Three linears instead of one; a batch has a launch for the norm in front of each.
    for phase, more in (("decode step", 2), ("decode step, batch 4", 4), ("prefill", 2)):
        row = _found(found)[phase, "launches"]
        assert row.new - row.old == more
        assert "linear" in row.note and len(row.note.split(", ")) <= 2
    assert row.note == "linear 5 → 7"
    changed = _found(found, Verdict.CHANGED)
    note = changed["program", "source"].note
    assert note.startswith("pass merge_projections makes another graph: ")
    assert render_markdown(found).index(note[:26]) < render_markdown(found).index("Regressions")


@pytest.mark.nightly
def test_logits_of_all_tokens_are_found_in_the_prompt_alone(monkeypatch, compared):
    monkeypatch.setattr(kv_cache, "pick_rows", lambda graph, pick: graph)
    found = _found(compared())
    row = found["prefill", "flops"]
    hidden, vocab, tokens = 64, 160, 64  # of the suite's model; all but one token are too many
    assert row.new - row.old > 2 * hidden * vocab * (tokens - 1)
    assert row.note.startswith("linear ")
    assert ("decode step", "flops") not in found


@pytest.mark.nightly
def test_logits_kept_in_float32_are_found_as_bytes(monkeypatch, compared):
    select = kv_cache.pick_rows

    def wide(graph, pick):
        logits, *caches = (found := select(graph, pick)).outputs
        return found.with_outputs((cast(logits, DType.F32), *caches))

    monkeypatch.setattr(kv_cache, "pick_rows", wide)
    found = _found(compared())
    row = found["prefill", "bytes"]
    assert row.new - row.old == 160 * (2 + 4)  # read in 16 bits, written in 32
    assert row.note.startswith("cast")
    row = found["decode step", "bytes"]
    assert row.new - row.old == 160 * (2 + 2)  # two bytes more, and the sampler reads them
    assert "sample" in row.note and "linear" in row.note and "cast" not in row.note


def test_an_op_that_went_to_torch_is_found_as_an_obstacle_with_its_name(monkeypatch, compared):
    kernels = {op: emits for op, emits in candidates.KERNELS.items() if op != "append_kv"}
    monkeypatch.setattr(lowering, "kernels_for", lambda cutting, cuts: kernels)
    found = _found(compared())
    assert found["decode step", "launches"].note.count("eager/append_kv 0 → 1") == 1
    assert found["program", "eager calls"].new == 1
    assert found["program", "eager calls"].note == "eager/append_kv 0 → 1"


@pytest.mark.nightly
def test_a_pipeline_that_was_lost_is_found_in_its_launch_alone(monkeypatch, compared):
    rows = tiles.PREFILL[False]
    single = tuple((width, replace(tile, num_stages=1)) for width, tile in rows)
    monkeypatch.setattr(tiles, "PREFILL", {**tiles.PREFILL, False: single})
    for user in ("prefill_steps", "paged_attention"):
        name = f"tilewright.codegen.triton.kernels.{user}.PREFILL"
        monkeypatch.setattr(name, tiles.PREFILL)
    comparison = compared()
    row = _found(comparison)["paged_attention", "async loads (prefill)"]
    assert (row.old, row.new, row.gate) == (1, 0, "-0")
    assert _subjects(comparison) == {"paged_attention"}
    assert not [series for _, series in _found(comparison) if series.endswith("(decode)")]


def test_a_slow_exponential_is_found_in_the_kernel_that_has_one(monkeypatch, compared):
    monkeypatch.setattr(generate_ops, "native", lambda dtype: dtype is DType.F64)
    comparison = compared()
    kernels = {"gated", "rms_norm_linear_gated"}
    assert kernels <= _subjects(comparison) <= kernels | {"program"}
    row = _found(comparison)["gated", "instructions"]
    assert row.new > 1.3 * row.old
    text = render_markdown(comparison)
    first, second, program = (
        text.find(f"<code>{name}</code>") for name in (*sorted(kernels), "program")
    )
    assert first >= 0 and second >= 0  # and before the Program, where that is blamed too
    assert program < 0 or max(first, second) < program


def test_a_launch_more_in_the_prompt_leaves_the_other_phases_alone(monkeypatch, compared):
    def twice(source):
        if source.name != "paged_attention":
            return source
        split, *whole = source.variants
        more = (replace(one, launches=one.launches * 2) for one in whole)
        return replace(source, variants=(split, *more))

    _change_sources(monkeypatch, twice)
    comparison = compared()
    found = _found(comparison)
    assert {subject for subject, series in found if series == "launches"} == {"prefill", "mixed"}
    assert found["prefill", "launches"].note == "paged_attention 1 → 2"
    assert not any(subject.startswith("decode") for subject, _ in found)


@pytest.mark.nightly
def test_pdl_switched_off_is_found_in_the_kernels_that_lost_it(monkeypatch, compared):
    for module_ in (append_kv, generate, paged_decode):  # the linears keep it
        monkeypatch.setattr(module_, "has_pdl", lambda target: False)
    comparison = compared()
    found = _found(comparison)
    lost = {subject.split("#")[0] for subject, series in found if bare(series) == "pdl"}
    assert {"paged_decode", "rope_append_kv", "embedding", "gated"} <= lost
    assert not any("linear" in subject or subject == "sample" for subject, _ in found)
    for phase in ("decode step", "decode step, batch 4", "prefill"):
        assert found[phase, "pdl launches"].new < found[phase, "pdl launches"].old
        assert found[phase, "pdl launches"].note.startswith("lost by: ")
        assert (phase, "launches") not in found
    assert "rope_append_kv" in found["decode step", "pdl launches"].note
    assert found["paged_decode", "pdl (decode)"].gate == "-0"


def test_a_pass_that_became_quadratic_is_found_in_compiling(monkeypatch, compared):
    def slow(graph):
        assert all(schema(a.op) and schema(b.op) for a, b in product(graph.nodes, graph.nodes))
        return graph

    def with_slow(*args):
        steps = pipeline(*args)
        return (*steps[:3], replace(steps[3], run=lambda g: steps[3].run(slow(g))), *steps[4:])

    monkeypatch.setattr(graphs, "pipeline", with_slow)
    comparison = compared()
    assert _subjects(comparison) == {"compile"}
    whole = f"python calls ({PYTHON})"
    assert _found(comparison)["compile", whole].note.startswith("passes ")
    # Which pass is not said rightly of one that is run by a function of the test's.
    assert _found(comparison)["compile", f"python calls of passes ({PYTHON})"].note


def test_what_changes_no_machine_code_is_shown_and_blamed_on_nobody(monkeypatch, compared):
    def hello(source):
        said = "# Hello.\n" if source.kind == "generated" else ""
        return replace(source, text=source.text + said)

    _change_sources(monkeypatch, hello)
    comparison = compared()
    assert comparison.exit_code == 0
    assert {row.tier for row in comparison.of(Verdict.CHANGED)} == {1}
    assert not comparison.of(Verdict.IMPROVEMENT)
