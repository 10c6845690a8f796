"""The text of a persistent decode kernel: one branch a form of call, in a loop over the table.

A call's row of ``calls`` (i64) holds its form, tiles, the program that takes its first tile, how
many arrivals the call before it ends with, and addresses (table.py writes them).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..triton.source import HEADER, jit_text
from . import kernel
from .reading import Attention, Product, Shape

FIELDS = 16
"""Cells of a call's row."""

_FUNCTIONS = (
    *("_entry", "_chunk", "_ask", "_times", "_both", "_x", "_bf16", "_rounded", "_time", "_wait"),
    *(
        "_arrive",
        "_begin",
        "_step",
        "_turned",
        "_attend",
        "_merge",
        "_better",
        "_most",
        "_choose",
        "_spoil",
    ),
)
PARAMETERS = {
    "calls": "i64",
    "items": "i64",
    "counters": "i32",
    "diagnosis": "i32",
    "timeline": "i64",
    "token_ids": "i64",
    "positions": "i64",
    "seq_lens": "i32",
    "slot_mapping": "i64",
    "block_tables": "i32",
    "inv_freq": "f32",
    "cos": "f32",
    "sin": "f32",
    "partial_acc": "f32",
    "partial_max": "f32",
    "partial_sum": "f32",
    "bests": "f32",
    "indices": "i32",
    "tokens": "i64",
}
"""The kernel's pointers by name, and what they point to; behind them comes ``limit``, the polls
of a wait. The timeline is there where times are noted."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel is cut.

    Attributes:
        rows: of a chunk; a tile of a product has twice as many rows of the weight.
        num_warps: of a program; a chunk has 256 columns for each.
        ahead: chunks that are asked into L2 beyond the two that are in registers.
        splits: programs that share the keys of one KV head, a power of two.
        block_n: keys of a tile of attention.
        programs: of the launch; all are resident at once.
    """

    rows: int = 8
    num_warps: int = 8
    ahead: int = 4
    splits: int = 16
    block_n: int = 64
    programs: int = 132

    @property
    def columns(self) -> int:
        """Of a chunk: a thread has 8 of each row."""
        return 256 * self.num_warps


def kernel_text(shape: Shape, tiling: Tiling, timed: bool = False) -> str:
    """The source of the kernel ``decode`` for a model of this shape; ``timed`` notes times."""
    branches: list[str] = []
    for index, form in enumerate(shape.forms):
        branches.append(f"        {'el' if index else ''}if kind == {index}:")
        if isinstance(form, Product):
            lines = _product_lines(form, shape, tiling)
        elif isinstance(form, Attention):
            lines = _attention_lines(form, shape)
        else:
            lines = _begin_lines(shape)
        branches += [f"            {line}" for line in lines]
    body = "\n".join((_head(shape, tiling, timed), *branches, _TAIL.format(FIELDS=FIELDS)))
    if not timed:
        body = "".join(line for line in body.splitlines(True) if "_time(" not in line)
    return "".join((HEADER, jit_text(kernel, _FUNCTIONS), body))


def constexprs(shape: Shape, tiling: Tiling, device: bool) -> dict[str, int | bool]:
    """Value of each constexpr parameter."""
    return {
        "ITEMS": 1,
        "CALLS": len(shape.calls),
        "G": tiling.programs,
        "G_BLOCK": 1 << (tiling.programs - 1).bit_length(),
        "R": tiling.rows,
        "BLOCK_K": tiling.columns,
        "AHEAD": tiling.ahead,
        "SPLITS": tiling.splits,
        "BLOCK_N": tiling.block_n,
        "MASKED": any(form.k % tiling.columns for form in shape.products),
        "DEVICE": device,
    }


