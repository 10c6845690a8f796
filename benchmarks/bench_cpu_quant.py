"""Quantized engines on the CPU in turns: decode at batch 1, prefill, and what the codes cost.

    python benchmarks/bench_cpu_quant.py MODEL.gguf [--llama PYTHON] [--text FILE] [--json FILE]

Each round runs every engine once, so that what else the machine does hits all of them; ratios are
of medians of rounds, with a 95% interval. Decode is the median time of a token behind a prompt of
``--context`` tokens; prefill is ``--prompt`` tokens to the first one. ``--llama`` names a Python
that has llama-cpp-python, and adds llama.cpp on the same file. ``--text`` measures perplexity
against float32, from logits of windows of the engines themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

import tilewright as tw
from tilewright.compiler.bench.statistics import paired_ratio
from tilewright.compiler.quality.compare import compare
from tilewright.formats.gguf import GGUFCheckpoint
from tilewright.formats.gguf_tokenizer import read_gguf_tokenizer
from tilewright.runtime.engine import CausalLMEngine

BASE = "float32"
SCHEMES: Mapping[str, str | tw.QuantConfig | None] = {
    BASE: "expanded",
    "int8": tw.QuantConfig("int8", method="rtn", lm_head=True),
    "int4-float": tw.QuantConfig("int4", group=32, lm_head=True),
    "int4-int8": tw.QuantConfig("int4", group=32, lm_head=True, compute="int8"),
    "stored-float": None,
    "stored-int8": tw.QuantConfig("stored", compute="int8"),
}
LLAMA = "llama.cpp"
WARM_TOKENS = 4
# Answers each line, "CONTEXT NEW PROMPT", with the seconds of a decode step and of a prefill.
_LLAMA_CHILD = """
import json, statistics, sys, time
from llama_cpp import Llama
threads = int(sys.argv[2])
model = Llama(sys.argv[1], n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads,
              verbose=False)
clock = time.perf_counter
for line in sys.stdin:
    context, new, prompt = map(int, line.split())
    ids = [100 + i % 9000 for i in range(max(context, prompt))]
    model.reset()
    start = clock()
    model.eval(ids[:prompt])
    prefill = clock() - start
    model.reset()
    model.eval(ids[:context])
    steps = []
    for _ in range(new):
        start = clock()
        model.eval([model.sample(temp=0.0)])
        steps.append(clock() - start)
    print(json.dumps([statistics.median(steps), prefill]), flush=True)
"""

Timed: TypeAlias = Callable[[], tuple[float, float]]
"""Runs once: seconds of a decode step and of a prefill."""


@dataclass
class Figures:
    """What a contender did.

    Attributes:
        decode, prefill: tokens a second, one a round.
        perplexity: of the text, None where it is not measured.
        linears: that read codes.
    """

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    perplexity: float | None = None
    linears: int = 0


def main() -> int:
    """Measures and prints; exit code 0."""
    options = _options()
    engines = {
        name: tw.compile(
            options.model,
            backend="onnxruntime",
            quantize=SCHEMES[name],
            max_model_len=2048,
            max_batch_size=1,
            verify="off",
        )
        for name in options.schemes.split(",")
    }
    runs = {name: _ours(engine, options) for name, engine in engines.items()}
    llama = None if options.llama is None else _start_llama(options)
    if llama is not None:
        runs[LLAMA] = lambda: _ask(llama, options)
    found = {name: Figures(linears=_linears(engines.get(name))) for name in runs}
    try:
        for index in range(options.rounds + 1):
            for name, run in runs.items():
                step, prefill = run()
                if index:  # the first one warms up
                    found[name].decode.append(1 / step)
                    found[name].prefill.append(options.prompt / prefill)
    finally:
        if llama is not None:
            llama.kill()
    if options.text is not None:
        _measure_text(engines, found, options)
    _print(found)
    if options.json is not None:
        text = json.dumps({name: asdict(figures) for name, figures in found.items()}, indent=1)
        options.json.write_text(text + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--context", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--llama", metavar="PYTHON", help="has llama-cpp-python")
    parser.add_argument("--text", type=Path, help="to measure perplexity on")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, at most")
    parser.add_argument("--json", type=Path, help="file to write figures to")
    return parser.parse_args()


def _linears(engine: CausalLMEngine | None) -> int:
    report = {} if engine is None else engine.report()
    facts = report.get("stored_quantization") or report.get("quantization") or {}
    return int(facts.get("linears", 0))


def _ours(engine: CausalLMEngine, options: argparse.Namespace) -> Timed:
    ids = [100 + i % 9000 for i in range(max(options.context, options.prompt))]

    def run() -> tuple[float, float]:
        one = tw.SamplingParams(max_new_tokens=1, ignore_eos=True)
        prefill = engine.generate([ids[: options.prompt]], one)[0].timings.ttft
        params = tw.SamplingParams(max_new_tokens=options.new + WARM_TOKENS, ignore_eos=True)
        steps = engine.generate([ids[: options.context]], params)[0].timings.itl
        return statistics.median(steps[WARM_TOKENS - 1 :]), prefill

    return run


def _start_llama(options: argparse.Namespace) -> subprocess.Popen[str]:
    threads = str(torch.get_num_threads())
    command = [options.llama, "-c", _LLAMA_CHILD, str(options.model), threads]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _ask(llama: subprocess.Popen[str], options: argparse.Namespace) -> tuple[float, float]:
    assert llama.stdin is not None and llama.stdout is not None
    llama.stdin.write(f"{options.context} {options.new} {options.prompt}\n")
    llama.stdin.flush()
    step, prefill = json.loads(llama.stdout.readline())
    return step, prefill


def _measure_text(
    engines: Mapping[str, CausalLMEngine],
    found: Mapping[str, Figures],
    options: argparse.Namespace,
) -> None:
    tokenizer = read_gguf_tokenizer(GGUFCheckpoint(options.model))
    ids = tokenizer.encode(options.text.read_text(encoding="utf-8")[: options.tokens * 8])
    ids = ids[: options.tokens]
    base = engines[BASE]
    for name, engine in engines.items():
        if engine is not base:
            compared = compare(_logits(base), _logits(engine), ids, stride=511)
            found[name].perplexity = compared.perplexity
            found[BASE].perplexity = compared.base_perplexity


def _logits(engine: CausalLMEngine) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: engine(ids[None])[0]


def _print(found: Mapping[str, Figures]) -> None:
    print(f"{'':18}{'decode':>8}{'prefill':>9}   ratios: decode, prefill")
    for name, figures in found.items():
        line = f"{name:18}{_median(figures.decode):8.1f}{_median(figures.prefill):9.0f}"
        for rival in (BASE, LLAMA):
            if rival in found and name != rival:
                line += f"   {_over(figures, found[rival])} of {rival}"
        if figures.perplexity is not None:
            line += f"   perplexity {figures.perplexity:.3f}"
        print(line)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _over(ours: Figures, theirs: Figures) -> str:
    parts = []
    for kind in ("decode", "prefill"):
        ratio = paired_ratio(getattr(ours, kind), getattr(theirs, kind))
        parts.append(f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
