"""The experiment on rules for regressions: its parts by their definitions, and its findings."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tilewright.autotune.rule import Rule, SeriesSpec, run_rule
from tilewright.autotune.verdicts import Verdict
from tilewright.errors import UsageError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bench = load("bench_regress")
noises = sys.modules["regress_noise"]
# A dozen series, and sessions whose loads of the same code differ by 0.2%.
NOISE = noises.synthetic_noise(seed=1, sessions=12, series=12)
CODES = {
    bench.UNDECIDED: Verdict.UNDECIDABLE,
    bench.SAME: Verdict.NO_CHANGE,
    bench.BETTER: Verdict.IMPROVEMENT,
    bench.WORSE: Verdict.REGRESSION,
}


@pytest.mark.quick
def test_our_rule_neither_cries_wolf_nor_sleeps():
    ours, *usual = bench.sensitivity(NOISE, 300, Rule(), seed=2)
    assert ours.name == bench.OURS
    assert ours.false_alarms == 0
    assert ours.false_alarm_bound < 0.01
    assert ours.detected[1.03] >= 0.95 * 300
    assert ours.detected[1.05] == ours.detected[1.10] == 300
    assert ours.detected[1.01] <= 0.05 * 300  # within what two loads may differ by
    assert ours.seconds[0] < 60
    rules = {rule.name: rule for rule in usual}
    assert rules["fixed 5% of medians"].detected[1.03] <= 0.05 * 300
    assert rules["fixed 10% of medians"].detected[1.05] == 0
    assert rules["Mann-Whitney 0.05, factor 1.1"].detected[1.05] == 0
    assert 0.2 < rules["fixed 5% of medians"].detected[1.05] / 300 < 0.8
    in_a_row = rules["5% two in a row"].detected[1.05]
    assert in_a_row < rules["fixed 5% of medians"].detected[1.05]


def test_stored_times_suffer_where_sessions_differ():
    """Pairs cancel what a session is slower by; times of another session do not."""
    slow = np.exp(np.random.default_rng(0).normal(0, 0.05, (12, 1, 1)))
    noise = noises.Noise(NOISE.header, NOISE.series, NOISE.old * slow, NOISE.new * slow)
    results = {r.name: r for r in bench.sensitivity(noise, 200, Rule())}
    assert results[bench.OURS].false_alarms == 0
    assert results["fixed 5% of medians"].false_alarms == 0
    assert results["fixed 5% of medians, stored"].false_alarms > 20


def test_a_bias_beyond_the_dead_zone_is_no_longer_harmless():
    """The counterpart: the experiment does count false alarms of ours where there are some."""
    noise = noises.synthetic_noise(seed=1, sessions=12, series=12, bias=0.02)
    ours = bench.sensitivity(noise, 100, Rule())[0]
    assert ours.false_alarms > 20


@pytest.mark.parametrize("factor", [1.0, 1.02, 1.05])
def test_many_runs_at_once_are_what_the_rule_does_one_by_one(factor):
    rng = np.random.default_rng(4)
    noise = noises.synthetic_noise(seed=3, sessions=6, series=5, bias=0.006)
    first = noises.Suites.draw(noise, 12, 72, rng)
    second = noises.Suites.draw(noise, 12, 72, rng, other_than=first.session)
    planted = rng.integers(0, 5, 12)
    ours = bench.Ours(first, second, Rule())
    called, seconds = ours.run(planted, factor)
    for run in range(12):
        decisions = one_by_one(noise, first, second, run, planted[run], factor)
        regressions = [d.verdict is Verdict.REGRESSION for d in decisions.values()]
        assert regressions == list(called[run])
        rounds = sum(d.rounds for d in decisions.values())
        assert seconds[run] == pytest.approx(0.02 * rounds)


def one_by_one(noise, first, second, run, planted, factor):
    def measure_of(suites):
        taken = dict.fromkeys(noise.series, 0)

        def measure(names):
            pairs = {}
            for name in names:
                series = noise.series.index(name)
                at = suites.session[run], series, suites.order[run, taken[name]]
                taken[name] += 1
                pairs[name] = noise.old[at], noise.new[at] * (factor if series == planted else 1)
            return pairs

        return measure

    specs = {name: SeriesSpec() for name in noise.series}
    return run_rule(specs, measure_of(first), Rule(), confirm=lambda: measure_of(second))


def test_a_run_takes_one_session_and_the_second_another():
    rng = np.random.default_rng(0)
    first = noises.Suites.draw(NOISE, 500, 72, rng)
    second = noises.Suites.draw(NOISE, 500, 72, rng, other_than=first.session)
    assert (first.session != second.session).all()
    assert set(first.session) == set(second.session) == set(range(12))
    within = np.diff(first.order[:, :70].reshape(500, -1, noises.BLOCK), axis=2)
    assert (within == 1).all()  # blocks stay whole
    assert first.order.max() < NOISE.old.shape[2]


@pytest.mark.parametrize("ties", [False, True])
def test_mann_whitney_by_all_divisions(ties):
    rng = np.random.default_rng(6)
    for shift in (0.0, 0.7):
        x = rng.normal(size=14) + shift * (np.arange(14) >= 7)
        x = np.round(x) if ties else x
        above = (x[None, :] > x[:, None]) + (x[None, :] == x[:, None]) / 2  # [old, new]
        new = np.zeros((math.comb(14, 7), 14))
        for division, members in zip(new, itertools.combinations(range(14), 7), strict=True):
            division[list(members)] = 1
        u = np.einsum("ia,ab,ib->i", 1 - new, above, new)
        exact = np.mean(u >= u[-1])  # the last division is the one at hand
        (p,) = bench.mann_whitney_p(x[None, :7], x[None, 7:])
        assert p == pytest.approx(exact, abs=0.06 if ties else 0.02)


@pytest.mark.quick
@pytest.mark.parametrize("n", [1, 20, 2000])
def test_the_bounds_have_their_closed_forms(n):
    assert bench.upper_bound(0, n) == pytest.approx(1 - 0.05 ** (1 / n))
    assert bench.upper_bound(n, n) == 1


@pytest.mark.parametrize(("k", "n"), [(3, 10), (7, 2000), (1990, 2000)])
def test_the_bounds_by_summing_the_binomial(k, n):
    p = Fraction(bench.upper_bound(k, n))
    q = 1 - p
    # From the top, so that a long sum of exact fractions stays short.
    above = range(k + 1, n + 1) if n - k < 20 else ()
    terms = above or range(k + 1)
    total = sum(float(math.comb(n, i) * p**i * q ** (n - i)) for i in terms)
    assert (1 - total if above else total) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.quick
def test_a_creep_is_found_by_history_and_by_no_single_step():
    drift = bench.drift_experiment(NOISE, Rule(), histories=2, quiet=20, steps=200, seed=1)
    assert all(1 <= week <= 10 for week in drift.found_in_week)
    assert drift.step_alarms == 0
    assert drift.false_alarms == 0


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", "utf-8")
    return path


def recorded(sessions=(0, 1), series=("a", "b"), pairs=8):
    header = {"device": "H100", "round_seconds": dict.fromkeys(series, 0.5)}
    times = [1e-3 + 1e-6 * i for i in range(pairs)]
    return [
        header,
        *(
            {"series": name, "session": session, "old": times, "new": times[::-1]}
            for session in sessions
            for name in series
        ),
    ]


def test_recorded_noise_is_read_and_cut_to_the_shortest(tmp_path):
    lines = recorded()
    lines[2] = {**lines[2], "old": lines[2]["old"][:6], "new": lines[2]["new"][:6]}
    lines[0]["thresholds"] = {"b": 0.05}
    noise = noises.read_noise(write(tmp_path / "noise.jsonl", lines))
    assert noise.series == ("a", "b")
    assert noise.old.shape == (2, 2, 6)
    assert list(noise.thresholds) == [0.02, 0.05]
    assert list(noise.round_seconds) == [0.5, 0.5]
    assert noise.new[0, 0, 0] == pytest.approx(1e-3 + 7e-6)


def changed(index, **fields):
    lines = recorded()
    lines[index] = {**lines[index], **fields}
    return lines


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (recorded(sessions=(0,)), "1 sessions"),
        (recorded()[:-1], "no b in session 1"),
        (recorded(pairs=3), "3 pairs"),
        (changed(0, round_seconds={"a": 1.0}), "no round_seconds of b"),
        (changed(2, old=[1.0]), "line 3.*not pairs"),
        (changed(2, old=[0.0] * 8), "line 3.*not pairs"),
        (changed(2, session="x"), "line 3"),
        ([*recorded(), {"series": "c"}], "line 6.*old"),
        ([[1], *recorded()[1:]], "line 1"),
    ],
)
def test_broken_noise_is_refused(tmp_path, lines, word):
    with pytest.raises(UsageError, match=word):
        noises.read_noise(write(tmp_path / "noise.jsonl", lines))


def test_missing_noise_says_how_to_record_it(tmp_path, capsys):
    assert bench.main(["--noise", str(tmp_path / "none.jsonl")]) == 2
    assert "benchmarks/gpu/record_noise.py" in capsys.readouterr().err


def test_the_script_prints_tables_and_json(capsys):
    small = ["--synthetic", "--runs", "20", "--histories", "1", "--quiet-histories", "2"]
    assert bench.main(small) == 0
    text = capsys.readouterr().out
    assert "tilewright" in text
    assert "creep of 0.5% a week" in text
    assert bench.main([*small[:3], "--histories", "0", "--json", "--threshold", "0.05"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rules"][0]["detected"]["1.02"] == 0
    assert report["drift"] is None
    assert bench.main([*small, "--plant-in", "nothing"]) == 2
