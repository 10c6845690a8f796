"""A suite, timed by a process that is played: rows, confirmation, interruption, refusals."""

from __future__ import annotations

import json
import math
import random
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regress_suites import GRAPH, HEAD, LLAMA, suite_of
from small_checkouts import small_checkout
from tilewright.autotune.verdicts import Verdict
from tilewright.compiler.regress.timing import engines as engines_module
from tilewright.compiler.regress.timing import pairs as pairs_module
from tilewright.compiler.regress.timing import session as module
from tilewright.compiler.regress.timing.engines import EngineCase, prepare_engine
from tilewright.compiler.regress.timing.pairs import (
    EnginePair,
    TimedPairs,
    TimedSeries,
    _job,
    _series,
)
from tilewright.compiler.regress.timing.session import time_suite
from tilewright.errors import EngineError, UsageError
from tilewright.targets import Target

TIMED = LLAMA.replace("watch", 'timed = ["kernels", "phases"]\nwatch')
ADD = "tiny.h100/add/time (decode b1)"
DECODE = "tiny.h100/decode step/itl (b4)"
THROUGHPUT = "tiny.h100/serving loop/throughput"
KEYS = ("0/add @ decode b1", "0/linear#2 @ prefill 512", "0/ttft", "0/itl b4", "0/throughput")


class Played:
    """In place of `TimedPairs`: seconds by the factor planted in each series."""

    slow: dict[str, float]
    starts: list[tuple[str, ...]]
    measured: Counter[str]
    stop_after: float

    def __init__(self, pairs, old, new, seed=0, only=()) -> None:
        type(self).starts.append(tuple(only))
        self.random, self.closed = random.Random(seed), False
        every = [_series(key, pairs) for key in KEYS]
        self.series = {one.name: one for one in every if not only or one.name in only}
        self.skipped = {"tiny.h100/aten/mm/time (decode b1)": "results differ by 1"}
        versions, clocks = {"torch": "2"}, {"sm_mhz": 1980}
        self.device = {"name": "H100", "versions": versions, "clocks": clocks}

    def measure(self, names):
        assert not self.closed
        if sum(self.measured.values()) >= self.stop_after:
            raise KeyboardInterrupt
        self.measured.update(names)
        slow = {n: self.slow.get(n, 1.0) * self.random.lognormvariate(0, 0.002) for n in names}
        return {name: (1e-3, 1e-3 * slow[name]) for name in names}

    def close(self) -> None:
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Patches that leave of a session everything but the GPU."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    state = {"slow": {}, "starts": [], "measured": Counter(), "stop_after": math.inf}
    kind = type("Played", (Played,), state)
    monkeypatch.setattr(module, "TimedPairs", kind)
    monkeypatch.setattr(Target, "detect", staticmethod(lambda: Target.parse("h100")))
    monkeypatch.setattr(module, "prepare_engine", lambda side, case, digest: f"/e/{digest[:8]}")
    return kind


@pytest.fixture
def timed(tmp_path, played):
    suite = suite_of(tmp_path, HEAD + TIMED + GRAPH)
    sides = [small_checkout(tmp_path / name, who=f"# {name}") for name in ("old", "new")]

    def run(suite=suite, **options):
        return time_suite(suite, *sides, **{"budget": 1e9, **options})

    run.sides = sides
    return run


def states(tmp_path):
    return list((tmp_path / "cache" / "regress" / "timing").iterdir())


def by_name(found):
    return {f"{r.case}.{r.target}/{r.subject}/{r.series}": r for r in found.rows}


