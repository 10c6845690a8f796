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
from tilewright.compiler import api
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
from tilewright.passes.pipeline import pipeline


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

    def lower_graph(graph, target):
        program, sources, notes = real(graph, target)
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


def test_a_dropped_fusion_is_found_in_the_step_with_the_kernels_to_blame(suite, baseline, defect):
    def without(cache, fuses=False):
        return tuple(step for step in pipeline(cache, fuses) if step.name != "fuse")

    assert len(without("paged", True)) < len(pipeline("paged", True))
    defect.setattr(api, "pipeline", without)
    new = collect(suite, ["tiny"])
    found = _found(suite, baseline, new, Verdict.REGRESSION)
    launches = found["decode step", "launches"]
    assert launches.new > launches.old
    assert "add_rms_norm 3 → 0" in launches.note
    assert "rms_norm 0 → " in launches.note
    assert ("decode step", "launches a layer") in found
    assert ("decode step", "bytes") in found
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
    assert series["gated"]["programs (decode step)"] == 2  # one program in each of two layers
    assert series["gated"]["programs (decode step, batch 4)"] == 2
    assert series["gated"]["programs (prefill)"] == 16  # 64 rows


def test_what_runs_in_a_phase_is_named(healthy):
    snapshot = healthy["tiny", "h100"]
    assert list(snapshot.running) == list(snapshot.parts)
    runs = {phase: running["paged_attention"] for phase, running in snapshot.running.items()}
    assert runs["decode step"] == runs["decode step, batch 4"] == ("decode", "merge")
    assert runs["prefill"] == runs["mixed"] == ("prefill",)
    assert snapshot.running["prefill"]["gated"] == ("",)
    assert not any("linear" in name for name in snapshot.running["prefill"])  # of a library
    assert snapshot.parts["mixed"]["paged_attention"][0] == 2
    flops = {name: of["flops"] for name, of in snapshot.series.items() if "flops" in of}
    assert flops["decode step, batch 4"] < flops["mixed"] < flops["prefill"]  # 4, 32, 64 tokens


def test_snapshots_of_before_have_no_running(healthy):
    data = healthy["tiny", "h100"].to_json()
    assert Snapshot.from_json(json.loads(json.dumps(data))) == healthy["tiny", "h100"]
    old = Snapshot.from_json({k: v for k, v in data.items() if k not in ("running", "shares")})
    assert (old.running, old.shares) == ({}, {})
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
    assert list(passes) == list(dict.fromkeys(step.name for step in pipeline("paged", True)))
    # Beside them there is only what the driver does before the first.
    assert 0 <= parts["passes"] - sum(passes.values()) < 10


def test_a_slower_pass_is_found_and_named(suite, baseline, defect):
    real = FUSE.run

    def twice(graph):
        real(graph)
        return real(graph)

    slow = tuple(
        replace(step, run=twice) if step.name == "fuse" else step
        for step in pipeline("paged", True)
    )
    defect.setattr(api, "pipeline", lambda cache, fuses=False: slow)
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
