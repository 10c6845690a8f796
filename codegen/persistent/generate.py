"""The text of a persistent decode kernel: one branch a form of call, in a loop over the table.

A call's row of ``calls`` (i64) holds its form, tiles, the program that takes its first tile, how
many arrivals the call before it ends with, and addresses (table.py writes them).
"""

from __future__ import annotations

from ..triton.generate_text import helper_text
from ..triton.source import HEADER, jit_text
from . import codes_kernel, kernel
from .codes import Codes
from .cut import Cut
from .products import product_lines
from .reading import Attention, Product, Shape
from .tiling import Tiling

FIELDS = 16
"""Cells of a call's row."""
SCALE_CELL = 10
"""Where a row has the address of a weight's scales."""

_FUNCTIONS = (
    *("_entry", "_chunk", "_ask", "_times", "_both", "_x", "_bf16", "_rounded", "_time", "_wait"),
    *(
        "_arrive",
        "_begin",
        "_step",
        "_turned",
        "_attend",
        "_merge",
        "_none",
        "_better",
        "_most",
        "_choose",
        "_spoil",
    ),
)
_NUMBERS = ("_entry", "_chunk", "_ask", "_times")  # of chunks that hold no words
_CODED = (
    *("_word_entry", "_word_chunk", "_ask_words", "_halves", "_lanes", "_of_numbers"),
    *("_four_numbers", "_of_bytes"),
)
_NIBBLES = ("_nibble", "_of_nibbles")
_ROUNDING = ("_normed", "_size", "_code_scale", "_code_values")
PARAMETERS = {
    "calls": "i64",
    "items": "i64",
    "counters": "i32",
    "diagnosis": "i32",
    "timeline": "i64",
    "places": "i32",
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
"""The kernel's pointers by name, and what they point to; behind them come ``pages``, the columns of
block_tables, and ``limit``, the polls of a wait."""
TIMED = ("timeline", "places")
"""Those that are there where times are noted."""


def kernel_text(shape: Shape, tiling: Tiling, timed: bool = False) -> str:
    """The source of the kernel ``decode`` for a model of this shape; ``timed`` notes times."""
    branches: list[str] = []
    cut = Cut.of(shape, tiling)
    for index, form in enumerate(shape.forms):
        branches.append(f"        {'el' if index else ''}if kind == {index}:")
        if isinstance(form, Product):
            lines = product_lines(form, cut, _WAIT, _ARRIVE)
        elif isinstance(form, Attention):
            lines = _attention_lines(form, tiling.batch)
        else:
            lines = _begin_lines(shape)
        branches += [f"            {line}" for line in lines]
    body = "\n".join((_head(shape, tiling, timed), *branches, _tail(tiling.batch)))
    if not timed:
        notes = ("_time(", "_time_place(")
        lines = body.splitlines(True)
        body = "".join(line for line in lines if not any(note in line for note in notes))
    place = jit_text(kernel, ["_time_place"]) if timed else ""
    return "".join((HEADER, _function_text(cut.codes), place, body))


def _function_text(codes: Codes | None) -> str:
    """The functions that the kernel calls."""
    if codes is None:
        return jit_text(kernel, _FUNCTIONS)
    names = [name for name in _FUNCTIONS if name not in _NUMBERS]
    text = helper_text(["_by_largest("]) if codes.rounds else ""
    text += jit_text(kernel, names)
    own = [*_CODED[:6], *(_CODED[6:] if codes.bits == 8 else _NIBBLES)]
    own += ["_chunk_scales"] * (codes.group > 0) + [*_ROUNDING] * codes.rounds
    own += ["_group_values"] * (codes.rounds and codes.group > 0)
    return text + jit_text(codes_kernel, own)


def constexprs(shape: Shape, tiling: Tiling, device: bool) -> dict[str, int | bool]:
    """Value of each constexpr parameter."""
    cut = Cut.of(shape, tiling)
    return {
        "ITEMS": 1,
        "CALLS": len(shape.calls),
        "G": tiling.programs,
        "G_BLOCK": 1 << (tiling.programs - 1).bit_length(),
        "R": tiling.rows,
        **cut.constexprs(),
        "AHEAD": tiling.ahead,
        "SPLITS": tiling.splits,
        "BLOCK_N": tiling.block_n,
        "MASKED": any(form.k % cut.columns(form) for form in shape.products),
        "BATCH": tiling.batch,
        "DEVICE": device,
    }


def _head(shape: Shape, tiling: Tiling, timed: bool) -> str:
    names = ", ".join(
        name for name in (*PARAMETERS, "pages", "limit") if timed or name not in TIMED
    )
    bests = "\n".join(f"    best{s}, index{s} = _none(R)" for s in range(tiling.batch))
    constants = ", ".join(f"{name}: tl.constexpr" for name in constexprs(shape, tiling, True))
    cut = Cut.of(shape, tiling)
    first = [*cut.entry_lines("a", "item"), *cut.entry_lines("b", "item + 1")]
    first += [*cut.chunk_lines("a"), *cut.chunk_lines("b")]
    second = [*cut.entry_lines("a", "item + 2"), *cut.entry_lines("b", "item + 3")]
    begun, later = ("\n".join(f"    {line}" for line in lines) for lines in (first, second))
    scales = "" if cut.codes is None else f"\n        scale_at = tl.load(row + {SCALE_CELL})"
    return f"""

@triton.jit
def decode({names}, {constants}):
    cta = tl.program_id(0)
    _time_place(places, DEVICE)
    generation = tl.load(counters, volatile=True)
    item = cta * ITEMS
{begun}
    if DEVICE:
        for early in range(AHEAD):
            {cut.ask_line("item + 2 + early")}
{later}
{bests}
    for call in range(CALLS):
        row = calls + call * {FIELDS}
        kind = tl.load(row)
        tiles = tl.load(row + 1).to(tl.int32)
        x_at, norm_at, residual_at = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
        out_at, keys_at, values_at = tl.load(row + 7), tl.load(row + 8), tl.load(row + 9){scales}
        first = cta - tl.load(row + 2).to(tl.int32)
        first = tl.where(first < 0, first + G, first)
        before = counters + 32 + 32 * call
        target = (generation + 1) * tl.load(row + 3).to(tl.int32)
        _time(timeline, call, 0, CALLS, DEVICE)"""


_TAIL = """        _time(timeline, call, 2, CALLS, DEVICE)
{most}
    tl.debug_barrier()
    done = tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu")
    if done + 1 == (generation + 1) * G:
        for sequence in range(BATCH):
            _choose(bests + sequence * G, indices + sequence * G, tokens + sequence, G, G_BLOCK)
        _spoil(diagnosis, _bf16(tl.load(calls + (CALLS - 1) * {FIELDS} + 7)))
        tl.store(counters, generation + 1)
"""


def _tail(batch: int) -> str:
    lines = []
    for s in range(batch):
        lines += [
            f"    top, token = _most(best{s}, index{s})",
            f"    tl.store(bests + {s} * G + cta, top)",
            f"    tl.store(indices + {s} * G + cta, token)",
        ]
    return _TAIL.format(FIELDS=FIELDS, most="\n".join(lines))


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
        f" cos, sin, {shape.width}, {half}, {block}, {block_half}, BATCH)",
        *_ARRIVE,
    ]


