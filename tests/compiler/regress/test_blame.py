"""Figures that moved without better or worse code, and the kernels that are named for the rest."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regress_suites import GRAPH, HEAD, kernel, snapshot, suite_of
from tilewright.autotune.verdicts import Verdict
from tilewright.compiler.regress.baseline import Baseline
from tilewright.compiler.regress.collect import versions
from tilewright.compiler.regress.compare import compare_snapshots
from tilewright.compiler.regress.model import Side
from tilewright.compiler.regress.running import Runs

KEY = ("norm", "h100")
STEP = "decode step"
CUBINS = {"split": "1", "merge": "2", "prefill": "3"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    text = HEAD + GRAPH.replace('watch = ["add_rms_norm"]', "watch = []")
    return suite_of(tmp_path_factory.mktemp("suite"), text)


@pytest.fixture
def compare(suite):
    """Rows by subject and series, of two snapshots that are given by their fields."""

    def rows(old, new):
        definition = suite.cases[0].definition
        old, new = (replace(side, definition=definition) for side in (old, new))
        base = Baseline(Side("base", versions=versions()), suite.name, "", {KEY: old})
        found = compare_snapshots(suite, base, {KEY: new}, new_side=Side("x", versions=versions()))
        return {(row.subject, row.series): row for row in found.rows}

    return rows


def side(*kernels, parts=None, running=None, program="{}", **series):
    """A snapshot of one phase, with the series of it."""
    figures = {name.replace("_", " "): value for name, value in series.items()}
    return snapshot(
        "",
        *kernels,
        series={STEP: figures},
        parts={STEP: parts or {}},
        running={STEP: running} if running is not None else {},
        program=program,
    )


def attention(*running, digest="1", launches=None, others=10, cubins=CUBINS, **series):
    """A step with an attention of several binaries, and other launches."""
    launches = len(running) if launches is None else launches
    return side(
        kernel("attention_ab12", digest * 64, cubins=cubins, series={}),
        parts={"attention": (launches, 1, 1), "linear": (others, 1, 1)},
        running={"attention": running},
        launches=launches + others,
        launches_a_layer=launches + others,
        **series,
    )


# Binaries that run


@pytest.mark.quick
def test_a_binary_that_is_never_chosen_any_more_is_a_finding_and_no_win(compare):
    found = compare(attention("split", "merge"), attention("prefill", digest="2"))
    row = found["attention", f"runs ({STEP})"]
    assert (row.verdict, row.tier, row.gate, row.better) == (
        Verdict.REGRESSION, 2, "the same", "equal",
    )  # fmt: skip
    assert (row.old, row.new) == (2, 1)
    assert row.note == "split, merge no longer run; prefill does"
    for series in ("launches", "launches a layer"):
        row = found[STEP, series]
        assert row.verdict is Verdict.CHANGED
        assert "attention: split, merge no longer run" in row.note and "2 → 1" in row.note


def test_other_binaries_that_run_are_shown(compare):
    def one(old, new, **more):
        row = compare(attention(*old), attention(*new, **more))["attention", f"runs ({STEP})"]
        return row.verdict, row.note

    same = ("split", "merge")
    assert one(same, same) == (Verdict.NO_CHANGE, "")
    assert one(same, ("merge", "split")) == (Verdict.NO_CHANGE, "")
    assert one(("prefill",), ("prefill", "merge")) == (Verdict.CHANGED, "merge runs too")
    fewer = {"prefill": "3"}
    assert one(same, ("prefill",), cubins=fewer) == (
        Verdict.CHANGED, "split, merge are gone; prefill does",
    )  # fmt: skip


def test_a_fall_of_launches_that_has_another_cause_stays_a_win(compare):
    found = compare(attention("split", "merge"), attention("prefill", others=8))
    assert found[STEP, "launches"].verdict is Verdict.IMPROVEMENT
    # One kernel lost binaries, another has more launches: there is nothing to its credit.
    found = compare(attention("split", "merge", launches=9), attention("prefill", others=11))
    assert found[STEP, "launches"].verdict is Verdict.CHANGED


def test_memory_of_binaries_that_run_no_longer_is_no_win(compare):
    old = attention("split", "merge", workspace=100)
    for running, verdict in (
        (("prefill",), Verdict.CHANGED),
        (("split", "merge"), Verdict.IMPROVEMENT),
    ):
        found = compare(old, attention(*running, digest="2", workspace=0))
        assert found[STEP, "workspace"].verdict is verdict


def test_sides_that_do_not_know_what_runs_are_not_judged_by_it(compare):
    old, new = attention("split", "merge"), attention("prefill")
    for one, other in ((replace(old, running={}), new), (old, replace(new, running={}))):
        found = compare(one, other)
        assert ("attention", f"runs ({STEP})") not in found
        assert found[STEP, "launches"].verdict is Verdict.IMPROVEMENT


labels = st.lists(st.sampled_from(["", *CUBINS, "other"]), unique=True).map(tuple)


@given(labels, labels, st.frozensets(st.sampled_from(["", *CUBINS, "other"])))
def test_there_is_a_note_where_and_only_where_binaries_differ(old, new, there):
    runs = Runs(STEP, "attention", old, new, there)
    assert bool(runs.note) == runs.differs == (sorted(old) != sorted(new))
    assert set(runs.stopped) == (set(old) - set(new)) & there


# The cost model, layers, and launches that start early


@pytest.mark.quick
@pytest.mark.parametrize("series", ["flops", "bytes", "roofline"])
@pytest.mark.parametrize("factor", [0.5, 2])
def test_other_costs_of_the_same_code_are_another_model(compare, series, factor):
    one = kernel()
    old, new = side(one, **{series: 100}), side(one, **{series: 100 * factor})
    row = compare(old, new)[STEP, series]
    assert row.verdict is Verdict.CHANGED and "cost model changed" in row.note
    better = Verdict.IMPROVEMENT if factor < 1 else Verdict.REGRESSION
    for other in (replace(new, program="{ }"), replace(new, kernels=(kernel(digest="2" * 64),))):
        assert compare(old, other)[STEP, series].verdict is better


def test_launches_that_left_the_layers_are_no_win(compare):
    def layer(launches):
        old = side(launches=30, launches_a_layer=12.5)
        new = side(launches=launches, launches_a_layer=6.0, program="{ }")
        return compare(old, new)[STEP, "launches a layer"]

    assert layer(43).verdict is Verdict.CHANGED and "outside of the layers" in layer(43).note
    assert layer(30).verdict is Verdict.CHANGED
    assert layer(17).verdict is Verdict.IMPROVEMENT


@pytest.mark.parametrize(
    ("launches", "early", "verdict"),
    [
        ((25, 20), (24, 19), Verdict.CHANGED),  # one that had it is gone
        ((25, 20), (25, 19), Verdict.REGRESSION),
        ((25, 20), (24, 18), Verdict.REGRESSION),
        ((25, 20), (50, 40), Verdict.CHANGED),  # twice as many of either kind
        ((25, 20), (25, 21), Verdict.IMPROVEMENT),
    ],
)
def test_pdl_is_judged_by_the_launches_without_it(compare, launches, early, verdict):
    old, new = (side(launches=n, pdl_launches=pdl) for n, pdl in (launches, early))
    assert compare(old, new)[STEP, "pdl launches"].verdict is verdict


# Culprits


def program(*calls):
    """A Program's text, as far as its calls go."""
    data = {"name": "f", "buffers": {}, "inputs": [], "weights": {}, "outputs": [], "bodies": {}}
    return json.dumps({**data, "calls": [{"kernel": name} for name in calls]})


