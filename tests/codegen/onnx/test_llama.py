"""A whole decoder over slots: prefill, chunks and decode, beside the interpreter."""

from __future__ import annotations

import pytest
import torch
from onnx import ModelProto

from onnx_running import Running, running

VOCAB, WIDTH, HIDDEN, LAYERS, ROOM = 50, 32, 48, 2, 24

LAYER = """\
    h{i}: f32[T, 32] = rms_norm(x{i}, param("{i}.norm"), eps=1e-05)
{project}
    q3_{i}: f32[T, {H}, {D}] = reshape(q{i}, shape=(T, {H}, {D}))
    k3_{i}: f32[T, {G}, {D}] = reshape(k{i}, shape=(T, {G}, {D}))
    v3_{i}: f32[T, {G}, {D}] = reshape(v{i}, shape=(T, {G}, {D}))
    qr{i}: f32[T, {H}, {D}] = rope(q3_{i}, cos_, sin_, layout="{layout}")
    kr{i}: f32[T, {G}, {D}] = rope(k3_{i}, cos_, sin_, layout="{layout}")
    a{i}: (f32[T, {H}, {D}], f32[B, {G}, L, {D}], f32[B, {G}, L, {D}],) = slot_attention(
        qr{i}, kr{i}, v3_{i}, k_cache_{i}, v_cache_{i}, seq_lens, scale=0.25{window})
    o{i}: f32[T, {H}, {D}] = item(a{i}, index=0)
    kn{i}: f32[B, {G}, L, {D}] = item(a{i}, index=1)
    vn{i}: f32[B, {G}, L, {D}] = item(a{i}, index=2)
    flat{i}: f32[T, {Q}] = reshape(o{i}, shape=(T, {Q}))
    p{i}: f32[T, 32] = linear(flat{i}, param("{i}.o"))
    r{i}: f32[T, 32] = add(x{i}, p{i})
    m{i}: f32[T, 32] = rms_norm(r{i}, param("{i}.norm2"), eps=1e-05)
    gu{i}: f32[T, 96] = linear(m{i}, param("{i}.gate_up"))
    g{i}: f32[T, 48] = slice(gu{i}, dim=1, start=0, stop=48)
    u{i}: f32[T, 48] = slice(gu{i}, dim=1, start=48, stop=96)
    w{i}: f32[T, 48] = gated(g{i}, u{i}, activation="silu")
    d{i}: f32[T, 32] = linear(w{i}, param("{i}.down"))
    x{n}: f32[T, 32] = add(r{i}, d{i})
"""
MERGED = """\
    qkv{i}: f32[T, {ALL}] = linear(h{i}, param("{i}.qkv"))
    q{i}: f32[T, {Q}] = slice(qkv{i}, dim=1, start=0, stop={Q})
    k{i}: f32[T, {K}] = slice(qkv{i}, dim=1, start={Q}, stop={QK})
    v{i}: f32[T, {K}] = slice(qkv{i}, dim=1, start={QK}, stop={ALL})"""
APART = """\
    q{i}: f32[T, {Q}] = linear(h{i}, param("{i}.q"))
    k{i}: f32[T, {K}] = linear(h{i}, param("{i}.k"))
    v{i}: f32[T, {K}] = linear(h{i}, param("{i}.v"))"""


