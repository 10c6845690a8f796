"""Real kernels of a small suite, compiled for an H100: planted defects are found and named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from regress_suites import GRAPH, HEAD, LLAMA, suite_of
from tilewright.autotune.verdicts import Verdict
from tilewright.codegen.triton import lowering, sass
from tilewright.compiler import graphs
from tilewright.compiler.api import Phases, compile_image
from tilewright.compiler.inspect.kernels import kernel_report
from tilewright.compiler.inspect.text import settings
from tilewright.compiler.options import resolve_options
from tilewright.compiler.regress import collect as module
from tilewright.compiler.regress.baseline import read_baseline, write_baseline
from tilewright.compiler.regress.collect import collect, mismatches, versions
from tilewright.compiler.regress.compare import compare_snapshots
from tilewright.compiler.regress.snapshot import Snapshot
from tilewright.errors import TilewrightError
from tilewright.passes.fuse import FUSE
from tilewright.passes.pipeline import decode_pipeline, pipeline


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return suite_of(tmp_path_factory.mktemp("suite"), HEAD + LLAMA + GRAPH)


@pytest.fixture(scope="module")
def healthy(suite):
    return collect(suite)


@pytest.fixture(scope="module")
def baseline(suite, healthy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    write_baseline(folder, suite, healthy, "healthy")
    return read_baseline(folder)


@pytest.fixture
def defect(monkeypatch):
    """What is planted here must not be taken for the sources' own, in the cache."""
    monkeypatch.setattr(module, "_sources_hash", lambda: "planted")
    monkeypatch.setattr(module, "_keep", lambda path, snapshot: None)
    return monkeypatch


def _planted(defect, change):
    """Each kernel source is changed on its way to the compiler."""
    real = lowering.lower_graph

    def lower_graph(*args):
        program, sources, notes = real(*args)
        changed = [change(source) for source in sources]
        names = {
            lowering.kernel_id(a): lowering.kernel_id(b)
            for a, b in zip(sources, changed, strict=True)
        }
        calls = [
            replace(c, kernel="/".join(names.get(part, part) for part in c.kernel.split("/")))
            for c in program.calls
        ]
        return replace(program, calls=tuple(calls)), tuple(changed), notes

    defect.setattr(lowering, "lower_graph", lower_graph)


def _found(suite, baseline, new, *verdicts):
    rows = compare_snapshots(suite, baseline, new, only=sorted({case for case, _ in new})).rows
    return {(r.subject, r.series): r for r in rows if r.verdict in verdicts}


def test_alike_passes_even_where_nothing_may_differ(suite, healthy, baseline):
    found = compare_snapshots(suite, baseline, healthy, expect_identical=True)
    assert {row.verdict for row in found.rows} == {Verdict.NO_CHANGE}
    assert found.exit_code == 0
    assert {row.tier for row in found.rows} == {1, 2}


def test_figures_are_those_of_the_kernel_report(suite, healthy, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(suite.cases[0].config))
    options = resolve_options(
        target="h100",
        backend="triton",
        kv_cache="auto",
        dtype="bfloat16",
        max_model_len=64,
        max_batch_size=4,
        verify="off",
        trust_remote_code=False,
        random_weights=0,
    )
    image = compile_image(tmp_path / "tiny", None, None, options, Phases())
    report = kernel_report(image, settings(image))
    snapshot = healthy["tiny", "h100"]
    assert list(snapshot.series) == [
        "program",
        "decode program",
        "decode step",
        "decode step, batch 4",
        "prefill",
        "mixed",
        "compile",
    ]
    for phase, setting in (("decode step", "decode"), ("prefill", "prefill")):
        series, whole = snapshot.series[phase], report.whole[setting]
        assert series["launches"] == whole.launches
        assert (series["flops"], series["bytes"]) == (whole.flops, whole.bytes)
        assert series["roofline"] == pytest.approx(whole.seconds)
        assert series["launches a layer"] == report.a_layer[setting]
        assert sum(part[0] for part in snapshot.parts[phase].values()) == whole.launches
    assert {kernel.id for kernel in snapshot.kernels} == {
        k.name for k in report.kernels if k.package
    }
    batch = snapshot.series["decode step, batch 4"]
    assert batch["flops"] > 3 * snapshot.series["decode step"]["flops"]


