"""Places the nodes of a block for drawing: ranks, few crossings, short edges.

The layered method of Sugiyama, Tagawa and Toda (1981): longest-path ranks, places for long edges to
pass, orders by barycentre, then positions that pull each node towards its neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

ROW, GAP, BEND = 66.0, 18.0, 10.0  # height of a rank, space between nodes, width of an edge's place
SWEEPS = 6


@dataclass(slots=True)
class Layout:
    """Centres of nodes, and the points that each edge passes.

    Attributes:
        places: (x, y) of each node's centre.
        edges: (from, to, points) in drawing order.
        width, height: of the whole.
    """

    places: dict[Hashable, tuple[float, float]] = field(default_factory=dict)
    edges: list[tuple[Hashable, Hashable, list[tuple[float, float]]]] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0


def lay_out(
    nodes: Sequence[Hashable],
    edges: Sequence[tuple[Hashable, Hashable]],
    widths: Mapping[Hashable, float],
) -> Layout:
    """Lays out an acyclic graph from top to bottom; ``nodes`` stand in topological order."""
    if not nodes:
        return Layout()
    ranks = _ranks(nodes, edges)
    rows: list[list[Hashable]] = [[] for _ in range(max(ranks.values()) + 1)]
    for node in nodes:
        rows[ranks[node]].append(node)
    chains = _add_bends(edges, ranks, rows)
    above, below = _neighbours(chains)
    sizes = {**{node: BEND for row in rows for node in row}, **widths}
    _order(rows, above, below)
    x = _positions(rows, above, below, sizes)
    left = min(x[node] - sizes[node] / 2 for node in x)
    rank_of = {node: index for index, row in enumerate(rows) for node in row}
    at = {node: (x[node] - left, ROW * (rank_of[node] + 0.5)) for node in x}
    width = max(at[node][0] + sizes[node] / 2 for node in at)
    paths = [(chain[0], chain[-1], [at[node] for node in chain]) for chain in chains]
    return Layout({node: at[node] for node in nodes}, paths, width, ROW * len(rows))


def _ranks(
    nodes: Sequence[Hashable], edges: Sequence[tuple[Hashable, Hashable]]
) -> dict[Hashable, int]:
    """Longest path from the top; then sources sink to just above their first user."""
    before: dict[Hashable, list[Hashable]] = defaultdict(list)
    after: dict[Hashable, list[Hashable]] = defaultdict(list)
    for a, b in edges:
        before[b].append(a)
        after[a].append(b)
    ranks: dict[Hashable, int] = {}
    for node in nodes:
        ranks[node] = max((ranks[a] + 1 for a in before[node]), default=0)
    for node in reversed(nodes):
        # A node that only feeds later ranks, and waits for nothing long, stands by its user.
        if after[node] and not before[node]:
            ranks[node] = min(ranks[b] for b in after[node]) - 1
    return ranks


def _add_bends(
    edges: Sequence[tuple[Hashable, Hashable]],
    ranks: Mapping[Hashable, int],
    rows: list[list[Hashable]],
) -> list[list[Hashable]]:
    """Each edge as the chain of places that it passes, one a rank."""
    chains = []
    for number, (a, b) in enumerate(edges):
        bends: list[Hashable] = []
        for rank in range(ranks[a] + 1, ranks[b]):
            bends.append(("bend", number, rank))
            rows[rank].append(bends[-1])
        chains.append([a, *bends, b])
    return chains


def _neighbours(
    chains: Sequence[Sequence[Hashable]],
) -> tuple[dict[Hashable, list[Hashable]], dict[Hashable, list[Hashable]]]:
    above: dict[Hashable, list[Hashable]] = defaultdict(list)
    below: dict[Hashable, list[Hashable]] = defaultdict(list)
    for chain in chains:
        for a, b in zip(chain, chain[1:], strict=False):
            above[b].append(a)
            below[a].append(b)
    return above, below


def _order(
    rows: list[list[Hashable]],
    above: Mapping[Hashable, list[Hashable]],
    below: Mapping[Hashable, list[Hashable]],
) -> None:
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for index in range(len(rows)) if down else reversed(range(len(rows))):
            place = {node: i for row in rows for i, node in enumerate(row)}
            keys = {node: _mean([place[n] for n in neighbours[node]], i)
                    for i, node in enumerate(rows[index])}  # fmt: skip
            rows[index].sort(key=keys.__getitem__)


def _positions(
    rows: list[list[Hashable]],
    above: Mapping[Hashable, list[Hashable]],
    below: Mapping[Hashable, list[Hashable]],
    sizes: Mapping[Hashable, float],
) -> dict[Hashable, float]:
    x: dict[Hashable, float] = {}
    for row in rows:
        _spread(row, {node: 0.0 for node in row}, sizes, x)
    for sweep in range(2 * SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            neighbours = above if down else below
            wanted = {node: _mean([x[n] for n in neighbours[node]], x[node]) for node in row}
            _spread(row, wanted, sizes, x)
    return x


def _spread(
    row: Sequence[Hashable],
    wanted: Mapping[Hashable, float],
    sizes: Mapping[Hashable, float],
    x: dict[Hashable, float],
) -> None:
    """Puts a row's nodes as near to where they want to be as their order and widths allow.

    Nodes that would overlap become one group at the mean of its members' wishes: isotonic
    regression by pooling.
    """
    groups: list[tuple[list[Hashable], list[float]]] = []  # nodes, and their wish minus their place
    for node in row:
        groups.append(([node], [wanted[node]]))
        while len(groups) > 1 and _right(groups[-2], sizes) > _left(groups[-1], sizes):
            (nodes, wishes), (more, further) = groups[-2], groups.pop()
            shift = _span(nodes, sizes) + GAP + (sizes[more[0]] - sizes[nodes[0]]) / 2
            groups[-1] = ([*nodes, *more], [*wishes, *(w - shift for w in further)])
    for group in groups:
        cursor = _left(group, sizes)
        for node in group[0]:
            x[node] = cursor + sizes[node] / 2
            cursor += sizes[node] + GAP


def _span(nodes: Sequence[Hashable], sizes: Mapping[Hashable, float]) -> float:
    return sum(sizes[node] for node in nodes) + GAP * (len(nodes) - 1)


def _left(group: tuple[list[Hashable], list[float]], sizes: Mapping[Hashable, float]) -> float:
    """Left border: that of the first node when the members' wishes are met in the mean."""
    nodes, wishes = group
    return sum(wishes) / len(wishes) - sizes[nodes[0]] / 2


def _right(group: tuple[list[Hashable], list[float]], sizes: Mapping[Hashable, float]) -> float:
    return _left(group, sizes) + _span(group[0], sizes) + GAP


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
