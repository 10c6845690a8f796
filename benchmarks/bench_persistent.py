"""One launch for all layers: a decode step of one sequence, beside the graph of separate kernels.

    python benchmarks/bench_persistent.py 1b --tiling rows=8,ahead=4 --tiling rows=4,num_warps=8

The weights are random, of a model's shape. Both paths compute the same steps first, each with its
own caches: the logits are compared, and tokens may only differ where the graph's best two logits
are as near as the two paths' logits are. Times are of CUDA events over many steps in a row; the
floor is the time in which a plain sum of 2 GiB reads as many bytes as the products' weights have.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from graph_timing import read_rate, report

import tilewright as tw
from tilewright.codegen.persistent.decode import MARKS, PersistentDecode, on_device
from tilewright.codegen.persistent.generate import Tiling
from tilewright.codegen.persistent.reading import Shape, read_decode
from tilewright.codegen.persistent.source import compile_persistent, persistent_source
from tilewright.ir.parser import parse_graph
from tilewright.runtime.engine import CausalLMEngine

PAGE, STEPS, TIMED, DEVICE = 16, 24, 40, "cuda"
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}
CONFIGS: dict[str, dict[str, object]] = {
    "1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "135m": {
        **_LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Compares, times and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--tiling", action="append", default=[], help="fields of a tiling")
    parser.add_argument("--length", type=int, default=256, help="tokens before the first step")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    engine = _engine(options.model, options.length)
    with torch.inference_mode():  # the engine's caches are written to
        _run(options, engine)


def _run(options: argparse.Namespace, engine: CausalLMEngine) -> None:
    rate = read_rate()
    image, runner = engine.image, engine.decode_runner
    assert image.decode is not None and runner is not None
    shape = read_decode(parse_graph(image.decode.graphs[-1][1]))
    floor = shape.weight_bytes / rate
    weights = {
        runner.program.weights[b]: t
        for b, t in runner.constants.items()
        if b in runner.program.weights
    }
    inputs = _inputs(options.length)
    pages = inputs["block_tables"].shape[1] + 1
    caches = {
        name: t[:pages].clone().normal_() for name, t in engine.executor.caches.tensors.items()
    }
    theirs = _graph_path(runner, {name: t.clone() for name, t in caches.items()}, inputs)
    steps = _steps(theirs, inputs, options.length)
    seconds = _seconds(theirs[0])
    lines = [_line("graph of kernels", seconds, floor, "")]
    print(f"{options.model}: reads {rate * 1e-12:.3f} TB/s, floor {floor * 1e6:.1f} µs", flush=True)
    tilings = [Tiling(**_fields(text)) for text in options.tiling or [""]]
    names = options.tiling or ["default"]
    # The first one's times come second, lest they be cut off with the last ones.
    kinds = [(0, False), (0, True), *((i, False) for i in range(1, len(tilings)))]
    texts = [persistent_source(shape, tilings[index], timed) for index, timed in kinds]
    begun = time.perf_counter()
    binaries = compile_persistent(texts, 90)
    print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    for (index, timed), source, binary in zip(kinds, texts, binaries, strict=True):
        tiling = tilings[index]
        own = {name: tensor.clone() for name, tensor in caches.items()}
        launch = on_device(source, binary, torch.device(DEVICE))
        ours = PersistentDecode(shape, tiling, weights, own, inputs, launch, timed)
        said = _compare(ours, inputs, steps, options.length)
        if timed:
            print(_breakdown(ours, shape), flush=True)
            continue
        seconds = _seconds(ours.run)
        ours.check()
        used = f"{binary.resources.registers} registers, {binary.resources.spills} B spilled"
        name = names[index]
        lines.append(_line(name, seconds, floor, f"{said}; {used}"))
        record = {"model": options.model, "tiling": name, "us": seconds * 1e6}
        report({**record, "floor_us": floor * 1e6, "checked": said}, lines[-1], options.output)
        del ours, own
        gc.collect()
    print("\n".join(lines))


def _engine(model: str, length: int) -> CausalLMEngine:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[model]))
        begun = time.perf_counter()
        engine = tw.compile(
            folder,
            random_weights=0,
            dtype="bfloat16",
            max_model_len=length + 4 * PAGE,
            max_batch_size=1,
            memory_fraction=0.5,
            verify="off",
        )
    print(f"engine ready in {time.perf_counter() - begun:.0f} s", flush=True)
    assert isinstance(engine, CausalLMEngine)
    return engine


def _fields(text: str) -> dict[str, int]:
    pairs = (part.split("=") for part in text.split(",") if part)
    return {name: int(value) for name, value in pairs}


def _inputs(length: int) -> Tensors:
    pages = (length + 2 * STEPS) // PAGE + 1
    return {
        "token_ids": torch.full((1,), 17, device=DEVICE),
        "positions": torch.zeros(1, dtype=torch.int64, device=DEVICE),
        "seq_lens": torch.zeros(1, dtype=torch.int32, device=DEVICE),
        "slot_mapping": torch.zeros(1, dtype=torch.int64, device=DEVICE),
        "block_tables": torch.arange(1, pages + 1, dtype=torch.int32, device=DEVICE)[None],
        "temperature": torch.zeros(1, device=DEVICE),
        "top_k": torch.zeros(1, dtype=torch.int32, device=DEVICE),
        "top_p": torch.ones(1, device=DEVICE),
        "min_p": torch.zeros(1, device=DEVICE),
        "uniform": torch.zeros(1, device=DEVICE),
    }


def _place(inputs: Tensors, length: int) -> None:
    """Makes the inputs those of the step that follows ``length`` tokens."""
    inputs["positions"].fill_(length)
    inputs["seq_lens"].fill_(length + 1)
    inputs["slot_mapping"].fill_(PAGE + length)  # pages come in order, from 1 on


def _graph_path(
    runner: object, caches: Tensors, inputs: Tensors
) -> tuple[Callable[[], None], Tensors]:
    """A replay of the decode graph, and its results."""
    given = {**inputs, **caches}
    _place(inputs, 64)
    found = runner.run(given)  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = runner.run(given)  # type: ignore[attr-defined]
    return graph.replay, {"logits": found["logits"], "tokens": found["tokens"]}


def _steps(
    theirs: tuple[Callable[[], None], Tensors], inputs: Tensors, length: int
) -> list[tuple[int, torch.Tensor]]:
    """Token in and logits out of some steps in a row."""
    replay, found = theirs
    token, steps = 17, []
    for step in range(STEPS):
        _place(inputs, length + step)
        inputs["token_ids"].fill_(token)
        replay()
        logits = found["logits"][0].float().clone()
        steps.append((token, logits))
        token = int(found["tokens"])
    return steps


def _compare(
    ours: PersistentDecode, inputs: Tensors, steps: list[tuple[int, torch.Tensor]], length: int
) -> str:
    """How many tokens are equal, and how far the logits are off, for steps of the same tokens."""
    equal, worst, ties = 0, 0.0, 0
    for step, (token, logits) in enumerate(steps):
        _place(inputs, length + step)
        inputs["token_ids"].fill_(token)
        ours.run()
        ours.check()
        off = float((ours.logits.float() - logits).abs().max())
        worst = max(worst, off / float(logits.std()))
        chosen, best = int(ours.tokens), int(logits.argmax())
        equal += chosen == best
        ties += chosen != best and float(logits[best] - logits[chosen]) <= 2 * off
    if equal + ties < len(steps) or worst > 0.1:
        raise SystemExit(f"wrong: {equal} of {len(steps)} tokens, logits off by {worst:.3f} std")
    return f"{equal}/{len(steps)} tokens equal, {ties} within rounding, logits off {worst:.4f} std"


def _seconds(run: Callable[[], object]) -> float:
    """Median of several rounds: seconds of a step among many."""
    times = []
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(TIMED):
            run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3 / TIMED)
    return statistics.median(times[1:])


def _line(name: str, seconds: float, floor: float, more: str) -> str:
    share = f"{seconds * 1e6:8.1f} µs {1 / seconds:7.1f} tok/s {floor / seconds:6.3f} of the floor"
    return f"{name:<36} {share}  {more}"


def _breakdown(ours: PersistentDecode, shape: Shape) -> str:
    """Mean times of each form's calls, in µs: between the ends of the last programs, waiting,
    working.
    """
    for _ in range(3):
        ours.run()
    ours.check()
    times = ours.timeline.double().cpu() * 1e-3
    met, begun, done = (times[:, :, MARKS.index(name)] for name in MARKS)
    ends = done.max(0).values
    lines = [f"{'call':<38} {'n':>4}   whole   waits (least, mean)   works (mean, most)"]
    for index, form in enumerate(shape.forms):
        at = [i for i, step in enumerate(shape.calls) if step.form == index and i > 1]
        if not at:
            continue
        whole = statistics.mean(float(ends[i] - ends[i - 1]) for i in at)
        wait, work = (begun - met)[:, at], (done - begun)[:, at]
        least = float(wait.min(0).values.mean())
        lines.append(
            f"{str(form)[:38]:<38} {len(at):4d} {whole:7.2f} {least:9.2f}"
            f" {float(wait.mean()):7.2f} {float(work.mean()):12.2f}"
            f" {float(work.max(0).values.mean()):7.2f}"
        )
    return "\n".join(
        (*lines, f"from the first to the last mark: {float(ends.max() - met.min()):.1f}")
    )


if __name__ == "__main__":
    main()
