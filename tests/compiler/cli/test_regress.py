"""`tilewright regress`, verb by verb, on a suite of one kernel and one tiny model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree as ET

import pytest

from cli_running import refused, run, spawn
from regress_suites import GRAPH, HEAD, LLAMA
from tilewright.autotune.history import HistoryEntry, Point, append_entry, read_history
from tilewright.compiler.regress import collect as collecting
from tilewright.compiler.regress.baseline import read_baseline, write_baseline
from tilewright.compiler.regress.data import read_comparison
from tilewright.compiler.regress.suite import load_suite

NOW = datetime.now(UTC)
SERIES = "llama.h100/add/time (decode b1)"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with a suite and its baseline."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "suite.toml").write_text(HEAD + LLAMA + GRAPH)
    result = run("regress", "record", folder / "suite.toml", "--reason", "healthy")
    assert result.exit_code == 0, result.stderr
    assert "recorded 2 snapshots of norm, tiny in" in result.stdout
    return folder


@pytest.fixture
def suite(recorded, tmp_path):
    """The suite, beside a baseline that a test may damage."""
    shutil.copytree(recorded, tmp_path / "here")
    return tmp_path / "here" / "suite.toml"


def compare(suite, *options):
    return run("regress", "compare", suite, *options)


def edited(path, *changes):
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


@pytest.mark.quick
def test_help_names_every_verb_and_the_exit_codes():
    text = run("regress", "--help").stdout
    assert all(verb in text for verb in ("record", "compare", "history", "bisect"))
    assert "1 a finding, 2 bad input" in text
    for verb in ("record", "compare", "history", "bisect"):
        assert run("regress", verb, "--help").exit_code == 0


def test_record_asks_for_a_reason_before_it_works(suite, monkeypatch):
    monkeypatch.setattr(collecting, "collect", None)
    for options in ((), ("--reason", " ")):
        refused(run("regress", "record", suite, *options), "--reason", "--reason '…'")


def test_record_replaces_a_part_and_keeps_the_rest(suite):
    folder = suite.parent / "baselines"
    before = json.loads((folder / "manifest.json").read_text())
    (folder / "tiny.h100.json").write_text("{}")  # damaged: a part must not hide it
    refused(run("regress", "record", suite, "--reason", "r", "--only", "norm"), "tiny.h100.json")
    shutil.rmtree(folder)
    result = run("regress", "record", suite, "--reason", "one", "--only", "norm")
    assert result.exit_code == 0 and "recorded 1 snapshots of norm in" in result.stdout
    missing = compare(suite)
    assert missing.exit_code == 1 and "1 missing" in missing.stdout
    assert compare(suite, "--only", "norm").exit_code == 0
    result = run("regress", "record", suite, "--reason", "two", "--only", "tiny", "--json")
    assert json.loads(result.stdout) == {
        "baseline": str(folder),
        "cases": ["tiny"],
        "snapshots": 1,
        "kept": ["norm"],
    }
    after = json.loads((folder / "manifest.json").read_text())
    assert after["files"] == before["files"] and after["reason"] == "two"
    assert compare(suite, "--expect-identical").exit_code == 0


def test_record_refuses_to_mix_versions_before_it_works(suite, monkeypatch):
    edited(suite.parent / "baselines" / "manifest.json", ('"triton": "', '"triton": "0.'))
    monkeypatch.setattr(collecting, "_collect_one", None)
    refused(
        run("regress", "record", suite, "--reason", "r", "--only", "norm"), "triton 0.", "all of it"
    )


@pytest.mark.quick
def test_alike_passes_and_says_so(suite):
    result = compare(suite, "--expect-identical")
    assert result.exit_code == 0 and result.stderr == ""
    assert "passed: 0 regressions" in result.stdout and "healthy" in result.stdout


@pytest.mark.quick
def test_a_missing_baseline_is_never_a_pass(suite):
    shutil.rmtree(suite.parent / "baselines")
    for options in ((), ("--baseline", suite.parent / "nowhere"), ("--only", "norm")):
        result = compare(suite, *options)
        assert result.exit_code == 1, result.output
        assert "missing" in result.stdout and "record" in result.stdout
        assert "passed" not in result.stdout


def test_a_baseline_of_other_versions_is_refused_with_the_difference(suite, monkeypatch):
    folder = suite.parent / "baselines"
    edited(
        folder / "manifest.json", ('"torch": "', '"torch": "0.'), ('"triton": "', '"triton": "1.')
    )
    monkeypatch.setattr(collecting, "_collect_one", None)
    refused(compare(suite), "triton 1.", "torch 0.", " against ", "record it anew")


@pytest.mark.parametrize("name", ["manifest.json", "norm.h100.json", "tiny.h100.program.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "conflict"])
def test_a_damaged_baseline_is_named(suite, name, damage):
    path = suite.parent / "baselines" / name
    if damage == "gone" and name != "manifest.json":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_text("<<<<<<< ours\n" + path.read_text())
    where = "baselines" if name == "manifest.json" or damage == "gone" else name
    refused(compare(suite), where, "version control")


def changed(suite):
    """The baseline as it would be had the kernel's text been another."""
    folder = suite.parent / "baselines"
    found = read_baseline(folder)
    norm = found.snapshots["norm", "h100"]
    (kernel,) = norm.kernels
    other = replace(kernel, text=kernel.text.replace("tl.load(", "tl.load( "), digest="0" * 64)
    spoiled = {**found.snapshots, ("norm", "h100"): replace(norm, kernels=(other,))}
    write_baseline(folder, load_suite(suite), spoiled, "healthy")


