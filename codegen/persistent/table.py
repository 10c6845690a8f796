"""The tables of a persistent kernel: which program computes which tiles, and where its weights lie.

Tiles are handed out in turn, the first of a call behind the last of the call before: so programs
that had one more tile of one call have one less of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...ir.ops.quant import blocks
from .codes import Codes
from .cut import Cut
from .generate import FIELDS, SCALE_CELL
from .reading import Attention, Begin, Product, Shape
from .tiling import Tiling

_CELLS = 4  # of an entry of the stream


def make_calls(shape: Shape, tiling: Tiling, addresses: Mapping[str, int]) -> torch.Tensor:
    """i64 [calls, 16]: a row a call (generate.py), of a model whose memory lies at ``addresses``,
    by the names of its steps.
    """
    where = {"": 0, "token_ids": 0, **addresses}
    calls = torch.zeros(len(shape.calls), FIELDS, dtype=torch.int64)
    arrivals = 0
    for row, step, (tiles, shift) in zip(calls, shape.calls, _shares(shape, tiling), strict=True):
        form = shape.form(step)
        row[:4] = torch.tensor([step.form, tiles, shift, arrivals])
        first = step.weight if isinstance(form, Begin) else step.x
        names = (first, step.norm, step.residual, step.out, *step.caches)
        row[4:10] = torch.tensor([where[name] for name in names])
        row[SCALE_CELL] = where[step.scale]
        arrivals = min(tiles, tiling.programs)
        if isinstance(form, Attention):
            arrivals = tiling.batch * form.kv_heads
    return calls


def make_items(shape: Shape, tiling: Tiling, addresses: Mapping[str, int]) -> torch.Tensor:
    """i64 [programs, entries, 4]: each program's weights in order (kernel.py)."""
    streams, cut = [], Cut.of(shape, tiling)
    for step, (tiles, shift) in zip(shape.calls, _shares(shape, tiling), strict=True):
        form = shape.form(step)
        if isinstance(form, Product):
            owner = (torch.arange(tiles) + shift) % tiling.programs
            scales = addresses[step.scale] if step.scale else addresses[step.weight]
            streams.append((owner, _entries(form, cut, addresses[step.weight], scales)))
    return _items(streams, tiling.programs, _ahead(tiling))


def _shares(shape: Shape, tiling: Tiling) -> Iterator[tuple[int, int]]:
    """Of each call its tiles, and the program that takes the first of them."""
    shift = 0
    for step in shape.calls:
        tiles = num_tiles(shape.form(step), tiling)
        yield tiles, shift
        shift = (shift + tiles) % tiling.programs


def num_tiles(form: Begin | Product | Attention, tiling: Tiling) -> int:
    """Pieces that a call is handed out in."""
    if isinstance(form, Begin):
        return tiling.batch + 1
    if isinstance(form, Attention):
        return tiling.batch * form.kv_heads * tiling.splits
    return -(-form.out_rows // form.tile_rows(tiling.rows))


def num_items(shape: Shape, tiling: Tiling) -> int:
    """Entries of a program's stream, those behind its end included."""
    count, cut = torch.zeros(tiling.programs, dtype=torch.int64), Cut.of(shape, tiling)
    for step, (tiles, shift) in zip(shape.calls, _shares(shape, tiling), strict=True):
        form = shape.form(step)
        if isinstance(form, Product):
            owner = (torch.arange(tiles) + shift) % tiling.programs
            count += torch.bincount(owner, minlength=tiling.programs) * 2 * cut.chunks(form)
    return int(count.max()) + _ahead(tiling)


def _ahead(tiling: Tiling) -> int:
    return 6 + tiling.ahead  # entries that a program looks at behind its last one


def _entries(form: Product, cut: Cut, weight: int, scales: int) -> torch.Tensor:
    """Entries i64 [tiles, chunks of a tile, 4] of a product (kernel.py, codes_kernel.py)."""
    tiles, rows = num_tiles(form, cut.tiling), cut.tiling.rows
    own = form.tile_rows(rows)
    start = torch.clamp(torch.arange(tiles) * own, max=form.out_rows - own)
    second = start + (form.n // 2 if form.gated else rows)
    begin = torch.arange(cut.chunks(form)) * cut.columns(form)
    found = torch.zeros(tiles, len(begin), 2, _CELLS, dtype=torch.int64)
    both = torch.stack((start, second), 1)[:, None, :]
    found[..., 0] = weight + both * form.row_bytes + (begin * form.bits // 8)[None, :, None]
    left = torch.clamp(form.k - begin, max=cut.columns(form))[None, :, None]
    if cut.codes is None:
        found[..., 1], found[..., 2] = form.k // 8, left
    else:
        found[..., 1] = form.row_bytes // (4 * cut.per_thread)
        found[..., 2] = left * form.bits // 32
        found[..., 3] = scales
        if cut.grouped and form.codes is not None:
            _add_scales(found, form.codes, form.k, both, begin[None, :, None])
    return found.reshape(tiles, -1, _CELLS)


def _add_scales(
    found: torch.Tensor, codes: Codes, k: int, row: torch.Tensor, begin: torch.Tensor
) -> None:
    """Where the scales of chunks begin, and the distance of those of their rows."""
    groups = blocks(k, codes.group)
    at = row // codes.block * groups + begin // codes.group
    found[..., 3] += at * codes.scale_bytes
    if codes.block == 1:  # else a chunk's rows share theirs
        found[..., 2] += groups << 32


def _items(
    streams: list[tuple[torch.Tensor, torch.Tensor]], programs: int, ahead: int
) -> torch.Tensor:
    parts: list[list[torch.Tensor]] = [[] for _ in range(programs)]
    for owner, entries in streams:
        for program in owner[:programs].tolist():
            parts[program].append(entries[owner == program].reshape(-1, _CELLS))
    first = next(part for part in parts if part)
    whole = [torch.cat(part or first) for part in parts]
    most = max(len(found) for found, part in zip(whole, parts, strict=True) if part) + ahead
    # What stands behind the end is read, and not used: the next step begins with it.
    return torch.stack([found[torch.arange(most) % len(found)] for found in whole])
