"""What is known of keys, values, queries and outputs: their second moments, from which every map
and every error of a conversion follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...ir.graph import Graph, param_name
from ...passes.expressions import expression_of
from ...passes.heads import HeadSite, Projection
from ...passes.heads.convert import rows_of
from ..calibrate.lockstep import run_in_step


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Of one attention with G KV heads, all float64.

    Attributes:
        keys: E[k kᵀ] of all heads' keys below each other, [G, D, G, D], before rotation.
        values: E[v vᵀ], [G, E, G, E].
        queries: sum of E[q qᵀ] over the query heads of each KV head, [G, D, D]: what errors of keys
            cost in scores, if they know nothing of the queries.
        outputs: sum of OᵀO over the same, [G, E, E], O being a head's columns of the output's
            weight: what errors of values cost in the output.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    outputs: Tensor


def moments_of_weights(graph: Graph, sites: Sequence[HeadSite]) -> dict[str, Moments]:
    """Those for inputs of unit variance without correlations, by HeadSite.name."""
    found = {}
    for site in sites:
        width = site.k.linear.operands[1].shape[1]
        assert isinstance(width, int)
        inputs = torch.eye(width + 1, dtype=torch.float64)
        found[site.name] = _moments(graph, site, inputs)
    return found


def moments_on_text(
    graph: Graph,
    sites: Sequence[HeadSite],
    samples: Sequence[Sequence[Tensor]],
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Moments]:
    """Those of the activations that samples bring, by HeadSite.name.

    Args:
        graph: with the sites.
        samples: one tensor an input of the graph, for each.
        advance: called with the share that is done.
    """
    by_weight = {param_name(site.k.linear.operands[1]): site for site in sites}
    found: dict[str, Moments] = {}

    def observe(name: str, rows: Tensor, weight: Tensor) -> None:
        wide = torch.nn.functional.pad(rows.double(), (0, 1), value=1.0)  # a column for biases
        site = by_weight[name]
        found[site.name] = _moments(graph, site, wide.T @ wide / max(len(wide), 1))

    run_in_step(graph, samples, list(by_weight), observe, advance)
    return found


def _moments(graph: Graph, site: HeadSite, inputs: Tensor) -> Moments:
    """From E[x xᵀ], x with a one at its end."""
    heads, kv_heads, width, value_width = site.sizes
    repeats = heads // kv_heads
    keys, values, queries = (
        _with_bias(graph, site.name, part) for part in (site.k, site.v, site.q)
    )
    name = param_name(site.output.operands[1])
    output = _finite(name, expression_of(graph, name).load().double())
    per_head = queries.view(kv_heads, repeats, width, -1)
    columns = output.view(-1, kv_heads, repeats, value_width)
    return Moments(
        (keys @ inputs @ keys.T).view(kv_heads, width, kv_heads, width),
        (values @ inputs @ values.T).view(kv_heads, value_width, kv_heads, value_width),
        torch.einsum("grdi,ij,grej->gde", per_head, inputs, per_head),
        torch.einsum("ngre,ngrf->gef", columns, columns),
    )


def _with_bias(graph: Graph, name: str, part: Projection) -> Tensor:
    """The rows of a projection, the bias as a last column: [N, K + 1]."""
    weight = rows_of(part, graph, part.linear.operands[1]).load().double()
    if part.bias is None:
        wide = torch.nn.functional.pad(weight, (0, 1))
    else:
        bias = rows_of(part, graph, part.bias).load().double()
        wide = torch.cat([weight, bias[:, None]], 1)
    return _finite(part.name, wide)


def _finite(name: str, weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"weight {name!r}",
            expected="finite numbers, to make fewer heads of",
            found="NaN or an infinity",
            remedy="Restore the tensor.",
        )
    return weight
