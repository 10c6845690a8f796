"""One launch for a decode step, its weights by TMA through a ring in shared memory: a trial.

    python benchmarks/gpu/trial_ring.py               # on the GPU; about a minute
    python benchmarks/gpu/trial_ring.py --simulate    # the schedule alone, without one

The products of Llama-3.2-1B, bf16, batch 1, with norms, gates and residuals; in place of attention
q itself, or a copy of q that takes a number of cycles, or attention to a cache without pages. The
schedule is first simulated (ring_schedule.py). Each way is compared with float64, beside separate
kernels in bf16, then timed by replays of a CUDA graph; again compared after that. Beside them: the
65 torch.mv alone, and the time in which a sum reads as many bytes. All are compiled side by side;
then one process measures them in turn, and is replaced where a kernel hangs (20 s) or breaks the
device. Waits that are too long end by themselves, in about 2 s. The table comes last.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from functools import cache

import torch
from ring_schedule import (
    HEAD_DIM,
    HEADS,
    INNER,
    KV_HEADS,
    LAYERS,
    QKV,
    VOCAB,
    WIDTH,
    Way,
    schedule,
    simulate,
)
from trials import Launch, Line, compile_all, measured, say, us_of, used_by

EPS = 1e-5
POLLS = 2_000_000  # 2 s or so

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
    "attention to 512": Way(context=512),
    "attention to 1024": Way(context=1024),
    "2 groups, attention to 512": Way(groups=2, context=512),
    "4 x 32 KB, attention to 512": Way(slots=4, context=512),
    "12 x 16 KB, attention to 512": Way(rows=32, slots=12, context=512),
}


@cache
def caches(context: int) -> torch.Tensor:
    """Keys, after rope, and values: bf16 [LAYERS, 2, context, KV_HEADS, HEAD_DIM]."""
    shape = (LAYERS, 2, max(context, 8), KV_HEADS, HEAD_DIM)
    return torch.randn(*shape, device="cuda").bfloat16()


@cache
def angles(context: int) -> torch.Tensor:
    """Cosine and sine at the newest token: f32 [2, HEAD_DIM / 2], of bfloat16's precision."""
    exponent = torch.arange(HEAD_DIM // 2, device="cuda") * (-2 / HEAD_DIM)
    angle = max(context - 1, 0) * 500000.0**exponent
    return torch.stack((angle.cos(), angle.sin())).bfloat16().float()


class Model:
    """Weights in an arena, and a step's buffers.

    Attributes:
        arena: bf16 [tiles * rows, 256], gate and up rows in turn; norms: bf16
            [2 * LAYERS + 1, WIDTH]; start: bf16 [WIDTH], the row of the embedding.
    """

    def __init__(self) -> None:
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
        self.partial = torch.zeros(8, HEADS, HEAD_DIM + 2, device="cuda")
        words = 32 * (5 * LAYERS + 4 + KV_HEADS)
        self.counters = torch.zeros(words, dtype=torch.int32, device="cuda")
        self.diagnosis = torch.zeros(4, dtype=torch.int32, device="cuda")

    def reset(self) -> None:
        """A new step, after whatever happened."""
        self.h.copy_(self.start)
        self.counters.zero_()
        self.diagnosis.zero_()
        self.logits.fill_(float("nan"))

    def multiply(self) -> None:
        """The products alone, by separate kernels."""
        for weight in self.weights:
            torch.mv(weight, self.gated if weight.shape[1] == INNER else self.start)


def attention(layer: int, qkv: torch.Tensor, context: int) -> torch.Tensor:
    """Attention's result [WIDTH] in qkv's precision, of which softmax in bf16 is f32's."""
    cos, sin = (torch.cat((x, x)).to(qkv.dtype) for x in angles(context))

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    q, k, v = qkv.view(-1, HEAD_DIM).split((HEADS, KV_HEADS, KV_HEADS))
    past = caches(context)[layer, :, : context - 1].to(qkv.dtype)
    keys, values = torch.cat((past[0], turned(k)[None])), torch.cat((past[1], v[None]))
    scores = torch.einsum("gid,sgd->gis", turned(q).view(KV_HEADS, -1, HEAD_DIM), keys)
    wide = scores.to(torch.promote_types(qkv.dtype, torch.float32)) * HEAD_DIM**-0.5
    return torch.einsum("gis,sgd->gid", wide.softmax(-1).to(qkv.dtype), values).reshape(-1)


@cache
def reference(model: Model, exact: bool, context: int) -> torch.Tensor:
    """Logits f64 [VOCAB], computed in float64, or rounded where the model rounds."""
    kind = torch.float64 if exact else torch.bfloat16
    h = model.start.to(kind)

    def norm(x: torch.Tensor, which: int) -> torch.Tensor:
        wide = x if exact else x.float()
        scaled = wide * torch.rsqrt(wide.square().mean() + EPS)
        return scaled.to(kind) * model.norms[which].to(kind)

    def product(index: int, x: torch.Tensor) -> torch.Tensor:
        parts = model.weights[index].split(16384)
        return torch.cat([torch.mv(part.to(kind), x) for part in parts])

    for layer in range(LAYERS):
        qkv = product(4 * layer, norm(h, 2 * layer))
        attended = attention(layer, qkv, context) if context else qkv[:WIDTH]
        h = h + product(4 * layer + 1, attended)
        both = product(4 * layer + 2, norm(h, 2 * layer + 1)).view(-1, 2)
        gated = torch.nn.functional.silu(both[:, 0]) * both[:, 1]
        h = h + product(4 * layer + 3, gated)
    return product(4 * LAYERS, norm(h, 2 * LAYERS)).double()


def launch(way: Way, model: Model | None, programs: int) -> Launch:
    """The kernel, its arguments and options; without a model's memory, for compilation alone."""
    from ring_kernel import _ring_step
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    count = sum(call.tiles for call in schedule(way))
    if model is None:
        empty = torch.zeros(way.rows, 256, dtype=torch.bfloat16, device="cuda")
        wide, whole = empty.float(), empty.int()
        small = [empty] * 4 + [wide, empty, empty, wide, wide, whole, whole]
        arena = empty
    else:
        small = [
            model.h, model.qkv, model.attended, model.gated, model.logits, model.norms,
            caches(way.context), angles(way.context), model.partial, model.counters,
            model.diagnosis,
        ]  # fmt: skip
        arena = model.arena
    layout = gl.NVMMASharedLayout(0, 16, rank=2)
    desc = TensorDescriptor.from_tensor(arena, [way.rows, 256], layout)
    cycles = way.attention or 0
    sizes = (LAYERS, WIDTH, QKV, INNER, VOCAB, EPS)
    attention = 2 if way.context else int(way.attention is not None)
    rest = (
        way.slots, way.groups, attention, way.context // 8, way.waits, way.shared_x, way.atomic,
    )  # fmt: skip
    args = (desc, *small, POLLS, cycles, count, *sizes, *rest)
    options = {"num_warps": 8 // way.groups, "launch_cooperative_grid": True}
    return _ring_step, args, (programs,), options


def measure(names: Sequence[str]) -> None:
    """Says what becomes known of the ways, one model's memory for all."""
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    model = Model()

    def one(name: str) -> Iterator[Line]:
        if name == "floor":
            yield {"us": us_of([model.arena.sum], 2)}
        elif name == "torch.mv":
            yield {"us": us_of([model.multiply], 5)}
        else:
            yield _measured(WAYS[name], model, programs)

    say(names, one)


def _measured(way: Way, model: Model, programs: int) -> Line:
    """A way's errors before and after its replays, and its time; or why it was given up."""
    truth = reference(model, True, way.context)
    plain = float((reference(model, False, way.context) - truth).norm() / truth.norm())
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
    us = us_of([run], 5)
    if model.diagnosis[0]:
        return {"error": first, "failed": "gave up among the replays"}
    return {"us": us, "error": max(first, error()), "plain": plain}


def compile_only(name: str) -> None:
    """Compiles a way for the device into Triton's cache; launches nothing."""
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    print(f"compiled {name:30s} {used_by(launch(WAYS[name], None, programs))}", flush=True)


def table(lines: Sequence[Line]) -> None:
    """Prints what was measured: a step's time, the part of the floor, the error."""
    said: dict[str, Line] = {}
    for line in lines:
        said[str(line["name"])] = said.get(str(line["name"]), {}) | line
    floor = float(str(said.get("floor", {}).get("us", "nan")))
    print(f"\nweights {weight_bytes() / 1e9:.3f} GB")
    print(f"{'':32s}|  us/step | floor/us | error    (of separate kernels in bf16)")
    for name, line in said.items():
        us = float(str(line.get("us", "nan")))
        off = [f"{line[key]:.1e}" for key in ("error", "plain") if key in line]
        rest = " ".join([*off, str(line.get("failed", ""))])
        print(f"{name:32s}| {us:8.1f} | {floor / us:8.3f} | {rest}")


def weight_bytes() -> int:
    """Bytes of weights that a step reads."""
    layer = QKV * WIDTH + WIDTH * WIDTH + 3 * INNER * WIDTH
    return 2 * (LAYERS * layer + VOCAB * WIDTH)


def simulate_all(programs: int) -> None:
    """Simulates the schedule of each shape of ring."""
    shapes = {
        replace(
            way,
            attention=None if way.attention is None else 0,
            context=min(way.context, 1),
            waits=True,
            shared_x=False,
            atomic=False,
        ): None
        for way in WAYS.values()
    }
    for way in shapes:
        simulate(way, programs)
        print("simulated", *astuple(way)[:5], flush=True)


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
    import triton

    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    simulate_all(torch.cuda.get_device_properties(0).multi_processor_count)
    compile_all(__file__, list(WAYS), 90)
    table(measured(__file__, ["floor", "torch.mv", *WAYS]))


if __name__ == "__main__":
    main()
