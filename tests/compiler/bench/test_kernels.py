"""``bench kernels``: calls of a step with their costs, rivals that compute the same, figures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

import tilewright as tw
from cli_running import refused, run
from tilewright.codegen.triton.hand_on import own_results
from tilewright.compiler.bench import kernel_rivals, trace
from tilewright.compiler.bench import kernels as bench
from tilewright.compiler.bench.decoding import decode_image, decode_program, decode_runner
from tilewright.compiler.bench.kernel_rivals import Unavailable, make_rival, prepare_ours
from tilewright.compiler.bench.kernels import floor_seconds, measure_kernels
from tilewright.compiler.bench.machine import Machine
from tilewright.compiler.bench.step_calls import record_calls, step_setting
from tilewright.compiler.cli.bench_kernels import kernels_data, print_kernels
from tilewright.errors import UnsupportedError, UsageError
from tilewright.ir.schema import schema
from tiny_gguf import tiny_hf_model

MACHINE = Machine("h100", "NVIDIA H100", 2, 1, 0.0, 3e12, 2e12, 7e14, None, {"torch": "2.11"})
HIDDEN, FFN, VOCAB, KV, HEADS = 64, 96, 320, 32, 4


@pytest.fixture(scope="module")
def engines():
    made = {}

    def engine(backend="triton"):
        if backend not in made:
            options = {"target": "cpu", "max_model_len": 64, "max_batch_size": 4}
            model = tiny_hf_model("llama")
            made[backend] = tw.compile(model, backend=backend, verify="off", **options)
        return made[backend]

    return engine


@pytest.fixture(scope="module")
def recorded(engines):
    """Calls of a decode step by backend."""
    made = {}

    def calls(backend):
        if backend not in made:
            made[backend] = record_calls(engines(backend), "decode", step_setting("decode", 2, 20))
        return made[backend]

    return calls


class StubClock:
    """Gives each side a fixed time; those in ``failing`` cannot be timed."""

    def __init__(self, times, failing=()):
        self.times, self.failing, self.entered = times, failing, []

    def enter(self, problem, sides):
        self.entered.append((problem.subject, [*sides]))
        clock, rounds = self, iter(range(1, 1000))

        class Contest:
            failed = {name: "RuntimeError: no graph" for name in clock.failing if name in sides}

            def round(self):
                drift = 1 + next(rounds) / 100  # of the machine: it hits both of a pair
                names = [name for name in sides if name not in self.failed]
                return {name: clock.times[name] * drift for name in names}

        return Contest()


@pytest.mark.quick
def test_one_place_knows_the_decode_program(engines):
    engine = engines()
    assert decode_runner(engine).program is decode_program(engine)
    assert decode_image(engine).program is decode_program(engine)
    assert engine.image.decode is not None and decode_program(engine) is engine.image.decode.program
    eager = engines("eager")
    names = set(decode_program(eager).inputs)
    assert (eager.image.decode is None) == ("query_start" in names)


def test_calls_are_counted_and_cost_what_is_read(recorded):
    calls = {call.name: call for call in recorded("triton")}
    counts = Counter({name: call.problem.count for name, call in calls.items()})
    attention = calls["paged_decode"]
    assert attention.problem.count == 2 and attention.ops == ("paged_attention",)
    # K and V of the 3 pages that hold the 40 tokens of both sequences; q and the result; tables.
    cache, rows = 2 * 3 * 16 * KV * 4, 2 * 2 * HIDDEN * 4
    assert cache + rows <= attention.bytes <= cache + rows + 400
    assert attention.flops == 2 * 2 * 2 * HEADS * 20 * 16
    weights = Counter()
    for call in calls.values():
        if "linear" in call.ops or "linear" in call.name:
            weights["bytes"] += call.problem.count * call.bytes
            weights["flops"] += call.problem.count * call.flops
    products = 2 * (HIDDEN * (HIDDEN + 2 * KV) + HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
    products += VOCAB * HIDDEN
    assert products * 4 < weights["bytes"] < products * 4 * 1.2
    assert products * 2 * 2 < weights["flops"] < products * 2 * 2 * 1.2
    assert sum(counts.values()) > len(calls)


def test_a_prompts_tokens_see_half_of_it(engines):
    setting = step_setting("prefill", 2, 20)
    found = {c.name: c for c in record_calls(engines(), "prefill", setting)}
    attention = found["paged_attention"]
    pairs = 2 * 20 * 21 // 2  # of a token and one that it sees
    assert attention.flops == pytest.approx(pairs * HEADS * 16 * 2 * 2, rel=0.01)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_rivals_compute_the_same(recorded, backend):
    compared = set()
    for call in recorded(backend):
        for name in ("eager", "library"):
            try:
                rival = make_rival(name, call)
            except Unavailable:
                continue
            if not rival.is_whole:
                continue
            copies = [
                tuple(None if x is None else x.clone() for x in call.problem.operands)
                for _ in range(2)
            ]
            with torch.no_grad():
                ours = own_results(call.problem.call, prepare_ours(call.problem)(copies[0])())
                theirs = rival.prepare(copies[1])()
            theirs = [theirs] if isinstance(theirs, torch.Tensor) else [*theirs]
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-4, atol=1e-4)
            compared.add((call.ops[-1] if call.ops else call.name, name))
    assert {("paged_attention", "library")} <= compared
    assert len({op for op, name in compared if name == "eager"}) >= 4


def test_a_library_gets_products_of_the_same_weights(recorded):
    linear = next(c for c in recorded("triton") if "linear" in c.name)
    rival = make_rival("library", linear)
    assert not rival.is_whole and "cuBLAS" in rival.label
    weights = [x for x in linear.problem.operands if x is not None and x.dim() == 2]
    (product,) = rival.prepare(linear.problem.operands)()
    assert product.shape[1] in {w.shape[0] for w in weights} and product.shape[0] == 2


def test_what_there_is_no_rival_for_says_why(recorded, monkeypatch):
    calls = {call.name: call for call in recorded("triton")}

    def fail(*operands, **attrs):
        raise RuntimeError("a value\nis looked at")

    with monkeypatch.context() as patched:
        patched.setitem(kernel_rivals.IN_PLACE, "append_kv", fail)
        with pytest.raises(Unavailable, match="torch cannot trace it: a value is looked at"):
            make_rival("eager", calls["rope_append_kv"])
    with monkeypatch.context() as patched:
        patched.setattr(kernel_rivals, "MOST_NODES", 3)
        with pytest.raises(Unavailable, match="torch would be given"):
            make_rival("torch.compile", calls["paged_decode"], lambda module: module)
    with pytest.raises(Unavailable, match="no library computes it"):
        make_rival("library", calls["rope_append_kv"])
    with pytest.raises(Unavailable, match="it computes 0 nodes"):
        make_rival("eager", replace(calls["rope_append_kv"], nodes=()))


def test_torch_compile_is_given_one_module(recorded):
    seen = []

    def compiler(module):
        seen.append(module)
        return module

    linear = next(c for c in recorded("triton") if "linear" in c.name)
    rival = make_rival("torch.compile", linear, compiler)
    assert isinstance(seen[0], torch.fx.GraphModule)
    with torch.no_grad():
        ours = prepare_ours(linear.problem)(linear.problem.operands)()[0]
        torch.testing.assert_close(rival.prepare(linear.problem.operands)(), ours)


def test_figures_of_a_step(engines, capsys):
    clock = StubClock({"tilewright": 1e-6, "eager": 3e-6, "library": 2e-6})
    found = measure_kernels(
        engines("eager"),
        batches=(1, 2),
        context=20,
        compare=("eager", "library"),
        only=("paged_attention", "append_kv"),
        rounds=3,
        clock=clock,
        machine=MACHINE,
    )
    assert [step.batch for step in found.steps] == [1, 2]
    step = found.steps[1]
    rows = {row.name: row for row in step.rows}
    assert {*rows} == {"paged_attention", "append_kv"}
    attention = rows["paged_attention"]
    assert attention.seconds == pytest.approx(1.02e-6)
    assert attention.best.name == "library" and attention.best.is_whole
    ratio = attention.best.ratio  # whatever the drift
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([2, 2, 2])
    assert attention.floor == pytest.approx(attention.bytes / 3e12)
    assert attention.error is not None and attention.error < 1e-4 and not attention.is_wrong
    failed = next(rival for rival in rows["append_kv"].rivals if rival.name == "library")
    assert failed.seconds is None and failed.error == "no library computes it"
    assert step.seconds == pytest.approx(sum(r.count * r.seconds for r in step.rows))
    data = json.loads(json.dumps(kernels_data(found)))
    ratios = {row["name"]: row["ratio"]["value"] for row in data["steps"][1]["kernels"]}
    assert ratios == {"paged_attention": pytest.approx(2), "append_kv": pytest.approx(3)}
    assert data["steps"][1]["calls"] == step.calls
    print_kernels(found)
    text = capsys.readouterr().out
    for part in ("append_kv: no library", "2.00× (2.00 to 2.00)", "cuDNN, dense cache", "floor"):
        assert part in text


def test_a_side_that_no_graph_holds_is_left_out(engines):
    clock = StubClock({"tilewright": 1e-6, "library": 2e-6}, failing=("library",))
    found = measure_kernels(
        engines("eager"), context=20, compare=("library",), only=("paged_attention",), clock=clock,
        machine=MACHINE,
    )  # fmt: skip
    (row,) = found.steps[0].rows
    assert row.best is None and row.rivals[0].error == "RuntimeError: no graph"


def test_a_wrong_kernel_is_a_finding(engines, monkeypatch, capsys):
    ours = bench.prepare_ours

    def broken(problem):
        return lambda operands: lambda: [x + 1e3 for x in ours(problem)(operands)()]

    monkeypatch.setattr(bench, "prepare_ours", broken)
    clock = StubClock({"tilewright": 1e-6, "library": 2e-6})
    found = measure_kernels(
        engines("eager"), context=20, compare=("library",), only=("paged_attention",), clock=clock,
        machine=MACHINE,
    )  # fmt: skip
    assert found.steps[0].rows[0].is_wrong
    print_kernels(found)
    assert "paged_attention WRONG" in (text := capsys.readouterr().out) and "differ by" in text


def test_the_floor_is_of_the_rates_that_bind(recorded):
    call = recorded("triton")[0]
    reads = replace(call, flops=10, bytes=3000, written=100)
    assert floor_seconds(reads, MACHINE) == pytest.approx(1e-9)
    assert floor_seconds(replace(reads, written=1500), MACHINE) == pytest.approx(1.5e-9)
    assert floor_seconds(replace(reads, flops=7_000_000), MACHINE) == pytest.approx(1e-8)


@pytest.mark.quick
def test_what_is_refused(engines):
    engine = engines("eager")
    with pytest.raises(UnsupportedError, match="expected an engine on a CUDA device.*one on cpu"):
        measure_kernels(engine, context=20)
    clock = StubClock({"tilewright": 1.0})
    for given, said in (
        ({"batches": (8,)}, "--max-batch-size 8"),
        ({"batches": (0,)}, "1 or more"),
        ({"context": 65}, "1 to 64 tokens"),
        ({"phase": "train"}, "decode, prefill"),
        ({"only": ("linears",)}, "names of kernels or ops of the step: .*paged_attention"),
    ):
        with pytest.raises(UsageError, match=said):
            measure_kernels(engine, **{"context": 20, **given}, clock=clock, machine=MACHINE)
    assert not clock.entered


def test_the_verb_needs_a_gpu_and_known_names(tmp_path, engines):
    engines("eager").save(tmp_path / "engine")
    refused(run("bench", "kernels", tmp_path / "engine", "--context", 20), "CUDA device", "cpu")
    refused(
        run("bench", "kernels", tmp_path / "engine", "--compare", "cutlass"),
        "torch.compile, eager, library",
    )
    refused(run("bench", "kernels", tmp_path / "engine", "--batch", "1,x"), "--batch", "'x'")


def test_schemas_alias_what_calls_write_in_place(recorded):
    append = next(c for c in recorded("triton") if c.name == "rope_append_kv")
    (node,) = append.nodes
    assert schema(node.op).aliases and append.written < append.bytes


def test_a_trace_knows_the_bytes_of_our_functions(engines, recorded):
    known = trace.known_bytes(engines(), 16)
    calls = [call for call in recorded("triton") if call.name.startswith("linear_add")]
    functions = [name for name in known if "linear_add" in name]
    assert sum(known[name][0] for name in functions) == sum(c.problem.count for c in calls)
    name = next(name for name in known if "paged_decode" in name or "decode" in name)
    events = [trace.Event(name, at, 1e-6) for at in (0.0, 1.0)]
    marks = [trace.Event(trace.MARK, at, 1e-6) for at in (-1.0, 9.0)]
    (kernel,) = trace.summarize([*events, *marks], 2, {**known, name: (2, 1000)}).kernels
    assert kernel.bytes == 1000 and kernel.bytes_per_second == pytest.approx(1e9)
