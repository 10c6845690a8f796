"""One launch for all layers: a decode step of 1 to 8 sequences, beside the graph of kernels.

    python benchmarks/bench_persistent.py 1b --output results.jsonl
    python benchmarks/bench_persistent.py 8b --cut ring,cap=3 --cut tiles,num_warps=4,ctas=2
    python benchmarks/bench_persistent.py 1b --batch 4 --cut default
    python benchmarks/bench_persistent.py 8b --quantize fp8 --layers 8

Weights are random, of a model's shape. First both paths compute the same steps, each with its own
caches: logits are compared, and tokens may only differ where the graph's best two logits are as
near as the two paths' logits are. Then each is timed as a CUDA graph, by events over many replays;
the floor is the time in which a plain sum of 2 GiB reads as many bytes as the products' weights
have. The cut named ``default``, or the first, also tells where its time goes, and runs as a
Program of the engine, the sampling behind it. A cut is of a ring of weights or of tiles; the
default is what an engine would have.

A cut whose result stands in the output file is not run again, nor is one that ended the process:
so the same command goes on where it was cut off. A launch that gets stuck ends by its watchdog, in
a second or two, and is reported with what it waited for.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from graph_timing import read_rate
from persistent_steps import (
    CONFIGS,
    DEVICE,
    ROUNDING,
    Paths,
    Tensors,
    breakdown,
    compared,
    engine_of,
    graph_path,
    replay_seconds,
    step_caches,
    step_inputs,
    steps_of,
)

from tilewright.codegen.base import Lowered
from tilewright.codegen.persistent.decode import PersistentDecode
from tilewright.codegen.persistent.loading import decoder
from tilewright.codegen.persistent.lowering import cut_for, tiling_for, with_one_launch
from tilewright.codegen.persistent.reading import Shape, read_decode
from tilewright.codegen.persistent.ring import ring_of
from tilewright.codegen.persistent.ring_decode import RingDecode
from tilewright.codegen.persistent.ring_source import RingCut, ring_source
from tilewright.codegen.persistent.source import compile_persistent, persistent_source
from tilewright.codegen.persistent.tiling import Tiling
from tilewright.codegen.persistent.trace import StepTrace
from tilewright.codegen.triton.package import Binary
from tilewright.codegen.triton.source import KernelSource
from tilewright.compiler.inspect.timeline import timeline_section
from tilewright.errors import TilewrightError
from tilewright.ir.parser import parse_graph
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import Target

_PLAIN = ("default", "ring,cap=3", "ring,slots=5", "tiles")
_SEVERAL = ("default", "rows=4", "ahead=0", "ahead=8", "num_warps=4,ctas=2", "splits=8")
_CODED = ("default", "rows=8,ahead=16", "rows=16,ahead=8", "ahead=0", "num_warps=4,ctas=2")
Cut = Tiling | RingCut
_FAR = 0.5
"""What may become of logits, as `ROUNDING`, where activations are rounded to codes: two paths that
round bfloat16 in another order take another code here and there, a sixteenth off, in each of some
tens of layers."""


@dataclass(slots=True)
class Output:
    """Lines of JSON, those of earlier runs included.

    Attributes:
        file: where they stand; None for nowhere.
        model: whose lines count.
        pictures: the folder for traces of steps and pages that show them; None for none.
    """

    file: Path | None
    model: str
    pictures: Path | None = None

    def done(self) -> dict[str, dict[str, object]]:
        """The last line of each tiling."""
        if self.file is None or not self.file.exists():
            return {}
        lines = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
        return {line["tiling"]: line for line in lines if line["model"] == self.model}

    def add(self, tiling: str, **facts: object) -> None:
        """Appends a line at once: what comes after may end the process."""
        if self.file is None:
            return
        line = {"device": torch.cuda.get_device_name(), "model": self.model, "tiling": tiling}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **facts}) + "\n")


@dataclass(slots=True)
class Bench:
    """A model's engine, its graph path's steps, and what the one launch is given.

    Attributes:
        shape: what the kernel depends on; ``graph`` and ``lowered`` are where it comes from.
        weights, caches, inputs: by name, on the device.
        paths: logits and tokens of the graph path's steps.
        floor: seconds in which the weights can be read.
        output: of results.
    """

    shape: Shape
    lowered: Lowered
    graph: str
    weights: Tensors
    caches: Tensors
    inputs: Tensors
    paths: Paths
    floor: float
    output: Output

    def decoder(
        self, cut: Cut, source: KernelSource, binary: Binary, timed: bool
    ) -> PersistentDecode | RingDecode:
        """The launch of a cut."""
        device = torch.device(DEVICE)
        return decoder(self.shape, cut, self.weights, source, binary, device, timed)

    def compared(self, step: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> str:
        """How near a path's steps are to the graph path's."""
        codes = self.shape.codes
        rounds = codes is not None and codes.rounds
        return compared(step, self.inputs, self.paths, _FAR if rounds else ROUNDING)

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return len(self.inputs["token_ids"])

    def line(self, name: str, seconds: float, more: str) -> str:
        """A row of the table."""
        share = f"{self.floor / seconds:6.3f} of the floor"
        return (
            f"{name:<32} {seconds * 1e6:8.1f} µs {self.batch / seconds:7.1f} tok/s {share}  {more}"
        )


def main() -> None:
    """Compares, times and prints; exit code 1 where a tiling computes something else."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--cut", action="append", default=[], help="ring or tiles and fields")
    parser.add_argument("--quantize", help="a scheme of codes; none by default")
    parser.add_argument("--length", type=int, default=512, help="tokens before the first step")
    parser.add_argument("--batch", type=int, default=1, choices=(1, 2, 4, 8))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--soak", type=int, default=0, help="replays of the default at the end")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--pictures", type=Path, help="a folder for traces of a step and pages of these"
    )
    options = parser.parse_args()
    quantize = options.quantize
    model = f"{options.model} {quantize}" if quantize else options.model
    output = Output(options.output, f"{model} x {options.batch}", options.pictures)
    done = output.done()
    sweep = _CODED if quantize else _PLAIN if options.batch == 1 else _SEVERAL
    names = [name for name in options.cut or sweep if name not in done]
    for name, line in done.items():
        print(f"known: {name}: {line.get('line', 'ended the process')}")
    engine = engine_of(options.model, options.length, options.layers, options.batch, quantize)
    with torch.inference_mode():  # the engine's caches are written to
        bench = _prepared(engine, options, output, "graph of kernels" not in done)
        wrong = _sweep(bench, names, options.soak)
    sys.exit(1 if wrong else 0)