def test_calls_in_torch_and_obstacles_are_named(compare):
    calls = ["triton/generated/add_ab12-00000000", "eager/reshape", "eager/gelu"]
    old = side(program=program(*calls), graph_obstacles=0)
    new = side(program=program(*calls, "eager/moe_experts"), graph_obstacles=1)
    old, new = (
        replace(one, series={**one.series, "program": {"eager calls": n, "generated calls": 4 - n}})
        for one, n in ((old, 1), (new, 2))
    )
    found = compare(old, new)
    assert found["program", "eager calls"].note == "eager/moe_experts 0 → 1"
    assert found[STEP, "graph obstacles"].note == "moe_experts 0 → 1"
    unread = compare(replace(old, program="no JSON"), replace(new, program="[]"))
    assert unread["program", "eager calls"].note == ""
    assert unread["program", "eager calls"].verdict is Verdict.REGRESSION


def test_roofline_and_memory_are_laid_to_kernels(compare):
    old = side(parts={"add": (1, 5, 100), "mul": (1, 5, 7)}, roofline=1, peak_memory=1)
    grown = {"add": (1, 5, 20_000), "mul": (1, 6, 7)}
    new = side(parts=grown, roofline=2, peak_memory=2, program="{ }")
    found = compare(old, new)
    assert found[STEP, "roofline"].note == "bytes: add 100 bytes → 20 kB"
    assert found[STEP, "peak memory"].note == "bytes: add 100 bytes → 20 kB"
    new = side(parts={"add": (1, 6, 100), "cast": (1, 5, 7)}, roofline=2, peak_memory=2)
    new = replace(new, program="{ }", parts={STEP: {**new.parts[STEP], "mul": (0, 5, 7)}})
    found = compare(old, new)
    assert found[STEP, "roofline"].note.startswith("bytes: cast 0 bytes → 7 bytes")
    assert found[STEP, "peak memory"].note == "new: cast"
    planned = compare(old, replace(old, series={STEP: {"roofline": 1, "peak memory": 2}}))
    assert "planned otherwise" in planned[STEP, "peak memory"].note
    assert planned[STEP, "peak memory"].verdict is Verdict.REGRESSION