def _attention_lines(form: Attention, batch: int) -> list[str]:
    group = form.heads // form.kv_heads
    block_m = max(16, 1 << (group - 1).bit_length())
    block_c = 1 << (group * form.head_dim - 1).bit_length()
    sizes = f"{form.heads}, {form.kv_heads}, {form.head_dim}"
    width = (form.heads + 2 * form.kv_heads) * form.head_dim
    result, half = form.heads * form.head_dim, form.head_dim // 2
    return [
        *_WAIT,
        "for tile in range(first, tiles, G):",
        f"    pair = tile % {batch * form.kv_heads}",  # of a sequence and a KV head
        f"    sequence, kv_head = pair // {form.kv_heads}, pair % {form.kv_heads}",
        "    length = tl.load(seq_lens + sequence)",
        "    slot = tl.load(slot_mapping + sequence)",
        f"    part = sequence * (SPLITS * {form.heads})",
        f"    _attend(kv_head, tile // {batch * form.kv_heads},"
        f" _bf16(x_at) + sequence * {width}, _bf16(keys_at), _bf16(values_at),"
        f" cos + sequence * {half}, sin + sequence * {half}, block_tables + sequence * pages,"
        f" slot, length, partial_acc + part * {form.head_dim}, partial_max + part,"
        f" partial_sum + part, {sizes}, {form.page_size}, {form.factor!r}, {form.stepwise},"
        f" SPLITS, {block_m}, BLOCK_N)",
        "    tl.debug_barrier()",
        "    met = tl.atomic_add(counters + 32 * (CALLS + 1)"
        f' + call * {batch * form.kv_heads} + pair + 32, 1, sem="acq_rel", scope="gpu")',
        "    if met + 1 == (generation + 1) * SPLITS:",
        f"        _merge(kv_head, length, _bf16(out_at) + sequence * {result},"
        f" partial_acc + part * {form.head_dim}, partial_max + part, partial_sum + part,"
        f" {sizes}, SPLITS, {block_c}, BLOCK_N)",
        "        _arrive(before + 32)",
    ]
