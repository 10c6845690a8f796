"""What fewer KV heads cost and save, for ``report.json``."""

from __future__ import annotations

from ...codegen.program import Json
from ...ir.graph import Graph
from ...ir.node import Node
from ...passes.heads import HeadPlan, convert_heads
from ...passes.heads.convert import sites_of
from ..calibrate.recipe import plain_graph
from ..calibrate.text import measured_text
from ..quality.compare import LENGTH, compare, graph_logits
from ..sources import Source, source_tokenizer
from .plan import recognized


def heads_quality(
    captured: Graph, source: Source, plan: HeadPlan | None, limit: int | None
) -> dict[str, Json] | None:
    """How a converted causal LM predicts a text, against itself before; None where its
    configuration does not ask.

    Keys: ``text``, ``held_out`` (whether it is another text than the one that the conversion looked
    at) and those of Comparison.to_json.

    Raises:
        UnsupportedError: a model without a tokenizer.
        UsageError: a text that is too short.
    """
    if plan is None or not plan.config.report:
        return None
    config, tokenizer = plan.config, source_tokenizer(source)
    ids, name = measured_text(
        source.name, tokenizer, limit, config.report_text, config.report_tokens
    )
    length = min(LENGTH, limit or LENGTH)
    found = compare(
        graph_logits(plain_graph(captured)),
        graph_logits(plain_graph(captured, plan)),
        ids,
        length,
        max(length - 1, 1),
    )
    same = plan.text is not None and config.calibrate == config.report_text
    return {"text": name, "held_out": not same, **found.to_json()}


def heads_report(
    captured: Graph, source: Source, plan: HeadPlan | None, limit: int | None
) -> dict[str, Json] | None:
    """``heads_facts`` with the quality, None where heads stay as they are."""
    if plan is None:
        return None
    return heads_facts(captured, plan, heads_quality(captured, source, plan, limit))


def heads_facts(
    captured: Graph, plan: HeadPlan, quality: dict[str, Json] | None = None
) -> dict[str, Json]:
    """What became of the heads.

    Keys: ``method``, ``groups``, ``align``, ``regroup``; ``text`` whose activations were looked at
    (None: weights alone); ``kv_heads`` and ``kv_heads_before``, most of any layer;
    ``kv_bytes_per_token`` and ``kv_bytes_per_token_before``, of all layers; ``layers``, each with
    ``name`` (of its keys' weight), ``heads``, ``kv_heads_before``, ``order`` (the old KV heads,
    those that share one side by side), and ``keys_error`` and ``values_error``, relative
    (compiler/heads/fit.py); ``quality`` (heads_quality).
    """
    config = plan.config
    before = recognized(captured)
    after = convert_heads(before, plan)
    old, new = (_attention(graph) for graph in (before, after))
    sizes = {site.name: site.sizes for site in sites_of(before, plan)}
    layers: list[Json] = [
        {
            "name": name,
            "heads": sizes[name][0],
            "kv_heads_before": sizes[name][1],
            "order": list(plan.layers[name].order),
            "keys_error": errors[0],
            "values_error": errors[1],
        }
        for name, errors in plan.errors.items()
    ]
    return {
        "method": config.method,
        "groups": config.groups,
        "align": config.align,
        "regroup": config.regroup,
        "text": plan.text,
        "kv_heads": max(map(_heads, new)),
        "kv_heads_before": max(map(_heads, old)),
        "kv_bytes_per_token": sum(map(_bytes, new)),
        "kv_bytes_per_token_before": sum(map(_bytes, old)),
        "layers": layers,
        "quality": quality,
    }


def _attention(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "attention"]


def _heads(attention: Node) -> int:
    return int(str(attention.operands[1].shape[1]))


def _bytes(attention: Node) -> int:
    """Of one token's keys and values."""
    kept = attention.operands[1:3]
    return sum(int(str(x.shape[1])) * int(str(x.shape[3])) * x.dtype.bytes for x in kept)
