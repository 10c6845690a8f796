"""One launch for a decode step, its weights by TMA through a ring in shared memory: a trial.

    python benchmarks/gpu/trial_ring.py [1b,8b,smollm2]     # on the GPU; about half a minute

Batch 1, bfloat16, the shapes of Llama-3.2-1B, Llama-3-8B and SmolLM2-135M with random weights:
norms, products, gates, residuals, rope and attention to a cache without pages; neither the
embedding nor the choice of a token. Each way (ring_kernel.py) is compared with float64, beside
separate kernels in bfloat16, several steps in a row; then timed by replays of a CUDA graph; again
compared after that. Beside them: the products alone by torch.mv, and the time in which a sum reads
as many bytes. All are compiled side by side; then one process measures them in turn, and is
replaced where a kernel hangs (20 s) or breaks the device. Waits that are too long end by
themselves. The table comes last; ways with times tell, of each kind of call, the median nanoseconds
from meeting it to having what it reads, and from there to its end.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from trials import Launch, Line, compile_all, measured, say, us_of, used_by

EPS = 1e-5
LOOKS = 1_000_000  # of a wait, until it is given up
TILE = 16384  # weights: 32 KB
CALLS = ("qkv", "attention", "o", "gate, up", "down")


@dataclass(frozen=True)
class Sizes:
    """A model: layers, columns of the residual stream and of the gated product, rows of the last
    product, query and KV heads, columns of a head."""

    layers: int
    width: int
    inner: int
    vocab: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def qkv(self) -> int:
        """Rows of the first product of a layer."""
        return (self.heads + 2 * self.kv_heads) * self.dim

    @property
    def products(self) -> list[tuple[int, int]]:
        """Rows and columns of all weights, in order."""
        one = [(self.qkv, self.width), (self.width, self.width)]
        one += [(2 * self.inner, self.width), (self.width, self.inner)]
        return [*(one * self.layers), (self.vocab, self.width)]

    @property
    def unit(self) -> int:
        """Columns of a row of the arena, of which each row of weights has a whole number."""
        return 256 if self.width % 256 == 0 else 64

    def pitch(self, k: int) -> int:
        """Columns between rows of K weights in the ring."""
        return 1 << (k - 1).bit_length()

    def box(self, k: int) -> int:
        """Rows of the arena that one copy brings of rows of K weights."""
        pitch = self.pitch(k)
        return (TILE // 2 if k == pitch or pitch >= TILE else pitch) // self.unit


MODELS = {
    "1b": Sizes(16, 2048, 8192, 128256, 32, 8, 64),
    "8b": Sizes(32, 4096, 14336, 128256, 32, 8, 128),
    "smollm2": Sizes(30, 576, 1536, 49152, 9, 3, 64),
}


@dataclass(frozen=True)
class Way:
    """A way to run the step.

    Attributes:
        model: of `MODELS`.
        context: tokens, the newest included; 0 leaves attention out.
        slots: tiles of the ring.
        cap: halves of tiles that are under way at once.
        waits: whether calls wait for those before; without, results are wrong.
        timed: whether times are noted.
        warps: that multiply.
    """

    model: str = "1b"
    context: int = 512
    slots: int = 6
    cap: int = 2
    waits: bool = True
    timed: bool = False
    warps: int = 4


WAYS = {
    "1b": Way(),
    "1b, context 1024": Way(context=1024),
    "1b, no attention": Way(context=0),
    "1b, 3 halves": Way(cap=3),
    "1b, no waits": Way(waits=False),
    "1b, times": Way(timed=True),
    "8b": Way("8b"),
    "8b, no attention": Way("8b", context=0),
    "8b, 3 halves": Way("8b", cap=3),
    "8b, no waits": Way("8b", waits=False),
    "8b, times": Way("8b", timed=True),
    "smollm2": Way("smollm2"),
    "smollm2, no attention": Way("smollm2", context=0),
    "smollm2, 4 halves": Way("smollm2", cap=4),
    "smollm2, no waits": Way("smollm2", waits=False),
    "smollm2, times": Way("smollm2", timed=True),
}


def random_from(seed: int) -> torch.Generator:
    """Numbers that are the same each time."""
    return torch.Generator("cuda").manual_seed(seed)


class Model:
    """Weights in an arena, and a step's memory.

    Attributes:
        arena: bf16 [units, unit], the weights of all products one behind the other, of gate and up
            first all of the one; norms: bf16 [2 * layers + 1, width]; start: bf16 [width], the row
            of the embedding; values, partials, counters: see ring_kernel.py.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, numbers = sizes, random_from(0)
        total = sum(n * k for n, k in sizes.products)
        self.arena = torch.empty(
            total // sizes.unit, sizes.unit, dtype=torch.bfloat16, device="cuda"
        )
        self.weights: list[torch.Tensor] = []
        begin = 0
        for n, k in sizes.products:
            weight = self.arena.view(-1)[begin : begin + n * k].view(n, k)
            weight.normal_(0, k**-0.5, generator=numbers)
            self.weights.append(weight)
            begin += n * k
        shape = (2 * sizes.layers + 1, sizes.width)
        self.norms = (1 + 0.1 * torch.randn(shape, generator=numbers, device="cuda")).bfloat16()
        self.start = torch.randn(sizes.width, generator=numbers, device="cuda").bfloat16()
        layer = sizes.qkv + 3 * sizes.width + sizes.inner
        self.values = torch.empty(2, sizes.layers, layer, dtype=torch.bfloat16, device="cuda")
        self.partials = torch.empty(4, sizes.kv_heads, 16, 4 * sizes.dim + 4, device="cuda")
        self.logits = torch.empty(sizes.vocab, device="cuda")
        self.times = torch.zeros(132, 5 * sizes.layers + 1, 3, dtype=torch.int32, device="cuda")
        self.counters = torch.zeros(32, dtype=torch.int32, device="cuda")
        self.diagnosis = torch.zeros(4, dtype=torch.int32, device="cuda")

    def reset(self) -> None:
        """A new beginning, after whatever happened: nothing is there yet."""
        self.values.view(torch.int16).fill_(-1)
        self.partials.view(torch.int32).fill_(-1)
        self.counters.zero_()
        self.diagnosis.zero_()

    def multiply(self) -> None:
        """The products alone, by separate kernels."""
        for weight in self.weights:
            torch.mv(weight, self.values[0, 0, : weight.shape[1]])


