"""What bench_persistent.py compares: models' shapes, steps of the graph path, times of phases."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import tilewright as tw
from tilewright.codegen.persistent.trace import MARKS, StepTrace
from tilewright.runtime.engine import CausalLMEngine
from tilewright.runtime.runner import ProgramRunner

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
    "smollm2": {
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
"""Shapes of Llama-3.2-1B, Llama-3.1-8B and SmolLM2-135M."""
Tensors = dict[str, torch.Tensor]
ROUNDING = 0.1
"""What bfloat16 may make of the logits of 16 to 32 layers, rounded at other places, in root mean
squares: 0.004 of each of some ten results a layer. A wrong key in one layer was 0.4.
"""


@dataclass(frozen=True, slots=True)
class Paths:
    """Steps of the graph path behind ``length`` tokens: tokens i64[B] in, logits f32[B, V] out."""

    length: int
    steps: list[tuple[torch.Tensor, torch.Tensor]]


def engine_of(
    model: str,
    length: int,
    layers: int | None = None,
    batch: int = 1,
    quantize: str | None = None,
) -> CausalLMEngine:
    """An engine of a shape with random weights, for so many sequences."""
    config = CONFIGS[model] | ({} if layers is None else {"num_hidden_layers": layers})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        begun = time.perf_counter()
        engine = tw.compile(
            folder,
            random_weights=0,
            dtype="bfloat16",
            quantize=quantize,
            max_model_len=length + 4 * PAGE,
            max_batch_size=batch,
            memory_fraction=0.5,
            verify="off",
            decode="kernels",
        )
    print(f"engine ready in {time.perf_counter() - begun:.0f} s", flush=True)
    assert isinstance(engine, CausalLMEngine)
    return engine


def step_inputs(length: int, batch: int = 1) -> Tensors:
    """Inputs of a step of greedy sequences, which `place` makes those of a certain step."""
    pages = (length + 2 * STEPS) // PAGE + 1
    tables = torch.arange(1, batch * pages + 1, dtype=torch.int32, device=DEVICE)

    def each(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((batch,), value, dtype=dtype, device=DEVICE)

    return {
        "token_ids": torch.arange(17, 17 + batch, device=DEVICE),
        "positions": each(0, torch.int64),
        "seq_lens": each(0, torch.int32),
        "slot_mapping": each(0, torch.int64),
        "block_tables": tables.view(batch, pages),
        "temperature": each(0.0),
        "top_k": each(0, torch.int32),
        "top_p": each(1.0),
        "min_p": each(0.0),
        "uniform": each(0.0),
        "group_rows": torch.arange(batch, dtype=torch.int32, device=DEVICE),
        "group_ids": each(0, torch.int32),
        "shared_pages": each(0, torch.int32),
    }


def step_caches(caches: Mapping[str, torch.Tensor], inputs: Tensors) -> Tensors:
    """Random caches of as many pages as the inputs name."""
    pages = inputs["block_tables"].numel() + 1  # page 0 is nobody's
    return {name: torch.randn_like(tensor[:pages]) for name, tensor in caches.items()}


def place(inputs: Tensors, length: int) -> None:
    """Makes the inputs those of the step that follows ``length`` tokens."""
    inputs["positions"].fill_(length)
    inputs["seq_lens"].fill_(length + 1)
    first = inputs["block_tables"][:, 0].long()  # a sequence's pages come in order
    inputs["slot_mapping"].copy_(first * PAGE + length)


def graph_path(
    runner: ProgramRunner, caches: Tensors, inputs: Tensors, length: int
) -> tuple[Callable[[], None], Tensors]:
    """A replay of the decode graph, and its results. What it runs before the capture it writes to
    where the step behind ``length`` tokens writes.
    """
    given = {**inputs, **caches}
    place(inputs, length)
    runner.run(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = runner.run(given)
    return graph.replay, {"logits": found["logits"], "tokens": found["tokens"]}


def steps_of(
    replay: Callable[[], None], found: Tensors, inputs: Tensors, length: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens in and logits out of some greedy steps in a row."""
    tokens, steps = inputs["token_ids"].clone(), []
    for step in range(STEPS):
        place(inputs, length + step)
        inputs["token_ids"].copy_(tokens)
        replay()
        steps.append((tokens, found["logits"].float().clone()))
        tokens = found["tokens"].clone()
    return steps


def compared(
    step: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    inputs: Tensors,
    paths: Paths,
    most: float = ROUNDING,
) -> str:
    """How many tokens are the graph path's, and how far logits are off, for the same tokens in:
    at most ``most`` standard deviations in root mean squares.

    Raises:
        RuntimeError: a token that is another one by more than rounding, or logits far off.
    """
    equal, worst, spread, ties, total = 0, 0.0, 0.0, 0, 0
    for index, (tokens, logits) in enumerate(paths.steps):
        place(inputs, paths.length + index)
        inputs["token_ids"].copy_(tokens)
        found, chosen = step()
        each = (found.float() - logits).abs()
        off = each.amax(1)
        worst = max(worst, float((off / logits.std(1)).max()))
        spread = max(spread, float((each.square().mean(1).sqrt() / logits.std(1)).max()))
        best = logits.argmax(1)
        behind = logits.amax(1) - logits.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
        equal += int((chosen == best).sum())
        ties += int(((chosen != best) & (chosen >= 0) & (behind <= 2 * off)).sum())
        total += len(best)
    said = f"{equal}/{total} tokens equal, {ties} within rounding, logits off {spread:.4f} std"
    said += f" (at most {worst:.4f})"
    if equal + ties < total or not spread <= most:
        raise RuntimeError(f"wrong: {said}")
    return said


def replay_seconds(replay: Callable[[], object]) -> float:
    """Median of several rounds: seconds of a step among many."""
    times = []
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(TIMED):
            replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3 / TIMED)
    return statistics.median(times[1:])


def breakdown(trace: StepTrace) -> tuple[str, list[dict[str, object]]]:
    """Mean times of each form's calls, in µs: from the end of the last program of the call before
    to that of this one; waiting of the program that waits least and of all; working of all and of
    the slowest. As a table, and by name.
    """
    times = torch.tensor(trace.times, dtype=torch.float64).unflatten(1, (-1, len(MARKS))) * 1e-3
    met, begun, done = (times[:, :, MARKS.index(name)] for name in MARKS)
    # A program without a tile of a call does not wait for it: begun is where it met the call.
    ends = done.max(0).values
    lines = [f"{'call':<38} {'n':>4}   whole   waits (least, mean)   works (mean, most)"]
    rows: list[dict[str, object]] = []
    for index, form in enumerate(trace.forms):
        at = [i for i, of in enumerate(trace.calls) if of == index and i > 1]
        if not at:
            continue
        wait, work = (begun - met)[:, at], (done - begun)[:, at]
        row: dict[str, object] = {
            "call": form,
            "calls": len(at),
            "whole_us": statistics.mean(float(ends[i] - ends[i - 1]) for i in at),
            "wait_least_us": float(wait.min(0).values.mean()),
            "wait_us": float(wait.mean()),
            "work_us": float(work.mean()),
            "work_most_us": float(work.max(0).values.mean()),
        }
        rows.append(row)
        figures = [float(str(row[name])) for name in list(row)[2:]]
        whole, least, mean, works, most = figures
        lines.append(
            f"{form[:38]:<38} {len(at):4d} {whole:7.2f} {least:9.2f} {mean:7.2f}"
            f" {works:12.2f} {most:7.2f}"
        )
    span = float(ends.max() - met.min())
    return "\n".join((*lines, f"from the first to the last mark: {span:.1f} µs")), rows