@pytest.mark.quick
def test_decode_steps_are_those_of_the_decode_program(healthy):
    snapshot = healthy["tiny", "h100"]
    general, decode = (json.loads(text)["calls"] for text in snapshot.programs.values())
    for phase, parts in snapshot.parts.items():
        calls = decode if phase.startswith("decode") else general
        ids = {kernel.subject: kernel.id for kernel in snapshot.kernels}
        ran = {ids.get(subject, subject) for subject in parts}
        known = {call["kernel"].rsplit("/", 1)[1] for call in calls}
        left = {"fresh_attention"}  # of longer prompts
        left |= {name for name in known if name.startswith("cascade-")}  # of shared pages
        assert ran == known - left, phase
    # q+k+v, KV, attention and its merge, o, gate+up, down: norms and residuals are within.
    steps = {name: of for name, of in snapshot.series.items() if name.startswith("decode step")}
    assert all(6 <= of["launches a layer"] <= 8 for of in steps.values()) and len(steps) == 2
    assert snapshot.series["prefill"]["launches a layer"] > 8
    assert all(of["pdl launches"] == of["launches"] for of in steps.values())
    kinds = snapshot.series["decode program"]
    assert kinds["library calls"] == kinds["aten calls"] == kinds["eager calls"] == 0
    assert sum(kinds.values()) == len(decode)


def test_the_decode_program_is_compared_like_the_general_one(suite, healthy, baseline):
    old = healthy["tiny", "h100"]
    program = old.decode.program.replace('"embedding"', '"gather"')
    assert program != old.decode.program
    passes = (*old.decode.passes[:-1], (old.decode.passes[-1][0], "0" * 64))
    new = replace(old, decode=replace(old.decode, program=program, passes=passes))
    found = compare_snapshots(suite, baseline, {("tiny", "h100"): new}, only=["tiny"])
    (row,) = found.of(Verdict.CHANGED)
    limit = len(old.all_passes) - 2
    assert (row.tier, row.subject, row.series) == (1, "decode program", "source")
    assert row.note == (
        f"pass {passes[-1][0]} makes another graph: TILEWRIGHT_PASS_LIMIT={limit} stops before it"
    )
    (diff,) = found.diffs
    assert (diff.subject, diff.what) == ("decode program", "changed")
    assert "gather" in diff.text
    strict = compare_snapshots(
        suite, baseline, {("tiny", "h100"): new}, only=["tiny"], expect_identical=True
    )
    assert [row.subject for row in strict.findings] == ["decode program"]


@pytest.mark.parametrize("gone", [True, False])
def test_a_decode_program_that_came_or_went_is_shown(suite, healthy, baseline, gone):
    old = healthy["tiny", "h100"]
    without = replace(old, decode=None)
    sides = (old, without) if gone else (without, old)
    base = replace(baseline, snapshots={**baseline.snapshots, ("tiny", "h100"): sides[0]})
    found = compare_snapshots(suite, base, {("tiny", "h100"): sides[1]}, only=["tiny"])
    row = next(r for r in found.rows if (r.subject, r.series) == ("decode program", "source"))
    assert row.verdict is Verdict.CHANGED and row.note == ("it is gone" if gone else "it is new")
    (diff,) = found.diffs
    assert (diff.subject, diff.what) == ("decode program", "gone" if gone else "added")
    assert diff.text == old.decode.program


def test_instructions_are_those_of_another_disassembler(suite, tmp_path, healthy):
    files = {}
    real = module.snapshot_of

    def caught(image, *args, **more):
        files.update(image.files)
        return real(image, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "snapshot_of", caught)
        collect(suite, ["norm"], fresh=True)
    (cubin,) = [content for name, content in files.items() if name.endswith(".cubin")]
    path = tmp_path / "k.cubin"
    path.write_bytes(cubin)
    command = [sass._tool("cuobjdump"), "-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [li for li in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4}\*/ .*;", li)]
    (kernel,) = healthy["norm", "h100"].kernels
    assert kernel.series["instructions"] == sum(" NOP" not in line for line in lines)
    wide = sum("LDG.E.128" in line for line in lines)
    assert kernel.series["global loads 128-bit"] == wide > 0