@cache
def model(name: str) -> Model:
    """One of `MODELS`; the one before has to be forgotten first (``model.cache_clear``)."""
    return Model(MODELS[name])


def caches(sizes: Sizes, context: int) -> torch.Tensor:
    """Keys, after rope, and values: bf16 [layers, 2, context, kv_heads, dim]."""
    shape = (sizes.layers, 2, max(context, 1), sizes.kv_heads, sizes.dim)
    return torch.randn(shape, generator=random_from(1), device="cuda").bfloat16()


def angles(sizes: Sizes, context: int) -> torch.Tensor:
    """Cosine and sine at the newest token: f32 [2, dim / 2], of bfloat16's precision."""
    exponent = torch.arange(sizes.dim // 2, device="cuda") * (-2 / sizes.dim)
    angle = max(context - 1, 0) * 500000.0**exponent
    return torch.stack((angle.cos(), angle.sin())).bfloat16().float()


def attention(sizes: Sizes, past: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """Attention's result [width] in qkv's precision, of which softmax in bf16 is f32's, to keys and
    values [2, context, kv_heads, dim], the newest of which are not read."""
    context = past.shape[1]
    cos, sin = (torch.cat((x, x)).to(qkv.dtype) for x in angles(sizes, context))

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    parts = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    q, k, v = qkv.view(-1, sizes.dim).split(parts)
    before = past[:, : context - 1].to(qkv.dtype)
    keys, values = torch.cat((before[0], turned(k)[None])), torch.cat((before[1], v[None]))
    grouped = turned(q).view(sizes.kv_heads, -1, sizes.dim)
    scores = torch.einsum("gid,sgd->gis", grouped, keys)
    wide = scores.to(torch.promote_types(qkv.dtype, torch.float32)) * sizes.dim**-0.5
    return torch.einsum("gis,sgd->gid", wide.softmax(-1).to(qkv.dtype), values).reshape(-1)


def reference(made: Model, past: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Logits f64 [vocab], computed in float64, or rounded where a model in bfloat16 rounds."""
    sizes, exact = made.sizes, kind is torch.float64
    h = made.start.to(kind)

    def norm(x: torch.Tensor, which: int) -> torch.Tensor:
        wide = x if exact else x.float()
        scaled = wide * torch.rsqrt(wide.square().mean() + EPS)
        return scaled.to(kind) * made.norms[which].to(kind)

    def product(index: int, x: torch.Tensor) -> torch.Tensor:
        parts = made.weights[index].split(16384)
        return torch.cat([torch.mv(part.to(kind), x) for part in parts])

    for layer in range(sizes.layers):
        qkv = product(4 * layer, norm(h, 2 * layer))
        seen = past.shape[2] > 1
        attended = attention(sizes, past[layer], qkv) if seen else qkv[: sizes.width]
        h = h + product(4 * layer + 1, attended)
        gate, up = product(4 * layer + 2, norm(h, 2 * layer + 1)).chunk(2)
        h = h + product(4 * layer + 3, torch.nn.functional.silu(gate) * up)
    return product(4 * sizes.layers, norm(h, 2 * sizes.layers)).double()


def launch(way: Way, made: Model | None, past: torch.Tensor | None, programs: int) -> Launch:
    """The kernel, its arguments and options; without a model, for compilation alone."""
    from ring_kernel import _ring_step
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    sizes = MODELS[way.model]
    if made is None or past is None:
        arena = torch.zeros(TILE // sizes.unit, sizes.unit, dtype=torch.bfloat16, device="cuda")
        wide, whole = arena.float(), arena.int()
        rest = [arena, arena, wide, arena, arena, wide, wide, whole, whole, whole]
    else:
        arena = made.arena
        rest = [
            made.start, made.values, made.logits, made.norms, past, angles(sizes, way.context),
            made.partials, made.times, made.counters, made.diagnosis,
        ]  # fmt: skip
    layout = gl.NVMMASharedLayout(0, 16, rank=2)
    descriptors = [
        TensorDescriptor.from_tensor(arena, [sizes.box(k), sizes.unit], layout)
        for k in (sizes.width, sizes.inner)
    ]
    numbers = (sizes.layers, sizes.width, sizes.inner, sizes.vocab, sizes.heads)
    numbers += (sizes.kv_heads, sizes.dim, sizes.pitch(sizes.width), sizes.pitch(sizes.inner), EPS)
    ways = (way.slots, TILE // sizes.unit, way.cap, way.context // 16, way.waits, way.timed)
    args = (*descriptors, *rest, LOOKS, *numbers, *ways)
    return _ring_step, args, (programs,), {"num_warps": way.warps, "launch_cooperative_grid": True}


def measure(names: Sequence[str]) -> None:
    """Says what becomes known of the ways, one model's memory for all of its ways."""

    def one(name: str) -> Iterator[Line]:
        which, _, what = name.partition(" ")
        which = which.rstrip(",")
        if what in ("floor", "torch.mv"):
            model.cache_clear()
            made = model(which)
            made.reset()
            calls = [made.arena.sum] if what == "floor" else [made.multiply]
            yield {"us": us_of(calls, 3)}
        else:
            yield _measured(WAYS[name], model(which))

    say(names, one)


@cache
def _truths(which: str, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float64, and in bfloat16's roundings."""
    past = caches(MODELS[which], context)
    made = model(which)
    exact, plain = (reference(made, past, kind) for kind in (torch.float64, torch.bfloat16))
    return exact, plain


def _measured(way: Way, made: Model) -> Line:
    """A way's errors before and after its replays, and its time; or why it was given up."""
    truth, rounded = _truths(way.model, way.context)
    plain = float((rounded - truth).norm() / truth.norm())
    past = caches(made.sizes, way.context)
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    kernel, args, grid, options = launch(way, made, past, programs)

    def run() -> None:
        kernel[grid](*args, **options)

    def error() -> float:
        made.logits.fill_(float("nan"))
        run()
        torch.cuda.synchronize()
        off = float((made.logits.double() - truth).norm() / truth.norm())
        return off if off == off else 1e9

    made.reset()
    first = max(error() for _ in range(4))
    if made.diagnosis[0]:
        return {"failed": f"gave up in call {made.diagnosis[1]}"}
    if way.waits and first > 1.5 * plain + 1e-3:
        return {"error": first, "failed": f"wrong; separate kernels in bf16 are off by {plain:.1e}"}
    us = us_of([run], 5)
    if made.diagnosis[0]:
        return {"error": first, "failed": "gave up among the replays"}
    line: Line = {"us": us, "error": max(first, error()), "plain": plain}
    if way.timed:
        line["failed"] = _times(made, programs)
    return line


def _times(made: Model, programs: int) -> str:
    """Of each kind of call, ns to what it reads and from there; of a layer, ns of all."""
    layers, kinds = made.sizes.layers, len(CALLS)
    marks = made.times.to(torch.int64)[:programs]
    marks = marks - marks[:, :, 0].min()
    said = []
    for kind, name in enumerate((*CALLS, "head")):
        part = marks[:, kind : kinds * layers : kinds] if kind < kinds else marks[:, -1:]
        flat = [mark for row in part.tolist() for mark in row]
        took = [(b - a, c - b) for a, b, c in flat if a < b <= c]
        if took:
            waits, works = zip(*took, strict=True)
            said.append(f"{name} {statistics.median(waits):.0f}+{statistics.median(works):.0f}")
    ends = marks[:, :, 2].max(0).values.tolist()
    took_layers = [b - a for a, b in zip(ends[:-1:kinds], ends[kinds::kinds], strict=False)]
    return f"{'; '.join(said)}; a layer {statistics.median(took_layers):.0f}"


def table(lines: Sequence[Line]) -> None:
    """Prints what was measured: a step's time, the part of the floor, the error."""
    said: dict[str, Line] = {}
    for line in lines:
        said[str(line["name"])] = said.get(str(line["name"]), {}) | line
    print(f"{'':26s}|  us/step | floor/us | error    (of separate kernels in bf16)")
    for name, line in said.items():
        which = name.partition(" ")[0].rstrip(",")
        floor = float(str(said.get(f"{which} floor", {}).get("us", "nan")))
        us = float(str(line.get("us", "nan")))
        off = [f"{line[key]:.1e}" for key in ("error", "plain") if key in line]
        rest = " ".join([*off, str(line.get("failed", ""))])
        print(f"{name:26s}| {us:8.1f} | {floor / us:8.3f} | {rest}")


def main() -> None:
    """Compiles side by side, measures in turn, prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="?", default=",".join(MODELS))
    parser.add_argument("--measure", nargs="*")
    parser.add_argument("--compile")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    if options.compile:
        programs = torch.cuda.get_device_properties(0).multi_processor_count
        used = used_by(launch(WAYS[options.compile], None, None, programs))
        print(f"compiled {options.compile:24s} {used}", flush=True)
        return
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for which, sizes in MODELS.items():
        weights = 2 * sum(n * k for n, k in sizes.products)
        print(f"{which}: weights {weights / 1e9:.3f} GB", flush=True)
    chosen = options.models.split(",")
    ways = {name: way for name, way in WAYS.items() if way.model in chosen}
    compile_all(__file__, list(ways), 90)
    order = []
    for which in chosen:
        order += [f"{which} floor", f"{which} torch.mv"]
        order += [name for name, way in ways.items() if way.model == which]
    table(measured(__file__, order))


if __name__ == "__main__":
    main()