@pytest.mark.quick
def test_a_slow_series_is_found_and_confirmed_by_a_second_start(timed, played, tmp_path):
    played.slow = {ADD: 1.10, THROUGHPUT: 0.80}
    said = []
    found = timed(advance=lambda phase, share: said.append((phase, share)))
    rows = by_name(found)
    row = rows[ADD]
    assert (row.verdict, row.owner, row.tier, row.unit) == (Verdict.REGRESSION, "kernels", 3, "s")
    assert (row.gate, row.better) == ("3%", "lower")
    assert row.ratio.low < 1.10 < row.ratio.high and 1.09 < row.ratio.value < 1.11
    assert (row.old, row.new) == (1e-3, pytest.approx(1.1e-3, rel=0.01))
    assert "confirmed: first run ×1.1" in row.note
    assert rows[THROUGHPUT].verdict is Verdict.REGRESSION  # of what should be high, less
    assert (rows[THROUGHPUT].better, rows[THROUGHPUT].unit) == ("higher", "tok/s")
    others = {name: r for name, r in rows.items() if name not in (ADD, THROUGHPUT)}
    assert played.starts == [(), (ADD, THROUGHPUT)]  # the second start is for the suspects alone
    verdicts = {r.verdict for r in others.values()}
    assert verdicts == {Verdict.NO_CHANGE, Verdict.CHANGED}
    assert (found.device, found.versions) == ("H100", {"torch": "2"})
    assert set(found.pairs) == set(rows) - {"tiny.h100/aten/mm/time (decode b1)"}
    assert states(tmp_path) == []
    shares = [share for _, share in said]
    assert max(shares) <= 1 and ("confirming 2", 0.9) in said and ("starting", 0.2) in said


def test_a_suspicion_that_does_not_repeat_is_none(timed, played):
    class Once(Played):
        def measure(self, names):
            if self.starts[-1]:
                type(self).slow = {}
            return super().measure(names)

    for name in ("slow", "starts", "measured", "stop_after"):
        setattr(Once, name, getattr(played, name))
    Once.slow = {ADD: 1.10}
    module.TimedPairs = Once
    row = by_name(timed())[ADD]
    assert row.verdict is Verdict.NO_CHANGE and "not confirmed: first run ×1.1" in row.note


@pytest.mark.parametrize(("slower", "rounds"), [(1.10, 42), (1.0, 60)])
def test_noise_elsewhere_does_not_cost_the_confirmation(timed, played, monkeypatch, slower, rounds):
    """With something to confirm the first run ends at 70% of the budget, else at its end."""
    now = [0.0]

    class Noisy(Played):
        def measure(self, names):
            now[0] += 1.0
            noise = {DECODE: (1.5, 1.0, 1 / 1.5)[int(now[0]) % 3]}
            found = super().measure(names)
            return {n: (old, new * noise.get(n, 1.0)) for n, (old, new) in found.items()}

    for name in ("slow", "starts", "measured", "stop_after"):
        setattr(Noisy, name, getattr(played, name))
    Noisy.slow = {ADD: slower}
    monkeypatch.setattr(module, "TimedPairs", Noisy)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    found = timed(budget=60.0)
    rows = by_name(found)
    expected = Verdict.REGRESSION if slower > 1 else Verdict.NO_CHANGE
    assert (rows[ADD].verdict, rows[DECODE].verdict) == (expected, Verdict.UNDECIDABLE)
    assert len(found.pairs[DECODE]) == rounds


def test_a_slow_start_does_not_cost_the_confirmation(timed, played, monkeypatch):
    """As on a device: 14 s to start, 1 s a round, and a budget of 45 s."""
    now = [0.0]

    class Slow(Played):
        def __init__(self, *arguments):
            now[0] += 14.0
            super().__init__(*arguments)

        def measure(self, names):
            now[0] += 1.0 if DECODE in names else 0.1
            return super().measure(names)

    for name in ("slow", "starts", "measured", "stop_after"):
        setattr(Slow, name, getattr(played, name))
    Slow.slow = {ADD: 1.10}
    monkeypatch.setattr(module, "TimedPairs", Slow)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    assert by_name(timed(budget=45.0))[ADD].verdict is Verdict.REGRESSION