def _head(shape: Shape, tiling: Tiling, timed: bool) -> str:
    names = ", ".join(name for name in (*PARAMETERS, "limit") if name != "timeline" or timed)
    constants = ", ".join(f"{name}: tl.constexpr" for name in constexprs(shape, tiling, True))
    return f"""

@triton.jit
def decode({names}, {constants}):
    cta = tl.program_id(0)
    generation = tl.load(counters, volatile=True)
    item = cta * ITEMS
    a_base, a_step, a_left = _entry(items, item)
    b_base, b_step, b_left = _entry(items, item + 1)
    w_a = _chunk(a_base, a_step, a_left, R, BLOCK_K, MASKED)
    w_b = _chunk(b_base, b_step, b_left, R, BLOCK_K, MASKED)
    if DEVICE:
        for early in range(AHEAD):
            _ask(items, item + 2 + early, R, BLOCK_K, MASKED)
    a_base, a_step, a_left = _entry(items, item + 2)
    b_base, b_step, b_left = _entry(items, item + 3)
    best = tl.full([R], float("-inf"), tl.float32)
    index = tl.zeros([R], tl.int32)
    for call in range(CALLS):
        row = calls + call * {FIELDS}
        kind = tl.load(row)
        tiles = tl.load(row + 1).to(tl.int32)
        x_at, norm_at, residual_at = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
        out_at, keys_at, values_at = tl.load(row + 7), tl.load(row + 8), tl.load(row + 9)
        first = cta - tl.load(row + 2).to(tl.int32)
        first = tl.where(first < 0, first + G, first)
        before = counters + 32 + 32 * call
        target = (generation + 1) * tl.load(row + 3).to(tl.int32)
        _time(timeline, call, 0, CALLS, DEVICE)"""


_TAIL = """        _time(timeline, call, 2, CALLS, DEVICE)
    top, token = _most(best, index)
    tl.store(bests + cta, top)
    tl.store(indices + cta, token)
    tl.debug_barrier()
    done = tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu")
    if done + 1 == (generation + 1) * G:
        _choose(bests, indices, tokens, G, G_BLOCK)
        _spoil(diagnosis, _bf16(tl.load(calls + (CALLS - 1) * {FIELDS} + 7)))
        tl.store(counters, generation + 1)
"""

_WAIT = (
    "if first < tiles:",
    "    limit = _wait(before, target, limit, diagnosis, call)",
    "_time(timeline, call, 1, CALLS, DEVICE)",
)
_ARRIVE = ("if first < tiles:", "    _arrive(before + 32)")


def _begin_lines(shape: Shape) -> list[str]:
    block = 1 << (shape.width - 1).bit_length()
    half = shape.head_dim // 2
    block_half = 1 << (half - 1).bit_length()
    return [
        "for tile in range(first, tiles, G):",
        "    _begin(tile, token_ids, positions, x_at, inv_freq, out_at,"
        f" cos, sin, {shape.width}, {half}, {block}, {block_half})",
        *_ARRIVE,
    ]


def _attention_lines(form: Attention, shape: Shape) -> list[str]:
    group = form.heads // form.kv_heads
    block_m = max(16, 1 << (group - 1).bit_length())
    block_c = 1 << (group * form.head_dim - 1).bit_length()
    sizes = f"{form.heads}, {form.kv_heads}, {form.head_dim}"
    return [
        *_WAIT,
        "length = tl.load(seq_lens)",
        "slot = tl.load(slot_mapping)",
        "for tile in range(first, tiles, G):",
        "    _attend(tile, _bf16(x_at), _bf16(keys_at),"
        " _bf16(values_at), cos, sin, block_tables, slot, length, partial_acc,"
        f" partial_max, partial_sum, {sizes}, {form.page_size}, {form.factor!r},"
        f" {form.stepwise}, SPLITS, {block_m}, BLOCK_N)",
        "    tl.debug_barrier()",
        f"    kv_head = tile % {form.kv_heads}",
        "    met = tl.atomic_add(counters + 32 * (CALLS + 1)"
        f' + call * {form.kv_heads} + kv_head + 32, 1, sem="acq_rel", scope="gpu")',
        "    if met + 1 == (generation + 1) * SPLITS:",
        "        _merge(kv_head, length, _bf16(out_at), partial_acc, partial_max,"
        f" partial_sum, {sizes}, SPLITS, {block_c}, BLOCK_N)",
        "        _arrive(before + 32)",
    ]


_HELD = 2  # chunks of x that stay in registers; more are read again for each tile, from the L1


