"""From a graph, what is asked for and perhaps a text: how each attention's heads become fewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UnsupportedError, UsageError
from ...ir.graph import Graph
from ...passes.driver import run_passes
from ...passes.heads import GQA, Declined, HeadPlan, HeadSite, LayerMaps, head_sites
from ...passes.pipeline import recognizing
from ..calibrate.text import PACKAGE_TEXT, text_samples
from ..sources import Source, source_tokenizer
from .fit import Freedom, fit, lost, roots_of, weighted, weights_within
from .grouping import distances, grouped
from .moments import Moments, moments_of_weights, moments_on_text

Samples = Sequence[Sequence[Tensor]]


def recognized(captured: Graph) -> Graph:
    """A captured graph as the pass that converts heads meets it."""
    return run_passes(captured, recognizing(), level="off")[0]


def make_heads(
    captured: Graph, source: Source, config: GQA | None, limit: int | None
) -> HeadPlan | None:
    """The conversion that a compile asks for, None for none.

    Args:
        captured: the lowered graph, before passes.
        source: the model.
        config: resolved; None for none.
        limit: longest sequence of a causal LM, None for plain modules.

    Raises:
        UsageError: groups that do not divide the KV heads; a text that is too short.
        UnsupportedError: attention whose heads cannot be converted, or a text without a tokenizer.
    """
    if config is None:
        return None
    tokenizer = None if limit is None or not config.tokens else source_tokenizer(source)
    if tokenizer is None:
        if config.calibrate is not None:
            raise UnsupportedError(
                f"GQA.calibrate of {source.name}",
                expected="a causal LM with a tokenizer, and tokens to read",
                found="none to read" if not config.tokens else "no tokenizer",
                remedy="Leave it out: heads then go by the weights alone.",
            )
        return plan_heads(recognized(captured), config)
    ids = text_samples(tokenizer, config.calibrate, config.tokens, config.seed, limit)
    name = PACKAGE_TEXT if config.calibrate is None else Path(config.calibrate).name
    return plan_heads(recognized(captured), config, [(sample,) for sample in ids], name)


def plan_heads(
    graph: Graph,
    config: GQA,
    samples: Samples = (),
    text: str | None = None,
    advance: Callable[[float], None] = lambda share: None,
) -> HeadPlan:
    """The maps of each attention with more KV heads than are asked for.

    Args:
        graph: as ``recognized`` makes it.
        config: resolved.
        samples: one tensor an input of the graph, for each; without any the weights alone say what
            is alike.
        text: what the samples come from.
        advance: called with the share that is done.

    Raises:
        UsageError: groups that do not divide the KV heads.
        UnsupportedError: attention whose heads cannot be converted.
    """
    config = replace(config, method=config.method or ("svd" if samples else "mean"))
    sites = _changing(graph, config.groups)
    if samples:
        moments = moments_on_text(graph, sites, samples, advance)
    else:
        moments = moments_of_weights(graph, sites)
    plan = HeadPlan(config, {}, {}, text)
    layers: dict[str, LayerMaps] = {}
    errors: dict[str, tuple[float, float]] = {}
    for site in sites:
        layers[site.name], errors[site.name] = _layer(site, moments[site.name], config)
    return replace(plan, layers=layers, errors=errors)


def _changing(graph: Graph, groups: int) -> list[HeadSite]:
    found = head_sites(graph)
    counts = [kv_heads(site) for site in found]
    common = gcd(*counts) if counts else 0
    if not counts or any(count % groups for count in counts):
        divisors = [str(n) for n in range(1, common + 1) if common % n == 0]
        heads = ", ".join(map(str, sorted(set(counts)))) or "none"
        raise UsageError(
            f"GQA.groups {groups}",
            expected=f"a divisor of the KV heads: one of {', '.join(divisors) or 'none'}",
            found=f"{groups}, where attention has {heads}",
            remedy="Choose one of those." if counts else "Leave attention=… out.",
        )
    changing = [site for site in found if kv_heads(site) > groups]
    for site in changing:
        if isinstance(site, Declined):
            index = found.index(site)
            raise UnsupportedError(
                f"attention {index} of {graph.name}",
                expected="heads that are rows of linears, read by one linear",
                found=site.reason,
                remedy="Leave attention=… out for this model.",
            )
    return [site for site in changing if isinstance(site, HeadSite)]


def kv_heads(site: HeadSite | Declined) -> int:
    """The KV heads of an attention."""
    count = site.attention.operands[1].shape[1]
    assert isinstance(count, int)
    return count


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """The keys or the values of one attention, [n, D, n, D], and what their errors cost."""

    moments: Tensor
    costs: Tensor
    freedom: Freedom

    def distances(self, config: GQA) -> Tensor:
        """Of each two heads."""
        if config.method == "mean" or self.freedom.fixed:
            return distances(self.moments, self.freedom, config.align)
        roots, _ = roots_of(weights_within(self.costs, self.freedom))
        return distances(weighted(self.moments, roots), self.freedom, True)

    def shared(self, order: Sequence[int], config: GQA) -> tuple[Tensor, Tensor | None, float]:
        """Pools [g, D, n / g * D] and turns [n, D, D] (None where none turns) of the heads in an
        order, and the error, relative.
        """
        costs = weights_within(self.costs, self.freedom)
        pools, turns, loss, whole = [], [], 0.0, 0.0
        for members in torch.tensor(order).view(config.groups, -1):
            own, weight = self.moments[members][:, :, members], costs[members]
            found = fit(own, weight, self.freedom, str(config.method), config.align)
            pools.append(found.pool.flatten(1))
            turns.append(found.turns)
            part, total = lost(own, weight, found)
            loss, whole = loss + part, whole + total
        stays = self.freedom.fixed or (config.method == "mean" and not config.align)
        error = (loss / whole) ** 0.5 if whole else 0.0
        return torch.stack(pools), None if stays else torch.cat(turns), error


def _layer(site: HeadSite, moments: Moments, config: GQA) -> tuple[LayerMaps, tuple[float, float]]:
    _, count, width, value_width = site.sizes
    keys = _Side(moments.keys, moments.queries, Freedom.of(width, site.pairs, not site.turns_keys))
    values = _Side(moments.values, moments.outputs, Freedom.of(value_width))
    order = tuple(range(count))
    if config.regroup and not site.apart:
        order = grouped(keys.distances(config) + values.distances(config), config.groups)
    key_pools, turns, key_error = keys.shared(order, config)
    value_pools, value_turns, value_error = values.shared(order, config)
    back = None if value_turns is None else value_turns.mT.contiguous()
    return LayerMaps(order, key_pools, value_pools, turns, back), (key_error, value_error)