@pytest.mark.nightly
def test_a_dropped_fusion_is_found_in_the_step_with_the_kernels_to_blame(suite, baseline, defect):
    def without(real):
        return lambda *args: tuple(step for step in real(*args) if step.name != "fuse")

    assert len(without(pipeline)("paged", True)) < len(pipeline("paged", True))
    defect.setattr(graphs, "pipeline", without(pipeline))
    defect.setattr(graphs, "decode_pipeline", without(decode_pipeline))
    new = collect(suite, ["tiny"])
    found = _found(suite, baseline, new, Verdict.REGRESSION)
    launches = found["prefill", "launches"]
    assert launches.new > launches.old
    assert launches.note.startswith("eager/rms_norm 0 → 5, ")
    assert "add_rms_norm" in baseline.snapshots["tiny", "h100"].parts["prefill"]
    assert "add_rms_norm" not in new["tiny", "h100"].parts["prefill"]
    assert ("prefill", "launches a layer") in found
    assert ("prefill", "bytes") in found
    decode = found["decode step", "launches"]
    assert decode.new > decode.old and "add_rms_norm" not in decode.note
    program = _found(suite, baseline, new, Verdict.CHANGED)["program", "source"]
    limit = len(pipeline("paged", True)) - 1
    assert f"pass fuse is gone: TILEWRIGHT_PASS_LIMIT={limit} " in program.note


def test_spills_are_found_in_their_kernel(suite, baseline, defect):
    def greedy(source):
        variant = source.variants[0]
        launch = variant.launches[0]
        bad = replace(launch, constexprs={**launch.constexprs, "ROWS": 4}, num_warps=1)
        return replace(source, variants=(replace(variant, launches=(bad,)),))

    _planted(defect, greedy)
    found = _found(suite, baseline, collect(suite, ["norm"]), Verdict.REGRESSION)
    assert found["add_rms_norm", "spills"].new > 0
    assert found["add_rms_norm", "spills"].gate == "+0"
    assert {"registers", "local stores", "local loads", "instructions"} <= {s for _, s in found}


def test_loads_that_lost_their_width_are_found(suite, baseline, defect):
    def shifted(source):
        return replace(source, text=source.text.replace("tl.load(a_ptr +", "tl.load(a_ptr + 1 +"))

    _planted(defect, shifted)
    new = collect(suite, ["norm"])
    found = _found(suite, baseline, new, Verdict.REGRESSION)
    assert found["add_rms_norm", "bits per global load"].new < 100
    assert ("add_rms_norm", "global loads 16-bit") in found
    diffs = compare_snapshots(suite, baseline, new, only=["norm"]).diffs
    assert "+    a = tl.load(a_ptr + 1 +" in diffs[0].text


def test_an_interrupted_run_goes_on_and_a_repeated_one_compiles_nothing(
    suite, healthy, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "_sources_hash", lambda: str(tmp_path))  # an empty cache
    done = []

    def collect_one(case, target, warm):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(case.name)
        return healthy[case.name, target]

    monkeypatch.setattr(module, "_collect_one", collect_one)
    with pytest.raises(KeyboardInterrupt):
        collect(suite)
    done.clear()
    assert collect(suite) == healthy
    assert done == ["norm"]
    done.clear()
    said = []
    assert collect(suite, progress=lambda name, share: said.append((name, share))) == healthy
    assert (done, said) == ([], [("tiny on h100", 0.0), ("norm on h100", 0.5)])
    monkeypatch.setenv("TILEWRIGHT_PASS_LIMIT", "0")
    done.clear()
    collect(suite, ["tiny"])
    assert done == ["tiny"]


def test_a_damaged_entry_of_the_cache_is_collected_anew(suite, healthy, monkeypatch, tmp_path):
    path = tmp_path / "entry.json"
    monkeypatch.setattr(module, "_cache_path", lambda case, target: path)
    monkeypatch.setattr(module, "_collect_one", lambda case, target, warm: healthy["norm", target])
    for text in ("{", "[]", "{}", '{"kernels": 3}'):
        path.write_text(text)
        assert collect(suite, ["norm"])["norm", "h100"] == healthy["norm", "h100"]
        assert len(path.read_text()) > 100


def test_a_case_that_does_not_compile_is_named(tmp_path):
    suite = suite_of(tmp_path, HEAD + LLAMA.replace('"llama"', '"no_such_model"'))
    with pytest.raises(TilewrightError, match="case tiny on h100"):
        collect(suite)


def test_programs_are_the_grids_of_the_launches(healthy):
    (norm,) = healthy["norm", "h100"].kernels  # a row a program, by its launch
    assert norm.launches[1].startswith("  add_rms_norm[T, 1, 1]")
    assert norm.series["programs (call)"] == 512
    series = {k.subject: k.series for k in healthy["tiny", "h100"].kernels}
    # One row is picked of a prompt; the decode step's lookup of tokens is another kernel.
    assert series["embedding"]["programs (prefill)"] == 1
    assert "programs (decode step)" not in series["embedding"]
    assert series["embedding#2"]["programs (decode step)"] == 1
    assert "programs (prefill)" not in series["embedding#2"]
    # 64 rows in one layer, and one in the last, by eight to a program.
    assert series["gated"]["programs (prefill)"] == 8
    assert series["gated#2"]["programs (prefill)"] == 1
    assert "programs (decode step)" not in series["gated"]