def test_a_suspicion_that_nobody_had_time_for_is_no_pass(timed, played, monkeypatch):
    now = [0.0]

    class Slow(Played):
        def measure(self, names):
            now[0] += 1.0
            return super().measure(names)

    for name in ("slow", "starts", "measured", "stop_after"):
        setattr(Slow, name, getattr(played, name))
    Slow.slow = {ADD: 1.10}
    monkeypatch.setattr(module, "TimedPairs", Slow)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    row = by_name(timed(budget=30.0))[ADD]  # 21 rounds, then 9 of the 20 that a second look needs
    assert row.verdict is Verdict.MISSING
    assert "suspected" in row.note or "first run" in row.note
    assert "9 of 20 rounds within the budget: raise --budget" in row.note


def test_what_is_skipped_is_shown_with_the_reason(timed):
    row = by_name(timed())["tiny.h100/aten/mm/time (decode b1)"]
    assert (row.subject, row.series) == ("aten/mm", "time (decode b1)")
    assert (row.verdict, row.note) == (Verdict.CHANGED, "not timed: results differ by 1")
    assert (row.owner, row.old, row.ratio) == ("kernels", None, None)


def test_gates_are_the_suites(tmp_path, timed, played):
    thresholds = '[thresholds]\n"add/time" = "25%"\n"*/ttft" = "any"\n"*/throughput" = "2"\n'
    suite = suite_of(tmp_path, HEAD + thresholds + TIMED)
    played.slow = {ADD: 1.10}
    rows = by_name(timed(suite))
    assert (rows[ADD].gate, rows[ADD].verdict) == ("25%", Verdict.NO_CHANGE)
    # What allows anything has no share to look for: the rule's own.
    assert rows["tiny.h100/prefill/ttft"].gate == rows[THROUGHPUT].gate == "3%"
    assert rows[DECODE].gate == "5%"


def test_an_interrupted_run_goes_on_where_it_was(timed, played, tmp_path):
    timed()
    whole = sum(played.measured.values())
    played.measured.clear()
    played.stop_after = 7 * len(KEYS)
    with pytest.raises(KeyboardInterrupt):
        timed()
    assert sum(played.measured.values()) == 7 * len(KEYS)
    (path,) = states(tmp_path)
    first = json.loads(path.read_text())["first"]
    assert {len(pairs) for pairs in first.values()} == {7}
    played.stop_after = math.inf
    found = timed()
    assert sum(played.measured.values()) == pytest.approx(whole, abs=12 * len(KEYS))
    assert all(found.pairs[name][:7] == [tuple(p) for p in first[name]] for name in first)
    assert states(tmp_path) == []


def test_one_interrupted_while_it_confirms_confirms_again(timed, played, tmp_path):
    played.slow = {ADD: 1.10}
    played.stop_after = 0
    real, rounds = played.measure, []

    def measure(self, names):
        rounds.append(tuple(names))
        if names == [ADD] and len(self.starts) == 2 and rounds.count((ADD,)) == 4:
            raise KeyboardInterrupt
        return real(self, names)

    played.measure, played.stop_after = measure, math.inf
    with pytest.raises(KeyboardInterrupt):
        timed()
    (path,) = states(tmp_path)
    kept = json.loads(path.read_text())
    assert kept["phase"] == "second" and len(kept["second"][ADD]) == 3
    played.measure = real
    before = played.measured[DECODE]
    assert by_name(timed())[ADD].verdict is Verdict.REGRESSION
    assert played.starts == [(), (ADD,), (), (ADD,)]
    assert played.measured[DECODE] == before  # the first run was done


@pytest.mark.parametrize("change", ["code", "seed", "gate", "damage", "array", "engine"])
def test_another_question_starts_anew(timed, played, tmp_path, monkeypatch, change):
    played.stop_after = 7 * len(KEYS)
    with pytest.raises(KeyboardInterrupt):
        timed()
    played.stop_after = math.inf
    played.measured.clear()
    (path,) = states(tmp_path)
    suite, options = suite_of(tmp_path, HEAD + TIMED + GRAPH), {}
    if change == "code":
        (timed.sides[1].root / "who.py").write_text("# changed")
    elif change == "seed":
        options = {"seed": 3}
    elif change == "gate":
        suite = suite_of(tmp_path, HEAD + '[thresholds]\n"*/time" = "4%"\n' + TIMED)
    elif change == "engine":
        monkeypatch.setattr(module, "prepare_engine", lambda side, case, digest: f"/f/{digest}")
    else:
        path.write_text({"damage": path.read_text()[:-30], "array": "[]"}[change])
    found = timed(suite, **options)
    assert all(len(pairs) == played.measured[name] for name, pairs in found.pairs.items())