def _product_lines(form: Product, shape: Shape, tiling: Tiling) -> list[str]:
    count = -(-form.k // tiling.columns)
    chunks = range(count) if count <= _HELD else range(0)
    sizes = f"{form.k}, BLOCK_K"
    lines = []
    if form.norm:
        lines += [f"n_{i} = _x(norm_at, {i} * BLOCK_K, {sizes})" for i in chunks]
    lines += _WAIT
    lines += [f"x_{i} = _x(x_at, {i} * BLOCK_K, {sizes})" for i in chunks]
    if form.norm:
        lines += [f"x_{i} = x_{i}.to(tl.float32)" for i in chunks]
        squares = " + ".join(f"x_{i} * x_{i}" for i in chunks)
        lines += [f"squares = {squares}"] if chunks else _squares_lines(count, sizes)
        lines += [f"x_{i} = x_{i} * n_{i}.to(tl.float32)" for i in chunks]
        lines += [f"scale = tl.rsqrt(tl.sum(squares, 0) / {form.k} + {form.eps!r})"]
    lines += ["for tile in range(first, tiles, G):"]
    lines += [f"    {line}" for line in _tile_lines(form, count, tiling)]
    return [*lines, *_ARRIVE]


def _squares_lines(count: int, sizes: str) -> list[str]:
    """The squares of an x that is not held."""
    return [
        "squares = tl.zeros([BLOCK_K], tl.float32)",
        f"for chunk in tl.range({count}, num_stages=1):",
        f"    x = _x(x_at, chunk * BLOCK_K, {sizes}).to(tl.float32)",
        "    squares += x * x",
    ]


def _chunk_lines(x: str) -> list[str]:
    """A chunk of either group with x; each place is filled again at once."""
    lines = []
    for g in "ab":
        lines += [
            f"acc_{g} = _times(acc_{g}, w_{g}, {x}, R, BLOCK_K)",
            f"w_{g} = _chunk({g}_base, {g}_step, {g}_left, R, BLOCK_K, MASKED)",
            f"{g}_base, {g}_step, {g}_left = _entry(items, item + {4 + (g == 'b')})",
            "if DEVICE:",
            "    if AHEAD > 0:",
            f"        _ask(items, item + {2 + (g == 'b')} + AHEAD, R, BLOCK_K, MASKED)",
        ]
    return [*lines, "item += 2"]


def _tile_lines(form: Product, count: int, tiling: Tiling) -> list[str]:
    """One tile: every chunk of its two groups of rows, then what is made of the sums."""
    lines = [
        f"start = tl.minimum(tile * {form.tile_rows(tiling.rows)},"
        f" {form.out_rows - form.tile_rows(tiling.rows)})",
        "column = start + tl.arange(0, R)",
    ]
    if form.residual:
        lines += ["r_a = tl.load(_bf16(residual_at) + column).to(tl.float32)"]
        lines += ["r_b = tl.load(_bf16(residual_at) + column + R).to(tl.float32)"]
    lines += [f"acc_{g} = tl.zeros([R, BLOCK_K // 8], tl.float32)" for g in "ab"]
    if count <= _HELD:
        for i in range(count):
            lines += _chunk_lines(f"x_{i}.to(tl.float32)")
    else:
        sizes = f"{form.k}, BLOCK_K"
        lines += [f"for chunk in tl.range({count}, num_stages=1):"]
        lines += [f"    x = _x(x_at, chunk * BLOCK_K, {sizes}).to(tl.float32)"]
        if form.norm:
            norm = f"_x(norm_at, chunk * BLOCK_K, {sizes}).to(tl.float32)"
            lines += [f"    x = x * {norm}"]
        lines += [f"    {line}" for line in _chunk_lines("x")]
    lines += ["sum_a, sum_b = _both(acc_a, acc_b)"]
    scale = " * scale" if form.norm else ""
    lines += [f"out_{g} = _rounded(sum_{g}{scale})" for g in "ab"]
    if form.gated:
        silu = "out_a / (1.0 + tl.exp(-out_a))"
        lines += [f"out_a = {f'_rounded({silu})' if form.stepwise else silu} * out_b"]
    if form.residual:
        lines += [f"out_{g} = r_{g} + out_{g}" for g in "ab"]
    lines += ["out = _bf16(out_at) + column"]
    lines += ["tl.store(out, out_a.to(tl.bfloat16))"]
    if not form.gated:
        lines += ["tl.store(out + R, out_b.to(tl.bfloat16))"]
    if form.chosen:
        lines += ["best, index = _better(best, index, out_a, column)"]
        lines += ["best, index = _better(best, index, out_b, column + R)"]
    return lines
