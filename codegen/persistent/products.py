"""The text of a product's branch: its tiles, chunk by chunk, for every sequence of the step.

Names carry the group of rows, ``a`` or ``b``, and the sequence's number: ``acc_a1``.

Where the weight is codes and x is rounded too, each program rounds the rows itself, which lie in
L2: the same codes as those of a launch that rounds for all. What is held is rounded once a call,
what is read again once a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

from .cut import Cut
from .reading import Product

_HELD = 2  # chunks of x that stay in registers; more are read again for each tile, from the L1


def product_lines(form: Product, cut: Cut, wait: Sequence[str], arrive: Sequence[str]) -> list[str]:
    """The branch of a form; ``wait`` and ``arrive`` stand before and behind its tiles."""
    batch, count = cut.tiling.batch, cut.chunks(form)
    held = range(count if count * batch <= _HELD else 0)
    lines = []
    if form.norm:
        lines += [f"n_{i} = {_norm(form, cut, str(i))}" for i in held]
    lines += wait
    lines += [f"x{s}_{i} = {_x(form, cut, s, str(i))}" for s in range(batch) for i in held]
    for s in range(batch):
        if form.norm:
            lines += _normed_lines(form, cut, s, held)
        if form.rounds:
            lines += _coded_lines(form, cut, s, held)
    lines += ["for tile in range(first, tiles, G):"]
    lines += [f"    {line}" for line in _tile_lines(form, cut, held)]
    return [*lines, *arrive]


def _x(form: Product, cut: Cut, sequence: int, chunk: str) -> str:
    at = f"x_at + {2 * form.k * sequence}" if sequence else "x_at"
    block_k = cut.block_k(form)
    return f"_x({at}, {chunk} * {block_k}, {form.k}, {block_k})"


def _norm(form: Product, cut: Cut, chunk: str) -> str:
    block_k = cut.block_k(form)
    return f"_x(norm_at, {chunk} * {block_k}, {form.k}, {block_k})"


def _normed_lines(form: Product, cut: Cut, s: int, held: range) -> list[str]:
    """The scale of a sequence's norm; what is held is multiplied with the norm's weight."""
    if held:
        lines = [f"x{s}_{i} = x{s}_{i}.to(tl.float32)" for i in held]
        lines += ["squares = " + " + ".join(f"x{s}_{i} * x{s}_{i}" for i in held)]
        if not form.rounds:
            lines += [f"x{s}_{i} = x{s}_{i} * n_{i}.to(tl.float32)" for i in held]
    else:
        lines = [
            f"squares = tl.zeros([{cut.block_k(form)}], tl.float32)",
            f"for chunk in tl.range({cut.chunks(form)}, num_stages=1):",
            f"    x = {_x(form, cut, s, 'chunk')}.to(tl.float32)",
            "    squares += x * x",
        ]
    return [*lines, f"scale{s} = tl.rsqrt(tl.sum(squares, 0) / {form.k} + {form.eps!r})"]


def _coded_lines(form: Product, cut: Cut, s: int, held: range) -> list[str]:
    """The scale of a sequence's codes, where all of its row share one; what is held becomes what
    its codes stand for.
    """
    lines = []
    for i in held:
        norm = f"n_{i}.to(tl.float32)"
        lines += [f"x{s}_{i} = {_normed(form, s, f'x{s}_{i}.to(tl.float32)', norm)}"]
    if form.row_scaled:
        if held:
            most = [f"tl.max(_size(x{s}_{i}), 0)" for i in held]
            largest = f"tl.maximum({', '.join(most)})" if len(most) > 1 else most[0]
        else:
            lines += [
                f"sizes = tl.zeros([{cut.block_k(form)}], tl.float32)",
                f"for chunk in tl.range({cut.chunks(form)}, num_stages=1):",
                f"    x = {_normed_chunk(form, cut, s)}",
                "    sizes = tl.maximum(sizes, _size(x))",
            ]
            largest = "tl.max(sizes, 0)"
        lines += [f"step{s} = _code_scale({largest})"]
    return [*lines, *(f"x{s}_{i} = {_values(form, s, f'x{s}_{i}')}" for i in held)]


def _normed(form: Product, s: int, x: str, norm: str) -> str:
    """x as the rounding takes it."""
    return f"_normed({x}, {norm}, scale{s}, {form.norm_stepwise})" if form.norm else x


def _normed_chunk(form: Product, cut: Cut, s: int) -> str:
    norm = f"{_norm(form, cut, 'chunk')}.to(tl.float32)"
    return _normed(form, s, f"{_x(form, cut, s, 'chunk')}.to(tl.float32)", norm)


def _values(form: Product, s: int, x: str) -> str:
    """What codes of x stand for, those of whole rows before they are scaled."""
    if form.row_scaled:
        return f"_code_values({x}, step{s}, DEVICE)"
    return f"_group_values({x}, GROUP, DEVICE)"


def _tile_lines(form: Product, cut: Cut, held: range) -> list[str]:
    """One tile: every chunk of its two groups of rows, then what is made of the sums."""
    tiling = cut.tiling
    sequences, own = range(tiling.batch), form.tile_rows(tiling.rows)
    width = "BLOCK_K // 8" if cut.codes is None else "WORDS // LANE"
    lines = [
        f"start = tl.minimum(tile * {own}, {form.out_rows - own})",
        "column = start + tl.arange(0, R)",
    ]
    if form.row_scaled:  # asked for early: nobody else reads them
        second = form.n // 2 if form.gated else "R"
        lines += ["scales = scale_at.to(tl.pointer_type(tl.float32)) + column"]
        lines += ["by_a = tl.load(scales)", f"by_b = tl.load(scales + {second})"]
    lines += [f"acc_{g}{s} = tl.zeros([R, {width}], tl.float32)" for s in sequences for g in "ab"]
    if form.residual and tiling.batch == 1:  # asked for early; of more it would take registers
        lines += _residual_lines(form, 0)
    if held:
        for i in held:
            lines += _chunk_lines(form, cut, [f"x{s}_{i}.to(tl.float32)" for s in sequences])
    else:
        lines += [f"for chunk in tl.range({cut.chunks(form)}, num_stages=1):"]
        lines += [f"    {line}" for line in _read_again(form, cut)]
        lines += [f"    {line}" for line in _chunk_lines(form, cut, [f"x{s}" for s in sequences])]
    for s in sequences:
        if form.residual and tiling.batch > 1:
            lines += _residual_lines(form, s)
        lines += _end_lines(form, s)
    return lines


def _read_again(form: Product, cut: Cut) -> list[str]:
    """A chunk of x of each sequence, as it meets the weight."""
    sequences = range(cut.tiling.batch)
    if form.rounds:
        lines = []
        for s in sequences:
            lines += [f"x{s} = {_values(form, s, _normed_chunk(form, cut, s))}"]
        return lines
    lines = [f"norm = {_norm(form, cut, 'chunk')}.to(tl.float32)"] if form.norm else []
    times = " * norm" if form.norm else ""
    return lines + [f"x{s} = {_x(form, cut, s, 'chunk')}.to(tl.float32){times}" for s in sequences]


def _residual_lines(form: Product, s: int) -> list[str]:
    start = f"_bf16(residual_at) + {form.out_rows * s} + column"
    return [
        f"r_a = tl.load({start}).to(tl.float32)",
        f"r_b = tl.load({start} + R).to(tl.float32)",
    ]


def _chunk_lines(form: Product, cut: Cut, xs: Sequence[str]) -> list[str]:
    """A chunk of either group with each sequence's x; each place is filled again at once."""
    lines = []
    for g in "ab":
        lines += [f"acc_{g}{s} = {_times(form, cut, g, s, x)}" for s, x in enumerate(xs)]
        lines += cut.chunk_lines(g)
        second = g == "b"
        lines += cut.entry_lines(g, f"item + {4 + second}")
        ask = cut.ask_line(f"item + {2 + second} + AHEAD")
        lines += ["if DEVICE:", "    if AHEAD > 0:", f"        {ask}"]
    return [*lines, "item += 2"]


def _times(form: Product, cut: Cut, g: str, s: int, x: str) -> str:
    """Sums with the products of a chunk."""
    acc = f"acc_{g}{s}"
    if cut.codes is None:
        return f"_times({acc}, w_{g}, {x}, R, BLOCK_K)"
    if form.codes is None:
        return f"_of_numbers({acc}, w_{g}, {x}, R, WORDS, LANE)"
    if form.bits == 8:
        products = f"_of_bytes(w_{g}, {x}, R, WORDS, LANE, DEVICE)"
    else:
        products = f"_of_nibbles(w_{g}, {x}, R, WORDS, LANE)"
    scale = f" * s_{g}.to(tl.float32)" if cut.grouped else ""
    return f"{acc} + {products}{scale}"


def _end_lines(form: Product, s: int) -> list[str]:
    """What is made of a sequence's sums."""
    lines = [f"sum_a, sum_b = _both(acc_a{s}, acc_b{s})"]
    if form.row_scaled:
        step = f" * step{s}" if form.rounds else ""
        lines += [f"sum_{g} = sum_{g}{step} * by_{g}" for g in "ab"]
    scale = f" * scale{s}" if form.norm and not form.rounds else ""
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
