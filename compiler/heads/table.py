"""The report on fewer KV heads as a line and as rich tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WORST = 8  # layers that are listed


def heads_line(report: Mapping[str, object]) -> list[tuple[str, str]]:
    """One labelled fact of a report; none for a model whose heads are its own."""
    facts = report.get("attention")
    if not isinstance(facts, dict):
        return []
    count = f"{facts['kv_heads']} KV heads, were {facts['kv_heads_before']}"
    return [("attention", f"{count} ({facts['method']})")]


def heads_tables(facts: Mapping[str, object]) -> Iterator[Table]:
    """Tables of ``report["attention"]``: what was done, what it cost, the worst layers."""
    from ..cli.tables import facts_table, plain_table

    yield facts_table(list(_facts(facts)))
    layers = facts["layers"]
    assert isinstance(layers, list)
    table = plain_table(("layers that lost most", "keys error", "values error"))
    rows = [layer for layer in layers if isinstance(layer, dict)]
    for layer in sorted(rows, key=lambda row: -_number(row, "values_error"))[:WORST]:
        errors = (f"{_number(layer, key):.2%}" for key in ("keys_error", "values_error"))
        table.add_row(str(layer["name"]), *errors)
    yield table


def _facts(facts: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    yield from heads_line({"attention": dict(facts)})
    after, before = (_number(facts, f"kv_bytes_per_token{end}") for end in ("", "_before"))
    yield "KV cache", f"{after / 1e3:.1f} kB a token, were {before / 1e3:.1f} kB"
    yield "fitted to", "the weights" if facts["text"] is None else f"{facts['text']} text"
    quality = facts.get("quality")
    if not isinstance(quality, dict):
        return
    yield "text", f"{quality['text']}, {quality['tokens']} tokens"
    if not quality["held_out"]:
        yield "note", "the heads were fitted to this text: name another with report_text"
    base, own = _number(quality, "base_perplexity"), _number(quality, "perplexity")
    yield "perplexity", f"{own:.3f}, {_number(quality, 'change'):+.2%} from {base:.3f}"
    yield "KL divergence", f"{_number(quality, 'kl'):.5f} nats a token"
    yield "top-1 agreement", f"{_number(quality, 'top1'):.2%}"


def _number(row: Mapping[str, object], key: str) -> float:
    return float(str(row[key]))