def _prepared(engine: object, options: argparse.Namespace, output: Output, report: bool) -> Bench:
    length = options.length
    rate = read_rate()
    image, runner = engine.image, engine.decode_runner  # type: ignore[attr-defined]
    text = image.decode.graphs[-1][1]
    shape = read_decode(parse_graph(text))
    weights = {
        runner.program.weights[buffer]: tensor
        for buffer, tensor in runner.constants.items()
        if buffer in runner.program.weights
    }
    inputs = step_inputs(length, options.batch)
    caches = step_caches(engine.executor.caches.tensors, inputs)  # type: ignore[attr-defined]
    own = {name: tensor.clone() for name, tensor in caches.items()}
    replay, found = graph_path(runner, own, inputs, length)
    paths = Paths(length, steps_of(replay, found, inputs, length))
    floor = shape.weight_bytes / rate
    lowered = Lowered(runner.program, image.files)
    bench = Bench(shape, lowered, text, weights, caches, inputs, paths, floor, output)
    print(f"reads {rate * 1e-12:.3f} TB/s, {shape.weight_bytes / 1e9:.3f} GB: {floor * 1e6:.1f} µs")
    if report:
        seconds = replay_seconds(replay)
        line = bench.line("graph of kernels", seconds, "with its sampling")
        print(line, flush=True)
        output.add("graph of kernels", us=seconds * 1e6, floor_us=floor * 1e6, line=line)
    return bench


def _sweep(bench: Bench, names: list[str], soak: int) -> bool:
    """Runs the cuts; whether one of them is wrong."""
    cuts = [_cut(name, bench.shape, bench.batch) for name in names]
    main = names.index("default") if "default" in names else 0
    kinds = [(index, False) for index in range(len(names))]
    kinds = [*kinds[: main + 1], (main, True), *kinds[main + 1 :]] if names else []
    sources = [_source(bench.shape, cuts[index], timed) for index, timed in kinds]
    begun = time.perf_counter()
    with ThreadPoolExecutor(max(1, len(sources))) as pool:  # each compiles in its own process
        found = list(pool.map(_compiled, sources))
    print(f"compiled {len(sources)} in {time.perf_counter() - begun:.0f} s", flush=True)
    wrong = False
    for (index, timed), source, binary in zip(kinds, sources, found, strict=True):
        name = names[index]
        if isinstance(binary, TilewrightError):
            bench.output.add(name, line=f"not compiled: {binary}")
            print(f"{name}: not compiled: {binary}", flush=True)
            continue
        bench.output.add(name if not timed else f"{name} timed")  # lest a crash be repeated
        try:
            _one(bench, name, cuts[index], source, binary, timed)
            if timed:
                _as_program(bench, name, cuts[index])
                _soaked(bench, cuts[index], sources[index], found[index], soak)
        except (TilewrightError, RuntimeError) as error:
            wrong = True
            bench.output.add(name, line=f"wrong: {error}")
            print(f"{name}: {error}", flush=True)
        gc.collect()
    return wrong