def test_a_changed_kernel_is_shown_and_fails_where_nothing_may_change(suite):
    changed(suite)
    result = compare(suite)
    assert result.exit_code == 0 and "changed" in result.stdout and "tl.load( " in result.stdout
    result = compare(suite, "--expect-identical")
    assert result.exit_code == 1 and "add_rms_norm" in result.stdout
    assert "differs where nothing should" in " ".join(result.stdout.split())
    assert "failed: 1 regression" in result.stdout


@pytest.mark.parametrize("spoiled", [False, True])
def test_all_four_reports_are_written_and_parse(suite, tmp_path, spoiled):
    if spoiled:
        changed(suite)
    paths = {name: tmp_path / name for name in ("markdown", "junit", "html", "save", "history")}
    options = [word for name, path in paths.items() for word in (f"--{name}", path)]
    result = compare(suite, *options, "--expect-identical", "--json")
    assert result.exit_code == int(spoiled)
    printed = json.loads(result.stdout)
    saved = json.loads(paths["save"].read_text())
    assert printed["rows"] == saved["rows"] and saved["exit_code"] == int(spoiled)
    found = read_comparison(saved)
    assert found.exit_code == int(spoiled) and {row.case for row in found.rows} == {"tiny", "norm"}
    suites = ET.parse(paths["junit"]).getroot()
    failures = sum(int(one.get("failures", 0)) for one in suites.iter("testsuite"))
    assert failures == len(found.findings) == int(spoiled)
    assert ("add_rms_norm" in paths["markdown"].read_text()) is spoiled
    page = paths["html"].read_text()
    assert page.startswith("<!doctype html>") and "small: regressions" in page
    (entry,) = read_history(paths["history"]).entries
    assert entry.values["norm.h100/add_rms_norm/registers"].value > 8


def test_a_comparison_appends_to_a_history(suite, tmp_path):
    path = tmp_path / "results.jsonl"
    for count in (1, 2):
        assert compare(suite, "--history", path, "--only", "norm").exit_code == 0
        assert len(read_history(path).entries) == count
    result = run("regress", "history", path)
    assert result.exit_code == 0 and "series: " in result.stdout


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--only", "nope"), ("'nope'", "tiny, norm")),
        (("--baseline", "suite.toml"), ("a file", "regress record writes")),
        (("--old", "."), ("checkout", "git worktree add")),
        (("--old", "nowhere"), ("nothing there",)),
        (("--gpu",), ("--old CHECKOUT or --pinned CHECKOUT",)),
        (("--budget", "0"), ("--budget", "more than 0 seconds")),
        (("--markdown", "no/where.md"), ("--markdown", "no folder")),
        (("--junit", "no/where.xml"), ("--junit", "no folder")),
        (("--html", "."), ("--html", "a folder")),
        (("--save", "baselines"), ("--save", "a folder")),
        (("--history", "baselines"), ("--history", "a folder")),
    ],
)
def test_misuse_is_refused_before_the_work(suite, monkeypatch, options, parts):
    monkeypatch.chdir(suite.parent)
    monkeypatch.setattr(collecting, "_collect_one", None)
    refused(compare("suite.toml", *options), *parts)


def test_checkouts_that_would_be_left_out_are_refused(suite):
    from house.tree import ROOT

    folder = suite.parent / "baselines"
    refused(compare(suite, "--old", ROOT, "--baseline", folder), "--old", "no --gpu")
    refused(compare(suite, "--pinned", ROOT), "--pinned", "no --gpu")
    refused(compare(suite, "--old", ROOT, "--gpu"), "a CUDA device", "leave --gpu out")


