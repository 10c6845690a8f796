"""--trace: a file beside the output, or a refusal before anything is loaded."""

from __future__ import annotations

import json

from cli_running import refused, run


def test_generate_writes_a_trace(engine, tmp_path):
    path = tmp_path / "trace.json"
    sizes = ("--max-new-tokens", 3, "--ignore-eos")
    result = run("generate", engine, "the quick", *sizes, "--trace", path, "--json")
    assert result.exit_code == 0, result.stderr
    (one,) = json.loads(result.stdout)["completions"]
    events = json.loads(path.read_text())["traceEvents"]
    begin, end = (e["ts"] for e in events if e["name"] == "request")
    assert abs((end - begin) / 1e6 - one["e2e_seconds"]) < 1e-8
    assert one["queue_seconds"] < one["ttft_seconds"] < one["e2e_seconds"]
    assert one["preemptions"] == 0


def test_a_trace_that_cannot_be_written_is_refused(engine, tmp_path):
    path = tmp_path / "none" / "trace.json"
    refused(run("generate", engine, "the", "--trace", path), "--trace", "make the folder first")