def _one(
    bench: Bench, name: str, cut: Cut, source: KernelSource, binary: Binary, timed: bool
) -> None:
    """Compares a cut and times it, or tells where its time goes."""
    ours = bench.decoder(cut, source, binary, timed)
    caches = {name: tensor.clone() for name, tensor in bench.caches.items()}

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        ours.run(bench.inputs, caches)
        ours.check()
        return ours.logits, ours.tokens

    said = bench.compared(step)
    if timed:
        for _ in range(3):
            ours.run(bench.inputs, caches)
        ours.check()
        trace = ours.trace(f"{bench.output.model}, {name}")
        text, rows = breakdown(trace)
        print(text, flush=True)
        bench.output.add(f"{name} timed", line=text, rows=rows)
        if bench.output.pictures is not None:
            _draw(bench, trace)
        return
    seconds = _replays(lambda: ours.run(bench.inputs, caches))
    ours.check()
    used = binary.resources
    more = f"{said}; {used.registers} registers, {used.spills} B spilled, {used.shared} B shared"
    line = bench.line(name, seconds, more)
    print(line, flush=True)
    facts = {"us": seconds * 1e6, "floor_us": bench.floor * 1e6, "checked": said}
    bench.output.add(name, line=line, registers=used.registers, spills=used.spills, **facts)


def _draw(bench: Bench, trace: StepTrace) -> None:
    """The step as a page, and as a file that ``tilewright inspect --html --trace`` takes."""
    folder = bench.output.pictures
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / bench.output.model.replace(" ", "")
    path.with_suffix(".json").write_text(trace.to_json())
    path.with_suffix(".html").write_text(
        f'<!doctype html><meta charset="utf-8">{timeline_section(trace)}'
    )


def _as_program(bench: Bench, name: str, cut: Cut) -> None:
    """The launch within the engine's Program, the sampling behind it."""
    graph = parse_graph(bench.graph)
    lowered = with_one_launch(bench.lowered, graph, Target.detect(), (bench.batch,), cut)
    read = lowered.files.__getitem__
    runner = ProgramRunner(lowered.program, bench.weights, read, device=torch.device(DEVICE))
    given = {**bench.inputs, **{n: tensor.clone() for n, tensor in bench.caches.items()}}

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        found = runner.run(given)
        return found["logits"], found["tokens"]

    said = bench.compared(step)
    seconds = _replays(lambda: runner.run(given))
    line = bench.line(f"{name}, as a Program", seconds, f"{said}; with its sampling")
    print(line, flush=True)
    bench.output.add(f"{name}, as a Program", us=seconds * 1e6, line=line)


def _soaked(bench: Bench, cut: Cut, source: KernelSource, binary: object, replays: int) -> None:
    """Many replays of a step, which must all end and give the same bits."""
    if not replays or not isinstance(binary, Binary):
        return
    ours = bench.decoder(cut, source, binary, False)
    ours.run(bench.inputs, bench.caches)
    logits = ours.logits.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.run(bench.inputs, bench.caches)
    for index in range(replays):
        graph.replay()
        if index % 1000 == 999:
            ours.check()
    ours.check()
    print(f"{replays} replays, logits {'equal' if torch.equal(ours.logits, logits) else 'DIFFER'}")


def _replays(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return replay_seconds(graph.replay)


def _compiled(source: KernelSource) -> Binary | TilewrightError:
    try:
        return compile_persistent([source], Target.detect().arch)[0]
    except TilewrightError as error:
        return error


def _cut(text: str, shape: Shape, batch: int) -> Cut:
    """A cut by its fields; ``ctas`` is programs a multiprocessor."""
    target = Target.detect()
    kind, *fields = (
        text.split(",") if "=" not in text.split(",")[0] else ("tiles", *text.split(","))
    )
    values = {name: int(value) for name, value in (field.split("=") for field in fields)}
    if kind == "default":
        return cut_for(target, shape, batch)
    if kind == "ring":
        return RingCut(programs=target.sms, **values)
    default, ctas = tiling_for(target, shape, batch), values.pop("ctas", 1)
    return replace(default, programs=default.programs * ctas, batch=batch, **values)


def _source(shape: Shape, cut: Cut, timed: bool) -> KernelSource:
    if isinstance(cut, RingCut):
        return ring_source(ring_of(shape), cut, timed)
    return persistent_source(shape, cut, timed)


if __name__ == "__main__":
    main()