@pytest.mark.quick
def test_a_suite_that_is_wrong_is_named(tmp_path):
    for name, text, part in (
        ("none.toml", None, "No such file"),
        ("bad.toml", "name = ", "Invalid value"),
        ("empty.toml", 'name = "x"\n', "[[model]]"),
        ("key.toml", HEAD + GRAPH.replace("watch", "wach"), "wach"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        for verb in (("compare",), ("record", "--reason", "r")):
            refused(run("regress", *verb, tmp_path / name), name, part)


def weekly(path, rate, weeks=12, newest=0.0):
    """A run a day, that creeps by ``rate`` a week; noise of 0.2% that comes back."""
    runs = 7 * weeks
    for index in range(runs):
        days = runs - 1 - index + newest
        noise = 1 + 0.002 * ((index * 7919) % 17 - 8) / 8
        value = 1e-3 * (1 + rate) ** (index / 7) * noise
        steady = Point(2e-3 * noise, 2e-3 * noise, 2e-3 * noise)
        values = {SERIES: Point(value, value, value), "llama.h100/mul/time (decode b1)": steady}
        time = (NOW - timedelta(days=days)).isoformat(timespec="seconds")
        append_entry(path, HistoryEntry(time, f"{index:040x}", "H100", {}, "small", values))


def test_a_slow_drift_is_found_and_named(tmp_path):
    weekly(tmp_path / "r.jsonl", 0.005)
    reports = ("--markdown", tmp_path / "r.md", "--html", tmp_path / "r.html")
    result = run("regress", "history", tmp_path / "r.jsonl", *reports)
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "regression" in line and "/" in line]
    assert line.startswith(SERIES) and "×1.0" in line
    assert "2 series: 1 regression, 1 no change" in result.stdout
    assert "add" in (tmp_path / "r.md").read_text()
    assert SERIES in (tmp_path / "r.html").read_text()
    data = json.loads(run("regress", "history", tmp_path / "r.jsonl", "--json").stdout)
    assert {plot["name"]: plot["verdict"] for plot in data["series"]}[SERIES] == "regression"
    assert run("regress", "history", tmp_path / "r.jsonl", "--device", "H100").exit_code == 1
    refused(run("regress", "history", tmp_path / "r.jsonl", "--device", "h200"), "H100 (small)")


def test_a_steady_history_with_a_broken_line_passes_and_says_so(tmp_path):
    path = tmp_path / "r.jsonl"
    weekly(path, 0.0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:40]) + lines[40][:60] + b"\n" + b"".join(lines[40:]))
    result = run("regress", "history", path)
    assert result.exit_code == 0, result.output
    assert "r.jsonl, line 41 is set aside" in result.stderr
    assert "2 series: 2 no change" in result.stdout
    start = json.loads(lines[14])["time"]
    result = run("regress", "history", path, "--since", start, "--json")
    shown = json.loads(result.stdout)["series"]
    assert {len(plot["points"]) for plot in shown} == {12 * 7 - 14}
    result = run("regress", "history", path, "--json")
    data = json.loads(result.stdout)
    assert [number for number, _ in data["broken"]] == [41]
    assert {len(plot["points"]) for plot in data["series"]} == {12 * 7}


@pytest.mark.parametrize(("age", "allowed", "code"), [(20, 14, 1), (20, 30, 0), (5, 3, 1)])
def test_a_stale_history_fails(tmp_path, age, allowed, code):
    weekly(tmp_path / "r.jsonl", 0.0, weeks=2, newest=age)
    result = run("regress", "history", tmp_path / "r.jsonl", "--max-age", allowed)
    assert result.exit_code == code
    assert (f"{age} days old, {allowed} are allowed" in result.stdout) is bool(code)


def test_a_history_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"time": \n')
    weekly(tmp_path / "good.jsonl", 0.0, weeks=1)
    for name, options, part in (
        ("none.jsonl", (), "none"),
        ("empty.jsonl", (), "no usable entries"),
        ("broken.jsonl", (), "no usable entries"),
        (".", (), "a folder"),
        ("good.jsonl", ("--max-age", "0"), "more than 0 days"),
        ("good.jsonl", ("--max-age", "nan"), "more than 0 days"),
        ("good.jsonl", ("--since", "yesterday"), "ISO 8601"),
        ("good.jsonl", ("--since", "2999-01-01"), "no usable entries"),
        ("good.jsonl", ("--suite", tmp_path / "none.toml"), "none.toml"),
        ("good.jsonl", ("--html", tmp_path / "no" / "x.html"), "no folder"),
    ):
        refused(run("regress", "history", tmp_path / name, *options), part)


def test_bisect_refuses_what_it_cannot_search(suite, monkeypatch, tmp_path):
    refused(
        run("regress", "bisect", "norm.h100/call/launches", "--good", "a", "--budget", "0"),
        "--budget",
    )
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q", "."], check=True)
    options = ("--good", "nope", "--suite", suite)
    refused(run("regress", "bisect", "nope.h100/call/launches", *options), "nope", "norm.h100")
    refused(run("regress", "bisect", "norm.h100/call/launches", *options), "nope")


def test_an_interrupt_leaves_the_old_baseline(suite, monkeypatch):
    folder = suite.parent / "baselines"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def interrupted(*_):
        raise KeyboardInterrupt

    from tilewright.compiler.regress import baseline

    monkeypatch.setattr(baseline.Path, "write_bytes", interrupted)  # with the new folder half full
    result = run("regress", "record", suite, "--reason", "later")
    monkeypatch.undo()
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert {p.name for p in folder.parent.iterdir()} == {"suite.toml", "baselines"}


@pytest.mark.nightly  # a compile is interrupted by a signal each day, and a record in this process
def test_ctrl_c_ends_a_record_that_compiles(suite, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))  # nothing is known already
    manifest = (suite.parent / "baselines" / "manifest.json").read_bytes()
    monkeypatch.setenv("TILEWRIGHT_DEBUG", "5")  # more than a pipe holds: it waits for us to read
    process = spawn("regress", "record", suite, "--reason", "later")
    assert any(line.startswith("pass ") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert (suite.parent / "baselines" / "manifest.json").read_bytes() == manifest