def test_what_runs_in_a_phase_is_named(healthy):
    snapshot = healthy["tiny", "h100"]
    assert list(snapshot.running) == list(snapshot.parts)
    for phase, running in snapshot.running.items():
        if phase.startswith("decode"):
            assert running["paged_decode"][0] == "decode" and "paged_attention" not in running
        else:
            assert running["paged_attention"] == ("prefill",) and "paged_decode" not in running
    # One sequence and several are different functions of a decode linear.
    one, several = (snapshot.running[f"decode step{n}"]["linear_add"] for n in ("", ", batch 4"))
    assert not set(one) & set(several)
    assert snapshot.running["prefill"]["gated"] == ("",)
    assert not any("linear" in name for name in snapshot.running["prefill"])  # of a library
    assert snapshot.parts["mixed"]["paged_attention"][0] == 2
    flops = {name: of["flops"] for name, of in snapshot.series.items() if "flops" in of}
    assert flops["decode step, batch 4"] < flops["mixed"] < flops["prefill"]  # 4, 32, 64 tokens


def test_snapshots_of_before_have_no_running(healthy):
    data = healthy["tiny", "h100"].to_json()
    assert Snapshot.from_json(json.loads(json.dumps(data))) == healthy["tiny", "h100"]
    later = ("running", "shares", "decode")
    old = Snapshot.from_json({k: v for k, v in data.items() if k not in later})
    assert (old.running, old.shares, old.decode) == ({}, {}, None)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        Snapshot.from_json({**data, "running": {"prefill": [1]}})


def test_code_is_counted_once_each(healthy):
    snapshot = healthy["tiny", "h100"]
    series = snapshot.series["program"]
    assert series["kernels"] == len(snapshot.kernels)
    cubins = [hash for kernel in snapshot.kernels for hash in kernel.cubins.values()]
    assert series["binaries"] == len(cubins)
    assert series["code bytes"] > 1000 * len(set(cubins))


def test_compiling_is_counted_by_part_and_by_pass(healthy):
    python = f"({'.'.join(map(str, sys.version_info[:2]))})"
    snapshot = healthy["tiny", "h100"]
    series = snapshot.series["compile"]
    parts = {
        part: series[f"python calls of {part} {python}"]
        for part in ("lowering", "passes", "code generation")
    }
    assert series[f"python calls {python}"] == sum(parts.values())
    assert snapshot.shares[f"python calls {python}"] == parts
    passes = snapshot.shares[f"python calls of passes {python}"]
    names = [name for name, _ in snapshot.all_passes[1:]]
    assert names == [s.name for s in (*pipeline("paged", True), *decode_pipeline(16))]
    assert set(passes) == set(names)
    # Beside them there is what the driver does before the first, and what chooses the graphs.
    assert 0 <= parts["passes"] - sum(passes.values()) < 0.01 * parts["passes"]


@pytest.mark.nightly
def test_a_slower_pass_is_found_and_named(suite, baseline, defect):
    real = FUSE.run

    def twice(graph):
        real(graph)
        return real(graph)

    slow = tuple(
        replace(step, run=twice) if step.name == "fuse" else step
        for step in pipeline("paged", True)
    )
    defect.setattr(graphs, "pipeline", lambda *args: slow)
    new = collect(suite, ["tiny"])
    found = _found(suite, baseline, new, Verdict.REGRESSION)
    assert {series.rsplit(" ", 1)[0] for _, series in found} == {
        "python calls",
        "python calls of passes",
    }
    assert all("fuse" in row.note or "passes" in row.note for row in found.values())


def test_how_a_package_was_built_is_no_mismatch():
    assert not mismatches({"torch": "2.13.0+cpu"}, {"torch": "2.13.0+cu130"})
    assert mismatches({"torch": "2.13.0+cpu"}, {"torch": "2.13.1+cpu"}) == [
        "torch 2.13.0+cpu against 2.13.1+cpu"
    ]
    assert mismatches({"torch": "2.13.0"}, {})
    assert not any("+" in version for version in versions().values())
