"""One launch for a decode step, its weights by TMA through a ring in shared memory: a trial.

    python benchmarks/gpu/trial_ring.py               # on the GPU; about a minute
    python benchmarks/gpu/trial_ring.py --simulate    # the schedule alone, without one

The products of Llama-3.2-1B, bf16, batch 1, with norms, gates and residuals; attention is a copy of
q that takes a given number of cycles. The schedule is first simulated: no deadlock, each tile once,
nothing written that is still to be read. Each way is compared with float64, beside separate
kernels in bf16, then timed by replays of a CUDA graph; again compared after that. Beside them: the
65 torch.mv alone, and the time in which a sum reads as many bytes. All are compiled side by side;
then one process measures them in turn, and is replaced where a kernel hangs (20 s) or breaks the
device. Waits that are too long end by themselves, in about 2 s. The table comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

LAYERS, WIDTH, QKV, INNER, VOCAB = 16, 2048, 3072, 8192, 128256
EPS = 1e-5
PIECES = 64  # of attention's stand-in (ring_kernel.py)
POLLS = 2_000_000  # 2 s or so
LIMIT = 20.0  # seconds for a line of the measuring process
REPLAYS = 40


@dataclass(frozen=True)
class Way:
    """A way to run the step.

    Attributes:
        rows: of a tile in the arena, 512 bytes each: 64 are 32 KB.
        slots: of the ring.
        groups: of warps that multiply: one of 8 or two of 4.
        attention: cycles that its stand-in takes; none if there is no stand-in.
        waits: whether products wait for those before; without, results are wrong.
        shared_x: whether warps of a group get x from each other, not each from L1.
        atomic: whether polls are atomic adds of zero, the result broadcast to the group.
    """

    rows: int = 64
    slots: int = 6
    groups: int = 1
    attention: int | None = None
    waits: bool = True
    shared_x: bool = False
    atomic: bool = False


WAYS = {
    "6 x 32 KB": Way(),
    "no waits": Way(waits=False),
    "7 x 32 KB": Way(slots=7),
    "4 x 32 KB": Way(slots=4),
    "2 x 32 KB": Way(slots=2),
    "12 x 16 KB": Way(rows=32, slots=12),
    "8 x 16 KB": Way(rows=32, slots=8),
    "2 groups": Way(groups=2),
    "2 groups, no waits": Way(groups=2, waits=False),
    "2 groups, 12 x 16 KB": Way(rows=32, slots=12, groups=2),
    "x by shared memory": Way(shared_x=True),
    "2 groups, x by shared memory": Way(groups=2, shared_x=True),
    "atomic polls": Way(atomic=True),
    "attention, 0 cycles": Way(attention=0),
    "attention, 5000 cycles": Way(attention=5000),
    "attention, 10000 cycles": Way(attention=10000),
    "attention, 20000 cycles": Way(attention=20000),
    "2 groups, 10000 cycles": Way(groups=2, attention=10000),
}


@dataclass(frozen=True)
class Call:
    """A step of the schedule.

    Attributes:
        tiles: of weights; 0 for attention's stand-in.
        reads: buffers that it needs whole, and the one that its own rows are read from.
        writes: the buffer that it writes.
        added: whether a tile's rows of ``writes`` are read before the wait.
    """

    tiles: int
    reads: str
    writes: str
    added: bool = False


def schedule(way: Way, layers: int = LAYERS) -> list[Call]:
    """The calls of a step, in order."""
    rows, down_rows = way.rows * 256 // WIDTH, way.rows * 256 // INNER
    calls: list[Call] = []
    for _ in range(layers):
        calls.append(Call(QKV // rows, "h", "qkv"))
        if way.attention is not None:
            calls.append(Call(0, "qkv", "attended"))
        calls.append(Call(WIDTH // rows, calls[-1].writes, "h", added=True))
        calls.append(Call(2 * INNER // rows, "h", "gated"))
        calls.append(Call(WIDTH // down_rows, "gated", "h", added=True))
    calls.append(Call(VOCAB // rows, "h", "logits"))
    return calls


def simulate(way: Way, programs: int, seed: int = 0, layers: int = LAYERS) -> None:
    """Runs the schedule as the kernel does, programs and groups in random order.

    Raises:
        RuntimeError: if it gets stuck, a tile is not computed once, or something is read before it
            is written or written before all have read it.
    """
    calls, order = schedule(way, layers), random.Random(seed)
    full = programs * way.groups
    targets = [min(call.tiles or PIECES, full) for call in calls]
    count = sum(call.tiles for call in calls)
    arrived, done, seen = [0] * len(calls), [0] * len(calls), [0] * count
    brought = [0] * programs
    used = [[False] * (-(-(count - p) // programs)) for p in range(programs)]

    def check(holds: bool, what: str, call: int) -> None:
        if not holds:
            raise RuntimeError(f"{what} (call {call} of {way}, {programs} programs)")

    def run(mine: int, which: int) -> Iterator[None]:
        begin = waited = 0
        for index, call in enumerate(calls):
            first = -(-(begin - mine) // programs)
            end = -(-(begin + call.tiles - mine) // programs)
            first += (first + which) % way.groups
            takes = first < end if call.tiles else which == 0 and mine < PIECES
            if call.added and takes:
                # What a residual's rows come from was waited for two products ago at most.
                since = max((i for i in range(index) if calls[i].writes == "h"), default=-1)
                check(waited >= since + 1, "a residual is read early", index)
            if takes and index:
                while arrived[index - 1] != targets[index - 1]:
                    yield
                waited = index
            later = [i for i in range(index) if calls[i].reads == call.writes]
            check(
                not takes or not later or arrived[later[-1]] == targets[later[-1]],
                "a buffer is written while it is read", index,
            )  # fmt: skip
            for item in range(first, end, way.groups):
                while item >= brought[mine]:
                    yield
                used[mine][item] = True
                seen[mine + item * programs] += 1
                done[index] += 1
            if takes:
                arrived[index] += 1
            begin += call.tiles

    runs = [run(mine, which) for mine in range(programs) for which in range(way.groups)]
    while runs:
        before = sum(map(sum, used)) + sum(brought) + sum(arrived)
        for mine in range(programs):
            while brought[mine] < len(used[mine]) and (
                brought[mine] < way.slots or used[mine][brought[mine] - way.slots]
            ):
                brought[mine] += 1
        order.shuffle(runs)
        runs = [one for one in runs if next(one, "end") is None]
        after = sum(map(sum, used)) + sum(brought) + sum(arrived)
        check(bool(not runs or after > before), "it is stuck", len(calls))
    check(set(seen) == {1}, "a tile is not computed once", 0)
    check(arrived == targets, "a counter does not reach its target", 0)


class Model:
    """Weights in an arena, and a step's buffers.

    Attributes:
        arena: bf16 [tiles * rows, 256], gate and up rows in turn; norms: bf16
            [2 * LAYERS + 1, WIDTH]; start: bf16 [WIDTH], the row of the embedding.
    """

    def __init__(self) -> None:
        import torch

        random_ = torch.Generator("cuda").manual_seed(0)
        sizes = [(QKV, WIDTH), (WIDTH, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER)] * LAYERS
        sizes.append((VOCAB, WIDTH))
        total = sum(n * k for n, k in sizes)
        self.arena = torch.empty(total // 256, 256, dtype=torch.bfloat16, device="cuda")
        self.weights: list[torch.Tensor] = []
        begin = 0
        for n, k in sizes:
            weight = self.arena.view(-1)[begin : begin + n * k].view(n, k)
            weight.normal_(0, k**-0.5, generator=random_)
            self.weights.append(weight)
            begin += n * k

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=random_, device="cuda")

        self.norms = (1 + 0.1 * normal(2 * LAYERS + 1, WIDTH)).bfloat16()
        self.start = normal(WIDTH).bfloat16()
        self.h = self.start.clone()
        self.qkv, self.attended, self.gated = (
            torch.zeros(n, dtype=torch.bfloat16, device="cuda") for n in (QKV, WIDTH, INNER)
        )
        self.logits = torch.zeros(VOCAB, device="cuda")
        self.counters = torch.zeros(32 * (5 * LAYERS + 4), dtype=torch.int32, device="cuda")
        self.diagnosis = torch.zeros(4, dtype=torch.int32, device="cuda")

    def reference(self, exact: bool) -> torch.Tensor:
        """Logits f64 [VOCAB], computed in float64, or rounded where the model rounds."""
        import torch

        kind = torch.float64 if exact else torch.bfloat16
        h = self.start.to(kind)

        def norm(x: torch.Tensor, which: int) -> torch.Tensor:
            wide = x if exact else x.float()
            scaled = wide * torch.rsqrt(wide.square().mean() + EPS)
            return scaled.to(kind) * self.norms[which].to(kind)

        def product(index: int, x: torch.Tensor) -> torch.Tensor:
            parts = self.weights[index].split(16384)
            return torch.cat([torch.mv(part.to(kind), x) for part in parts])

        for layer in range(LAYERS):
            qkv = product(4 * layer, norm(h, 2 * layer))
            h = h + product(4 * layer + 1, qkv[:WIDTH])
            both = product(4 * layer + 2, norm(h, 2 * layer + 1)).view(-1, 2)
            gated = torch.nn.functional.silu(both[:, 0]) * both[:, 1]
            h = h + product(4 * layer + 3, gated)
        return product(4 * LAYERS, norm(h, 2 * LAYERS)).double()

    def reset(self) -> None:
        """A new step, after whatever happened."""
        self.h.copy_(self.start)
        self.counters.zero_()
        self.diagnosis.zero_()
        self.logits.fill_(float("nan"))

    def multiply(self) -> None:
        """The products alone, by separate kernels."""
        import torch

        wide = self.gated
        outs = (self.qkv, self.attended, None, self.attended)
        for index, weight in enumerate(self.weights[:-1]):
            out = outs[index % 4]
            x = wide if index % 4 == 3 else self.start
            if out is None:
                torch.mv(weight, x)
            else:
                torch.mv(weight, x, out=out)
        torch.mv(self.weights[-1], self.start)


def launch(way: Way, model: Model | None, programs: int):  # noqa: ANN201
    """The kernel, its arguments and options; without a model's memory, for compilation alone."""
    import torch
    from ring_kernel import _ring_step
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    count = sum(call.tiles for call in schedule(way))
    if model is None:
        empty = torch.zeros(way.rows, 256, dtype=torch.bfloat16, device="cuda")
        small = [empty] * 4 + [empty.float(), empty, empty.int(), empty.int()]
        arena = empty
    else:
        small = [
            model.h, model.qkv, model.attended, model.gated, model.logits, model.norms,
            model.counters, model.diagnosis,
        ]  # fmt: skip
        arena = model.arena
    layout = gl.NVMMASharedLayout(0, 16, rank=2)
    desc = TensorDescriptor.from_tensor(arena, [way.rows, 256], layout)
    cycles = way.attention or 0
    sizes = (LAYERS, WIDTH, QKV, INNER, VOCAB, EPS)
    rest = (
        way.slots, way.groups, way.attention is not None, way.waits, way.shared_x, way.atomic,
    )  # fmt: skip
    args = (desc, *small, POLLS, cycles, count, *sizes, *rest)
    options = {"num_warps": 8 // way.groups, "launch_cooperative_grid": True}
    return _ring_step, args, (programs,), options


def step_us(run: Callable[[], object], steps: int = 5) -> float:
    """Median microseconds of a step, of replays of a graph of some."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(steps):
            run()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / steps)
    return statistics.median(times[3:])


def floor_us(model: Model) -> float:
    """Microseconds in which a plain sum reads as many bytes as the weights have."""
    return step_us(lambda: model.arena.sum(), 2)


def measure(names: Sequence[str]) -> None:
    """Prints a line of JSON for each way."""
    import torch

    programs = torch.cuda.get_device_properties(0).multi_processor_count
    model = Model()
    truth = model.reference(True)
    scale = truth.norm()
    plain = float((model.reference(False) - truth).norm() / scale)
    print(json.dumps({"note": "ready", "plain": plain}), flush=True)
    for name in names:
        said: dict[str, object] = {"name": name}
        try:
            if name == "floor":
                said["us"] = floor_us(model)
            elif name == "torch.mv":
                said["us"] = step_us(model.multiply)
            else:
                said |= _measured(WAYS[name], model, programs, truth, plain)
        except Exception as error:  # a broken way must not take the others along
            text = str(error).strip().splitlines() or [type(error).__name__]
            said["failed"] = text[-1][:150]
            print(json.dumps(said), flush=True)
            if isinstance(error, RuntimeError):  # the context may be lost: another process
                os._exit(1)
            continue
        print(json.dumps(said), flush=True)


def _measured(
    way: Way, model: Model, programs: int, truth: object, plain: float
) -> dict[str, object]:
    """A way's errors before and after its replays, and its time; or why it was given up."""
    import torch

    assert isinstance(truth, torch.Tensor)
    kernel, args, grid, options = launch(way, model, programs)

    def run() -> None:
        kernel[grid](*args, **options)

    def error() -> float:
        model.reset()
        run()
        torch.cuda.synchronize()
        off = float((model.logits.double() - truth).norm() / truth.norm())
        return off if off == off else 1e9

    first = error()
    if model.diagnosis[0]:
        _, call, found, target = model.diagnosis.tolist()
        return {"failed": f"gave up: call {call} waited for {target}, there were {found}"}
    if way.waits and first > 1.5 * plain + 1e-3:
        return {"error": first, "failed": f"wrong; separate kernels in bf16 are off by {plain:.1e}"}
    model.reset()
    us = step_us(run)
    if model.diagnosis[0]:
        return {"error": first, "failed": "gave up among the replays"}
    return {"us": us, "error": max(first, error())}


def compile_only(name: str) -> None:
    """Compiles a way for the device into Triton's cache; launches nothing."""
    import torch

    programs = torch.cuda.get_device_properties(0).multi_processor_count
    kernel, args, grid, options = launch(WAYS[name], None, programs)
    compiled = kernel.warmup(*args, grid=grid, **options)
    compiled._init_handles()
    used = f"{compiled.n_regs} registers, {compiled.n_spills} spilled"
    print(f"compiled {name:30s} {used}, {compiled.metadata.shared} B shared", flush=True)


def follow(names: list[str], lines: list[dict[str, object]]) -> list[str]:
    """Reads one measuring process to its end, or kills it; what it left undone comes back."""
    command = [sys.executable, __file__, "--measure", *names]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            said.put(line)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    left = list(names)
    begun = False
    while left:
        try:
            line = said.get(timeout=LIMIT if begun else 3 * LIMIT)
        except queue.Empty:
            line = None
            process.kill()
        if line is None:
            code = process.wait()
            if begun and lines and lines[-1].get("failed") and code == 1:
                break  # it said so itself
            lines.append({"name": left[0], "failed": f"hung or died (exit {code})"})
            left = left[1:]
            break
        if line.startswith("{"):
            entry = json.loads(line)
            lines.append(entry)
            begun = True
            if "name" in entry:
                left.remove(entry["name"])
    process.wait()
    return left


def table(lines: Sequence[dict[str, object]]) -> None:
    """Prints what was measured: a step's time, the part of the floor, the error."""
    said = {str(line["name"]): line for line in lines if "name" in line}
    plain = [line["plain"] for line in lines if "plain" in line]
    floor = float(str(said.get("floor", {}).get("us", "nan")))
    print(f"\nweights {weight_bytes() / 1e9:.3f} GB; bf16 by separate kernels is off by {plain}")
    print(f"{'':32s}|  us/step | floor/us | error")
    for name, line in said.items():
        us = float(str(line.get("us", "nan")))
        error = line.get("error")
        off = f"{error:.1e}" if isinstance(error, float) else ""
        print(f"{name:32s}| {us:8.1f} | {floor / us:8.3f} | {off:8s} {line.get('failed', '')}")


def weight_bytes() -> int:
    """Bytes of weights that a step reads."""
    layer = QKV * WIDTH + WIDTH * WIDTH + 3 * INNER * WIDTH
    return 2 * (LAYERS * layer + VOCAB * WIDTH)


def simulate_all(programs: int) -> None:
    """Simulates the schedule of each shape of ring."""
    shapes = {
        Way(way.rows, way.slots, way.groups, None if way.attention is None else 0): None
        for way in WAYS.values()
    }
    for way in shapes:
        simulate(way, programs)
        print("simulated", *astuple(way)[:4], flush=True)


def main() -> None:
    """Simulates, compiles side by side, measures in turn, prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", nargs="*")
    parser.add_argument("--compile")
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    if options.compile:
        compile_only(options.compile)
        return
    if options.simulate:
        simulate_all(132)
        return
    import torch
    import triton

    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    workers = [subprocess.Popen([sys.executable, __file__, "--compile", name]) for name in WAYS]
    simulate_all(torch.cuda.get_device_properties(0).multi_processor_count)
    for worker in workers:
        try:
            worker.wait(90)
        except subprocess.TimeoutExpired:
            worker.kill()
    lines: list[dict[str, object]] = []
    left = ["floor", "torch.mv", *WAYS]
    while left:
        left = follow(left, lines)
    table(lines)


if __name__ == "__main__":
    main()
