"""The text of a product's branch: its tiles, chunk by chunk, for every sequence of the step.

Names carry the group of rows, ``a`` or ``b``, and the sequence's number: ``acc_a1``.
"""

from __future__ import annotations

from collections.abc import Sequence

from .reading import Product
from .tiling import Tiling

_HELD = 2  # chunks of x that stay in registers; more are read again for each tile, from the L1


def product_lines(
    form: Product, tiling: Tiling, wait: Sequence[str], arrive: Sequence[str]
) -> list[str]:
    """The branch of a form; ``wait`` and ``arrive`` stand before and behind its tiles."""
    count = -(-form.k // tiling.columns)
    held = range(count if count * tiling.batch <= _HELD else 0)
    sequences = range(tiling.batch)
    lines = []
    if form.norm:
        lines += [f"n_{i} = {_norm(form, str(i))}" for i in held]
    lines += wait
    lines += [f"x{s}_{i} = {_x(form, s, str(i))}" for s in sequences for i in held]
    if form.norm:
        for s in sequences:
            lines += _normed_lines(form, s, held, count)
    lines += ["for tile in range(first, tiles, G):"]
    lines += [f"    {line}" for line in _tile_lines(form, tiling, held, count)]
    return [*lines, *arrive]


def _x(form: Product, sequence: int, chunk: str) -> str:
    at = f"x_at + {2 * form.k * sequence}" if sequence else "x_at"
    return f"_x({at}, {chunk} * BLOCK_K, {form.k}, BLOCK_K)"


def _norm(form: Product, chunk: str) -> str:
    return f"_x(norm_at, {chunk} * BLOCK_K, {form.k}, BLOCK_K)"


def _normed_lines(form: Product, s: int, held: range, count: int) -> list[str]:
    """The scale of a sequence's norm; what is held is multiplied with the norm's weight."""
    if held:
        lines = [f"x{s}_{i} = x{s}_{i}.to(tl.float32)" for i in held]
        lines += ["squares = " + " + ".join(f"x{s}_{i} * x{s}_{i}" for i in held)]
        lines += [f"x{s}_{i} = x{s}_{i} * n_{i}.to(tl.float32)" for i in held]
    else:
        lines = [
            "squares = tl.zeros([BLOCK_K], tl.float32)",
            f"for chunk in tl.range({count}, num_stages=1):",
            f"    x = {_x(form, s, 'chunk')}.to(tl.float32)",
            "    squares += x * x",
        ]
    return [*lines, f"scale{s} = tl.rsqrt(tl.sum(squares, 0) / {form.k} + {form.eps!r})"]


def _tile_lines(form: Product, tiling: Tiling, held: range, count: int) -> list[str]:
    """One tile: every chunk of its two groups of rows, then what is made of the sums."""
    sequences, own = range(tiling.batch), form.tile_rows(tiling.rows)
    lines = [
        f"start = tl.minimum(tile * {own}, {form.out_rows - own})",
        "column = start + tl.arange(0, R)",
    ]
    lines += [
        f"acc_{g}{s} = tl.zeros([R, BLOCK_K // 8], tl.float32)" for s in sequences for g in "ab"
    ]
    if form.residual and tiling.batch == 1:  # asked for early; of more it would take registers
        lines += _residual_lines(form, 0)
    if held:
        for i in held:
            lines += _chunk_lines([f"x{s}_{i}.to(tl.float32)" for s in sequences])
    else:
        lines += [f"for chunk in tl.range({count}, num_stages=1):"]
        if form.norm:
            lines += [f"    norm = {_norm(form, 'chunk')}.to(tl.float32)"]
        times = " * norm" if form.norm else ""
        for s in sequences:
            lines += [f"    x{s} = {_x(form, s, 'chunk')}.to(tl.float32){times}"]
        lines += [f"    {line}" for line in _chunk_lines([f"x{s}" for s in sequences])]
    for s in sequences:
        if form.residual and tiling.batch > 1:
            lines += _residual_lines(form, s)
        lines += _end_lines(form, s)
    return lines


def _residual_lines(form: Product, s: int) -> list[str]:
    start = f"_bf16(residual_at) + {form.out_rows * s} + column"
    return [
        f"r_a = tl.load({start}).to(tl.float32)",
        f"r_b = tl.load({start} + R).to(tl.float32)",
    ]


def _chunk_lines(xs: Sequence[str]) -> list[str]:
    """A chunk of either group with each sequence's x; each place is filled again at once."""
    lines = []
    for g in "ab":
        lines += [
            f"acc_{g}{s} = _times(acc_{g}{s}, w_{g}, {x}, R, BLOCK_K)" for s, x in enumerate(xs)
        ]
        lines += [
            f"w_{g} = _chunk({g}_base, {g}_step, {g}_left, R, BLOCK_K, MASKED)",
            f"{g}_base, {g}_step, {g}_left = _entry(items, item + {4 + (g == 'b')})",
            "if DEVICE:",
            "    if AHEAD > 0:",
            f"        _ask(items, item + {2 + (g == 'b')} + AHEAD, R, BLOCK_K, MASKED)",
        ]
    return [*lines, "item += 2"]


def _end_lines(form: Product, s: int) -> list[str]:
    """What is made of a sequence's sums."""
    lines = [f"sum_a, sum_b = _both(acc_a{s}, acc_b{s})"]
    scale = f" * scale{s}" if form.norm else ""
    lines += [f"out_{g} = _rounded(sum_{g}{scale})" for g in "ab"]
    if form.gated:
        silu = "out_a / (1.0 + tl.exp(-out_a))"
        lines += [f"out_a = {f'_rounded({silu})' if form.stepwise else silu} * out_b"]
    if form.residual:
        lines += [f"out_{g} = r_{g} + out_{g}" for g in "ab"]
    lines += [f"out = _bf16(out_at) + {form.out_rows * s} + column"]
    lines += ["tl.store(out, out_a.to(tl.bfloat16))"]
    if not form.gated:
        lines += ["tl.store(out + R, out_b.to(tl.bfloat16))"]
    if form.chosen:
        lines += [f"best{s}, index{s} = _better(best{s}, index{s}, out_a, column)"]
        lines += [f"best{s}, index{s} = _better(best{s}, index{s}, out_b, column + R)"]
    return lines
