"""Which candidate computes a decode product at how many tokens: a template of ours, or a library.

A cut of ours is for one token, or for as many as its tile holds; so is a tuner's choice of the
library, whose calls stand in the place of that cut. Neighbouring cuts of one candidate are one
share, with a guard on the number of tokens::

    fused_4 = rms_norm_linear_gated(x, w, gate_up)         guard: 64 - B
    fused_4.product = linear(fused_4.normed, gate_up)      guard: B - 65
    …

Between linked products (hand_on.py) something is handed on in tiles of 2 to ``MOST_HANDED`` tokens,
which no library takes or writes: there they stay ours, whatever the tuner says. Where a library has
any share of linked products, each of them is split there, so that no call reads or writes what at
its tokens is not handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ...ir.dims import Dim, Size
from ...ir.node import Node
from ...targets import Target
from .hand_on import Links
from .kernels.linear_hands import MOST_HANDED
from .kernels.linear_tiles import Cutting, GemmTiles, Problem
from .unfused import Unfused, unfused


@dataclass(frozen=True, slots=True)
class Share:
    """What one candidate computes of a product.

    Attributes:
        problem: the product.
        library: the library's calls; None where a template computes it.
        handed: whether the links of the product are in force.
        gemms: cuts for several tokens; none in a share of one token.
        one_token: whether it includes a single token.
        guard: on the number of tokens, as a Call has it.
    """

    problem: Problem
    library: Unfused | None
    handed: bool
    gemms: tuple[GemmTiles, ...]
    one_token: bool
    guard: tuple[Size, ...]


class Shares:
    """How the products of a graph are shared between candidates.

    Args:
        links: of the graph.
        cutting: whose tuner, if it has one, chooses.
        target: where.
    """

    def __init__(self, links: Links, cutting: Cutting, target: Target) -> None:
        self.links, self.cutting, self.target = links, cutting, target
        products = map(self._problem, {**links.to, **links.of})
        self._split_linked = any(p is not None and self._library(p) for p in products)

    def of(self, node: Node) -> Sequence[Share] | None:
        """The shares of a product; None where one call is all, and for other nodes."""
        problem = self._problem(node)
        if problem is None:
            return None
        linked = self.links.hands(problem.node) is not None
        library = self._library(problem)
        if not library and not (linked and self._split_linked):
            return None
        gemms = self.cutting.gemms(problem, self.target)
        assert gemms is not None, "links and libraries' shares are of products that have cuts"
        separate = unfused(problem.node, self.target) if library else None
        cuts: list[GemmTiles | None] = [None, *gemms]
        kinds = [(tokens_of(cut) in library, linked and _is_handed(cut)) for cut in cuts]
        shares, low = [], 0
        for (is_library, handed), group in groupby(
            zip(kinds, cuts, strict=True), key=lambda pair: pair[0]
        ):
            own = [cut for _, cut in group]
            high = None if own[-1] is cuts[-1] else tokens_of(own[-1])
            guard = guard_of(problem.tokens, low, high)
            low = (high or 0) + 1
            if guard is not None:
                tiles = tuple(cut for cut in own if cut is not None)
                found = separate if is_library else None
                shares.append(Share(problem, found, handed, tiles, own[0] is None, guard))
        return shares

    def _problem(self, node: Node) -> Problem | None:
        """What a tuner may have chosen for."""
        return None if self.cutting.chosen is None else Problem.located(node)

    def _library(self, problem: Problem) -> frozenset[int]:
        """Most tokens of each cut in whose place the library's calls stand."""
        gemms = self.cutting.gemms(problem, self.target)
        if gemms is None:
            return frozenset()
        linked = self.links.hands(problem.node) is not None
        cuts = [cut for cut in (None, *gemms) if not (linked and _is_handed(cut))]
        found = frozenset(n for n in map(tokens_of, cuts) if self.cutting.library(problem, n))
        return found if found and unfused(problem.node, self.target) else frozenset()


def tokens_of(cut: GemmTiles | None) -> int:
    """The most tokens of a cut; None is that for one."""
    return 1 if cut is None else cut.block_m


def _is_handed(cut: GemmTiles | None) -> bool:
    """Whether something is handed on in tiles of this cut."""
    return cut is not None and cut.block_m <= MOST_HANDED


def guard_of(tokens: Size, low: int, high: int | None) -> tuple[Size, ...] | None:
    """What is at least 0 where there are ``low`` to ``high`` tokens, which None leaves open; None
    where there never are.
    """
    bounds = [*([tokens - low] if low else []), *([high - tokens] if high is not None else [])]
    if any(not isinstance(bound, Dim) and bound < 0 for bound in bounds):
        return None
    return tuple(bound for bound in bounds if isinstance(bound, Dim))
