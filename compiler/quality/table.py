"""The quality report as rich tables."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ...codegen.program import Json

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

WORST = 8  # layers that are listed


def quantization_tables(facts: Mapping[str, Json]) -> Iterator[Table | Text]:
    """Tables of ``report["quantization"]``: what was done, what it cost, the worst layers, those
    most worth keeping.
    """
    from ..cli.tables import facts_table, plain_table

    yield facts_table(list(quality_facts(facts)))
    if not isinstance(facts.get("quality"), dict):
        return
    table = plain_table(("layers that lost most", "weight error", "output error"))
    for layer in sorted(rows_of(facts, "layers"), key=lambda row: -_number(row, "output"))[:WORST]:
        errors = (f"{_number(layer, key):.2%}" for key in ("weight", "output"))
        table.add_row(str(layer["name"]), *errors)
    yield table
    yield from _sensitivity(facts)


def _sensitivity(facts: Mapping[str, Json]) -> Iterator[Table | Text]:
    from rich.text import Text

    from ..cli.tables import plain_table

    rows = rows_of(facts, "sensitivity")
    if not rows:
        return
    whole = sum(_number(row, "kl") for row in rows) or 1.0
    columns = ("most to gain by keeping", "KL alone", "share of all", "output error", "bytes more")
    table = plain_table(columns)
    for row in rows[:WORST]:
        kl, more = _number(row, "kl"), _number(row, "bytes")
        cells = (f"{kl:.6f}", f"{kl / whole:.1%}", f"{_number(row, 'output'):.2%}", f"{more:,.0f}")
        table.add_row(str(row["name"]), *cells)
    yield table
    share = sum(_number(row, "kl") for row in rows[:WORST]) / whole
    more = sum(_number(row, "bytes") for row in rows[:WORST]) / 1e6
    yield Text(
        f"These {len(rows[:WORST])} of {len(rows)} kept as they are: {share:.0%} of the summed "
        f"damage less, {more:.1f} MB more. The first of them, as many as you like:"
    )
    yield Text(skip_options(rows[:WORST]))


def rows_of(facts: Mapping[str, Json], key: str) -> list[Mapping[str, Json]]:
    """``facts["quality"][key]``, "layers" or "sensitivity"; none where it was not measured."""
    quality = facts.get("quality")
    rows = quality.get(key) if isinstance(quality, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def skip_options(damages: Sequence[Mapping[str, Json]]) -> str:
    """Options of ``tilewright quantize`` that keep these, for a shell."""
    return " ".join(f"--skip {shlex.quote(str(row['pattern']))}" for row in damages)


def quality_facts(facts: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
    """Label and fact, in reading order; "note" is what no figure should be quoted without."""
    group = f", groups of {facts['group']}" if facts["group"] else ""
    zero = "" if facts["symmetric"] else ", zero points"
    yield "scheme", f"{facts['scheme']} ({facts['method']}{group}{zero})"
    before, after = _number(facts, "bytes_before"), _number(facts, "bytes")
    yield "linears", f"{facts['linears']} of {_number(facts, 'parameters') / 1e6:.1f} M weights"
    yield "bits per weight", f"{_number(facts, 'bits_per_weight'):.3f}"
    yield "bytes", f"{after / 1e6:.1f} MB of {before / 1e6:.1f} MB"
    if facts["source_in_four_bits"]:
        yield (
            "note",
            "the file holds these weights in four bits by groups already: this is no result",
        )
    quality = facts.get("quality")
    if not isinstance(quality, dict):
        return
    yield "text", f"{quality['text']}, {_measured(quality)}"
    if not quality["held_out"]:
        yield "note", "the model was calibrated with this text: name another with --text"
    base, own = _number(quality, "base_perplexity"), _number(quality, "perplexity")
    yield "perplexity", f"{own:.3f}, {_number(quality, 'change'):+.2%} from {base:.3f}"
    yield "KL divergence", f"{_number(quality, 'kl'):.5f} nats a token"
    yield "top-1 agreement", f"{_number(quality, 'top1'):.2%}"


def _measured(quality: Mapping[str, Json]) -> str:
    tokens, asked = _number(quality, "tokens") + 1, quality.get("tokens_asked")
    short = isinstance(asked, int) and tokens < asked
    whole = f", which is all of it ({asked} were asked for)" if short else ""
    return f"{tokens:.0f} tokens{whole}, windows of {quality['length']} that share one"


def _number(row: Mapping[str, Json], key: str) -> float:
    return float(str(row[key]))
