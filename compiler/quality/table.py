"""The quality report as rich tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ...codegen.program import Json

if TYPE_CHECKING:
    from rich.table import Table

WORST = 8  # layers that are listed


def quantization_tables(facts: Mapping[str, Json]) -> Iterator[Table]:
    """Tables of ``report["quantization"]``: what was done, what it cost, the worst layers."""
    from ..cli.tables import facts_table, plain_table

    yield facts_table(list(_facts(facts)))
    quality = facts.get("quality")
    if not isinstance(quality, dict) or not isinstance(layers := quality["layers"], list):
        return
    table = plain_table(("layers that lost most", "weight error", "output error"))
    rows = [layer for layer in layers if isinstance(layer, dict)]
    for layer in sorted(rows, key=lambda row: -_number(row, "output"))[:WORST]:
        errors = (f"{_number(layer, key):.2%}" for key in ("weight", "output"))
        table.add_row(str(layer["name"]), *errors)
    yield table


def _facts(facts: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
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
    windows = f"windows of {quality['length']}, stride {quality['stride']}"
    yield "text", f"{quality['text']}, {quality['tokens']} tokens, {windows}"
    if not quality["held_out"]:
        yield "note", "the model was calibrated with this text: name another with --text"
    base, own = _number(quality, "base_perplexity"), _number(quality, "perplexity")
    yield "perplexity", f"{own:.3f}, {_number(quality, 'change'):+.2%} from {base:.3f}"
    yield "KL divergence", f"{_number(quality, 'kl'):.5f} nats a token"
    yield "top-1 agreement", f"{_number(quality, 'top1'):.2%}"


def _number(row: Mapping[str, Json], key: str) -> float:
    return float(str(row[key]))