@pytest.mark.parametrize("budget", [1e-9, 0.0])
def test_without_time_everything_is_missing(timed, played, budget):
    """A budget too small for a single look is no pass."""
    found = timed(budget=budget)
    rows = [row for row in found.rows if row.verdict is not Verdict.CHANGED]
    assert len(rows) == len(KEYS) and sum(played.measured.values()) == 0
    for row in rows:
        assert (row.verdict, row.ratio, row.new) == (Verdict.MISSING, None, None)
        assert "0 of 20 rounds within the budget: raise --budget" in row.note


def test_a_machine_without_gpu_is_refused(tmp_path, played, timed, monkeypatch):
    monkeypatch.setattr(Target, "detect", staticmethod(lambda: Target.parse("cpu")))
    with pytest.raises(UsageError, match="CUDA device.*none that torch sees.*leave --gpu out"):
        timed()
    assert played.starts == []


def test_a_suite_without_timed_cases_is_refused(tmp_path, timed, monkeypatch):
    with pytest.raises(UsageError, match=r'timed = \["kernels".*target "h100", found none'):
        timed(suite_of(tmp_path, HEAD + LLAMA + GRAPH))
    with pytest.raises(UsageError, match="found none"):
        timed(suite_of(tmp_path, HEAD + TIMED + GRAPH), only=["norm"])
    with pytest.raises(UsageError, match="one of tiny, norm"):
        timed(suite_of(tmp_path, HEAD + TIMED + GRAPH), only=["nope"])
    monkeypatch.setattr(Target, "detect", staticmethod(lambda: Target.parse("a100")))
    with pytest.raises(UsageError, match='target "a100", found only tiny for h100'):
        timed()


def test_each_code_compiles_its_own_engine_and_the_same_code_once(tmp_path, played, monkeypatch):
    suite, made = suite_of(tmp_path, HEAD + TIMED), []

    def prepare(side, case, digest):
        made.append((side.root.name, case.target, case.definition, digest))
        return f"/e/{digest[:8]}"

    monkeypatch.setattr(module, "prepare_engine", prepare)
    one, copy, other = (
        small_checkout(tmp_path / name, who=f"# {text}")
        for name, text in (("one", "a"), ("copy", "a"), ("other", "b"))
    )
    (pair,) = module.prepare_pairs(suite, one, other)
    assert sorted(name for name, *_ in made) == ["one", "other"]
    assert {digest for *_, digest in made} == {one.digest, other.digest}
    assert {case[1:3] for case in made} == {("h100", suite.cases[0].definition)}
    assert (pair.old, pair.new) == (f"/e/{one.digest[:8]}", f"/e/{other.digest[:8]}")
    made.clear()
    (pair,) = module.prepare_pairs(suite, one, copy)
    assert len(made) == 1 and pair.old == pair.new
    assert (pair.kernels, pair.phases, pair.owner) == (True, True, "kernels")


names = st.text("abz_09", min_size=1).flatmap(lambda n: st.sampled_from([n, f"{n}#2", f"x/{n}"]))
timed_keys = st.lists(
    st.one_of(
        st.builds("{} @ {}".format, names, st.sampled_from(["decode b1", "prefill 512"])),
        st.sampled_from(["ttft", "itl b1", "itl b32", "throughput"]),
    ),
    min_size=1,
    unique=True,
)