def test_passes_are_named_for_what_compiling_takes(compare):
    name = "python calls (3.11)"
    old, new = (
        replace(side(), series={"compile": {name: n}}, shares={name: {"fuse": n - 1, "norm": 1}})
        for n in (100, 200)
    )
    assert compare(old, new)["compile", name].note == "fuse 99 → 199"
    assert compare(replace(old, shares={}), new)["compile", name].note == ""


def test_only_the_largest_changes_are_named(compare):
    old = side(parts={f"k{i}": (1, 1, 1) for i in range(9)}, launches=9)
    new = side(parts={f"k{i}": (1 + i, 1, 1) for i in range(9)}, launches=45)
    note = compare(old, new)[STEP, "launches"].note
    assert note.startswith("k8 1 → 9, k7 1 → 8, ") and note.endswith(", and 4 more")


def test_programs_that_come_with_launches_are_only_a_change(compare):
    def verdict(launches, programs):
        old, new = (
            side(
                kernel(series={f"programs ({STEP})": n}),
                parts={"add": (count, 1, 1)},
                program=f"{launches}" if index else "{}",
            )
            for index, (n, count) in enumerate(zip((8, programs), (2, launches), strict=True))
        )
        return compare(old, new)["add", f"programs ({STEP})"]

    assert verdict(2, 16).verdict is Verdict.REGRESSION  # the grid grew
    assert verdict(1, 4).verdict is Verdict.CHANGED and "2 → 1" in verdict(1, 4).note
    assert verdict(4, 16).verdict is Verdict.CHANGED
    assert verdict(4, 32).verdict is Verdict.REGRESSION


def test_less_to_compile_is_no_win_where_torch_makes_it(compare):
    def compiled(kernels, eager):
        figures = {"kernels": kernels, "eager calls": eager}
        return replace(side(), series={"program": figures, "compile": {"python calls": kernels}})

    for eager, verdict in ((0, Verdict.IMPROVEMENT), (5, Verdict.CHANGED)):
        found = compare(compiled(9, 0), compiled(4, eager))
        assert found["program", "kernels"].verdict is verdict
        assert found["compile", "python calls"].verdict is verdict
    assert "more eager calls" in found["program", "kernels"].note
    assert compare(compiled(4, 0), compiled(9, 5))["compile", "python calls"].verdict is (
        Verdict.REGRESSION
    )


def test_kernels_that_code_and_workspaces_are_of_are_named(compare):
    def step(*kernels, **figures):
        one = side(*kernels, **figures)
        return replace(one, series={**one.series, "program": {"code bytes": figures["workspace"]}})

    add, mul = kernel(), kernel("mul_ab12", "2" * 64)
    grown = replace(add, digest="3" * 64, launches=("always:",), cubins={"": "9"})
    found = compare(step(add, mul, workspace=1), step(grown, workspace=2))
    assert found[STEP, "workspace"].note == "gone: mul; other launches: add"
    assert found["program", "code bytes"].note == "gone: mul; other machine code: add"