def decoder(
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    rotary: int = 16,
    layout: str = "half",
    window: int | None = None,
    merged: bool = True,
    max_model_len: int | None = ROOM,
) -> Running:
    """A llama of two layers from text."""
    query, key = heads * dim, kv_heads * dim
    names = {
        "H": heads, "G": kv_heads, "D": dim, "Q": query, "K": key, "QK": query + key,
        "ALL": query + 2 * key, "layout": layout,
        "window": f", window={window}" if window else "",
    }  # fmt: skip
    shapes = {"embed": (VOCAB, WIDTH), "freq": (rotary // 2,), "norm": (WIDTH,)}
    body = ""
    for i in range(LAYERS):
        project = (MERGED if merged else APART).format(i=i, **names)
        body += LAYER.format(i=i, n=i + 1, project=project, **names)
        shapes |= {f"{i}.norm": (WIDTH,), f"{i}.norm2": (WIDTH,), f"{i}.o": (WIDTH, query)}
        shapes |= {f"{i}.gate_up": (2 * HIDDEN, WIDTH), f"{i}.down": (WIDTH, HIDDEN)}
        parts = {"qkv": query + 2 * key} if merged else {"q": query, "k": key, "v": key}
        shapes |= {f"{i}.{name}": (size, WIDTH) for name, size in parts.items()}
    caches = [f"{kind}_cache_{i}" for i in range(LAYERS) for kind in "kv"]
    declared = ", ".join(f"{name}: f32[B, {kv_heads}, L, {dim}]" for name in caches)
    returned = ", ".join(f'"{kind}_cache_{i}": {kind}n{i}' for i in range(LAYERS) for kind in "kv")
    text = (
        "def llama(token_ids: i64[T], positions: i64[T], seq_lens: i32[B], rows: i64[R], "
        f"{declared}):\n"
        '    x0: f32[T, 32] = embedding(param("embed"), token_ids)\n'
        "    at: f32[T] = cast(positions, dtype=f32)\n"
        "    column: f32[T, 1, 1] = reshape(at, shape=(T, 1, 1))\n"
        f'    turn: f32[T, 1, {rotary // 2}] = mul(column, param("freq"))\n'
        f"    cos_: f32[T, 1, {rotary // 2}] = cos(turn)\n"
        f"    sin_: f32[T, 1, {rotary // 2}] = sin(turn)\n"
        f"{body}"
        f"    picked: f32[R, 32] = index_select(x{LAYERS}, rows, dim=0)\n"
        '    last: f32[R, 32] = rms_norm(picked, param("norm"), eps=1e-05)\n'
        '    logits: f32[R, 50] = linear(last, param("embed"))\n'
        f'    return {{"logits": logits, {returned}}}\n'
    )
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(s, generator=generator) * 0.3 for n, s in shapes.items()}
    weights |= {n: 1 + w for n, w in weights.items() if "norm" in n}
    weights["freq"] = 1e4 ** -(torch.arange(rotary // 2) * 2.0 / rotary)
    return running(_declare(text, shapes), weights, max_model_len)


def _declare(text: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """Params stand on lines of their own, before their first use."""
    head, rest = text.split("\n", 1)
    lines = []
    for index, (name, shape) in enumerate(shapes.items()):
        sizes = ", ".join(map(str, shape))
        lines.append(f'    weight_{index}: f32[{sizes}] = param("{name}")')
        rest = rest.replace(f'param("{name}")', f"weight_{index}")
    return "\n".join([head, *lines, rest])


class Slots:
    """Three slots, and the interpreter's copy of them."""

    def __init__(self, engine: Running) -> None:
        self.engine = engine
        types = [node.type for node in engine.graph.inputs[4:]]
        kv_heads, dim = types[0].shape[1], types[0].shape[3]
        self.caches = [torch.full((3, kv_heads, ROOM, dim), torch.nan) for _ in types]
        self.wanted = [cache.clone() for cache in self.caches]
        self.lens = [0, 0, 0]

    def step(self, first: int, stop: int, new: int, rows: list[int]) -> None:
        """``new`` tokens for each of the slots from ``first`` to ``stop``."""
        from tilewright.ir.interpreter import interpret

        slots = range(first, stop)
        positions = [self.lens[s] + i for s in slots for i in range(new)]
        for slot in slots:
            self.lens[slot] += new
        given = [
            torch.randint(VOCAB, (len(positions),)),
            torch.tensor(positions),
            torch.tensor(self.lens[first:stop], dtype=torch.int32),
            torch.tensor(rows, dtype=torch.int64),
        ]
        found = self.engine.run([*given, *(cache[first:stop] for cache in self.caches)])
        wanted = interpret(
            self.engine.graph,
            [*given, *(cache[first:stop] for cache in self.wanted)],
            self.engine.weights,
        )
        torch.testing.assert_close(found["logits"], wanted[0], rtol=1e-4, atol=1e-4)
        for cache, new_value in zip(self.wanted, wanted[1:], strict=True):
            cache[first:stop] = new_value
        for cache, expected in zip(self.caches, self.wanted, strict=True):
            torch.testing.assert_close(cache, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


VARIANTS: dict[str, dict[str, object]] = {
    "llama": {},
    "no tables": {"max_model_len": None},
    "projections apart": {"merged": False},
    "interleaved": {"layout": "interleaved"},
    "partial": {"rotary": 8},
    "partial, in the kernel": {"dim": 32, "rotary": 16},
    "window": {"window": 4},
    "mha": {"kv_heads": 4},
    "mqa, dim 24": {"kv_heads": 1, "dim": 24, "rotary": 24},
    "dim 6": {"dim": 6, "rotary": 6},
}


@pytest.mark.quick
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_steps_of_a_decoder(variant: dict[str, object]) -> None:
    engine = decoder(**variant)  # type: ignore[arg-type]
    assert engine.whole, engine.lowered.notes
    slots = Slots(engine)
    for slot, new in ((0, 5), (1, 11), (2, 2)):
        slots.step(slot, slot + 1, new, [new - 1])
    slots.step(0, 3, 1, [0, 1, 2])
    slots.step(1, 3, 1, [1, 0])
    slots.step(0, 1, 4, [])  # a chunk of a prompt: nothing to sample
    slots.step(0, 3, 2, [1, 3, 5])


def op_types(engine: Running) -> list[str]:
    proto = ModelProto.FromString(engine.lowered.files["onnx/model_0.onnx"])
    return [node.op_type for node in proto.graph.node]


def test_the_kernel_takes_the_packed_projection_and_rotates_it() -> None:
    ops = op_types(decoder())
    assert "RotaryEmbedding" not in ops and "Cos" not in ops
    assert ops.count("Split") == LAYERS  # gate and up alone
    assert ops.count("SkipSimplifiedLayerNormalization") == 2 * LAYERS - 1
    outside = op_types(decoder(max_model_len=None))
    assert outside.count("RotaryEmbedding") == 2 * LAYERS and outside.count("Cos") == 1
    assert "GroupQueryAttention" not in op_types(decoder(dim=6, rotary=6))


def test_the_model_holds_no_weights() -> None:
    engine = decoder()
    assert list(engine.lowered.files) == ["onnx/model_0.onnx"]
    size = sum(w.nbytes for w in engine.weights.values())
    assert len(engine.lowered.files["onnx/model_0.onnx"]) < size / 2
    assert set(engine.program.calls[0].constants) == set(engine.weights)


def test_lowering_twice_gives_the_same_bytes() -> None:
    assert decoder().lowered.files == decoder().lowered.files


def test_tables_that_depend_on_more_than_positions_are_computed_outside() -> None:
    text = (
        "def g(positions: i64[T], lens: i32[B], x: f32[T, 2, 16], "
        "k: f32[B, 2, L, 16], v: f32[B, 2, L, 16]):\n"
        "    at: f32[T] = cast(positions, dtype=f32)\n"
        "    top: f32[1] = amax(at, dims=(0,), keepdim=True)\n"
        "    part: f32[T] = div(at, top)\n"
        "    column: f32[T, 1, 1] = reshape(part, shape=(T, 1, 1))\n"
        "    steps: f32[8] = iota(size=8, dtype=f32)\n"
        "    turn: f32[T, 1, 8] = mul(column, steps)\n"
        "    cos_: f32[T, 1, 8] = cos(turn)\n"
        "    sin_: f32[T, 1, 8] = sin(turn)\n"
        "    r: f32[T, 2, 16] = rope(x, cos_, sin_)\n"
        "    a: (f32[T, 2, 16], f32[B, 2, L, 16], f32[B, 2, L, 16],) = slot_attention(\n"
        "        r, r, x, k, v, lens, scale=0.25)\n"
        '    o: f32[T, 2, 16] = item(a, index=0)\n    return {"o": o}\n'
    )
    engine = running(text, max_model_len=32)
    assert engine.whole and "RotaryEmbedding" in op_types(engine)
    caches = [torch.randn(1, 2, 8, 16) for _ in range(2)]
    lens = torch.tensor([6], dtype=torch.int32)
    engine.check([torch.tensor([3, 4, 5]), lens, torch.randn(3, 2, 16), *caches])