@pytest.mark.quick
@given(timed_keys, timed_keys, st.data())
def test_names_lead_back_to_what_the_process_calls_them(one, two, data):
    pairs = [EnginePair("a", "h100", "me", "o", "n"), EnginePair("a-b", "l4", "you", "o", "n")]
    keys = [*(f"0/{key}" for key in one), *(f"1/{key}" for key in two)]
    series = {key: _series(key, pairs) for key in keys}
    assert len({s.name for s in series.values()}) == len(keys)
    chosen = data.draw(st.lists(st.sampled_from(keys), min_size=1, unique=True))
    only = [series[key].name for key in chosen]
    for index, pair in enumerate(pairs):
        mine = [key.split("/", 1)[1] for key in chosen if key.startswith(f"{index}/")]
        job = _job(pair, only)
        assert job["only"] == [key for key in mine if " @ " in key]
        assert job["kernels"] is any(" @ " in key for key in mine)
        assert job["phases"] is any(" @ " not in key for key in mine)
    assert _job(pairs[0], ()) == {
        "old": "o",
        "new": "n",
        "kernels": True,
        "phases": True,
        "only": [],
    }


def test_parts_of_a_case_that_are_not_timed_stay_so():
    pair = EnginePair("a", "h100", "me", "o", "n", kernels=False, phases=True)
    job = _job(pair, ["a.h100/add/time (decode b1)", "a.h100/prefill/ttft"])
    assert (job["kernels"], job["phases"]) == (False, True)
    assert _series("0/throughput", [pair]) == TimedSeries(
        pair, "serving loop", "throughput", "tok/s", "higher"
    )


class Answers:
    """In place of `Worker`."""

    def __init__(self, ready, pairs=None):
        self.ready, self.pairs, self.open = ready, pairs or {}, True

    def __call__(self, checkout, name, job):
        self.job = json.loads(job)
        return self

    def start(self):
        if isinstance(self.ready, Exception):
            raise self.ready
        return self.ready

    def ask(self, question):
        return {"pairs": {name: self.pairs[name] for name in question["measure"]}}

    def close(self):
        self.open = False


READY = {
    "kernels": {"0/add @ decode b1": {}, "0/mul @ decode b1": {}},
    "phases": ["0/itl b4"],
    "skipped": {"0/mm @ decode b1": "no such kernel"},
    "device": {"name": "H100"},
}


@pytest.fixture
def process(monkeypatch):
    def played(worker):
        monkeypatch.setattr(pairs_module, "Worker", worker)
        pair = EnginePair("tiny", "h100", "me", "o", "n")
        root = SimpleNamespace(root="/old")
        return lambda only=(): TimedPairs([pair], root, root, 5, only)

    return played


def test_pairs_are_asked_for_by_name_and_the_others_left_out(process):
    worker = Answers(READY, {"0/add @ decode b1": [1, 2], "0/itl b4": [3, 4]})
    with process(worker)([ADD, DECODE]) as timed:
        assert set(timed.series) == {ADD, DECODE}
        assert timed.measure([DECODE, ADD]) == {DECODE: (3, 4), ADD: (1, 2)}
        assert timed.skipped == {"tiny.h100/mm/time (decode b1)": "no such kernel"}
        with pytest.raises(EngineError, match="mm/time.*found no such kernel.*again"):
            timed.measure([ADD, "tiny.h100/mm/time (decode b1)"])
    assert worker.job["seed"] == 5 and worker.job["pairs"][0]["only"] == ["add @ decode b1"]
    assert not worker.open


@pytest.mark.parametrize(
    ("ready", "error", "said"),
    [
        (EngineError("p", expected="a", found="b", remedy="c"), EngineError, "found b"),
        (
            {**READY, "kernels": {}, "phases": []},
            UsageError,
            r"found nothing to time \(tiny.h100/mm/time \(decode b1\): no such kernel\)",
        ),
        ({**READY, "phases": ["0/unknown"]}, KeyError, "unknown"),
    ],
)
def test_a_process_with_nothing_to_time_is_ended(process, ready, error, said):
    worker = Answers(ready)
    with pytest.raises(error, match=said):
        process(worker)()
    assert not worker.open


@pytest.fixture
def compiling(tmp_path, monkeypatch):
    """`run_in` that writes an engine, or fails in words."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    state = SimpleNamespace(runs=[], fails=None, versions={"torch": "2"})

    def run_in(checkout, name, words):
        state.runs.append(words)
        engine = module.Path(words[words.index("-o") + 1])
        engine.mkdir()
        (engine / "manifest.json").write_text("{}")
        if isinstance(state.fails, BaseException):
            raise state.fails
        code = 0 if state.fails is None else 2
        return subprocess.CompletedProcess([], code, "", state.fails or "")

    monkeypatch.setattr(engines_module, "run_in", run_in)
    monkeypatch.setattr(engines_module, "package_versions", lambda packages: state.versions)
    state.folder = tmp_path / "cache" / "regress" / "engines"
    return state


CASE = EngineCase("tiny", "/m", ("--dtype", "bfloat16"), "h100", "d1")


def test_engines_are_made_once_for_each_code_case_and_versions(tmp_path, compiling, monkeypatch):
    checkout = small_checkout(tmp_path / "a")
    first = prepare_engine(checkout, CASE, "code")
    assert (first / "manifest.json").is_file() and (first.parent / "key.json").is_file()
    assert compiling.runs[0][:2] == ["compile", "/m"]
    assert compiling.runs[0][-4:] == ["--target", "h100", "--dtype", "bfloat16"]
    assert prepare_engine(checkout, CASE, "code") == first and len(compiling.runs) == 1
    others = (
        (CASE, "other"),
        (EngineCase("tiny", "/m", ("--dtype", "float32"), "h100", "d1"), "code"),
        (EngineCase("tiny", "/m", CASE.options, "a100", "d1"), "code"),
        (EngineCase("tiny", "/m", CASE.options, "h100", "d2"), "code"),  # its config has changed
    )
    made = {first, *(prepare_engine(checkout, case, digest) for case, digest in others)}
    compiling.versions = {"torch": "3"}
    made.add(prepare_engine(checkout, CASE, "code"))
    monkeypatch.setenv("TILEWRIGHT_PASS_LIMIT", "3")
    made.add(prepare_engine(checkout, CASE, "code"))
    assert len(made) == len(compiling.runs) == 7


@pytest.mark.parametrize("said", ["", "a\nerror: no kernel\nexpected: x\nfound: y\nremedy: z\n"])
def test_a_case_that_does_not_compile_leaves_nothing(tmp_path, compiling, said):
    checkout = small_checkout(tmp_path / "a")
    compiling.fails = said
    words = "error: no kernel expected: x found: y remedy: z" if said else "exit code 2"
    with pytest.raises(EngineError, match=f"case tiny for h100.*found {words}"):
        prepare_engine(checkout, CASE, "code")
    compiling.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        prepare_engine(checkout, CASE, "code")
    assert list(compiling.folder.iterdir()) == []
    compiling.fails = None
    assert prepare_engine(checkout, CASE, "code").is_dir()


def test_options_of_a_case_reach_the_compiler(tmp_path, played, monkeypatch):
    config = tmp_path / "folder"
    config.mkdir()
    (config / "config.json").write_text('{"model_type": "llama"}')
    text = '[[model]]\nname = "mine"\ntargets = ["h100"]\npath = "folder"\ntimed = ["phases"]\n'
    suite, cases = suite_of(tmp_path, HEAD + TIMED + text), []
    monkeypatch.setattr(module, "prepare_engine", lambda side, case, d: cases.append(case) or "/e")
    side = small_checkout(tmp_path / "one")
    made, mine = module.prepare_pairs(suite, side, side)
    tiny, other = cases
    assert tiny.options[:6] == [
        "--dtype",
        "bfloat16",
        "--max-batch-size",
        "4",
        "--max-model-len",
        "64",
    ]
    assert "--random-weights" in tiny.options and "--random-weights" not in other.options
    assert json.loads((module.Path(tiny.model) / "config.json").read_text())["hidden_size"] == 64
    assert (other.model, mine.kernels, mine.phases) == (str(config), False, True)
    assert (made.kernels, made.phases) == (True, True)
