"""Which nodes become one call: greedy merging along dataflow edges, kept convex at every step.

Groups are nodes of a quotient graph; two merge only when no path between them runs through a
third. It is not enough that each is convex by itself: two such may still wait for one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..ir.dims import Dim, sole_symbol, symbols_of
from ..ir.graph import Graph
from ..ir.node import Attr, Node
from .fuse_space import Space, aligned_operands, is_view, source, space_of

# Bounds on what one kernel keeps in registers; recognised layers stay far below both.
MAX_OPERANDS = 12
MAX_MEMBERS = 48


@dataclass(slots=True)
class _Unit:
    """A node of the quotient graph: a group, or a single node that is no member of any.

    ``bits`` and ``ancestors`` are sets of node indices, as bit masks. ``reads`` are the nodes
    outside that members read at their own index, ``needs`` those needed in any other way.
    """

    nodes: list[Node]
    bits: int
    ancestors: int
    reads: set[Node]
    needs: set[Node]
    space: Space | None


def fusion_groups(graph: Graph) -> list[list[Node]]:
    """Disjoint groups of members, each in topological order, such that every group can be one call.

    All memory-bound nodes over rows are in one, alone where nothing joins them.
    """
    merger = _Merger(graph)
    groups = [unit.nodes for unit in merger.run() if unit.space is not None]
    return [nodes for nodes in groups if _bindable(nodes)]


def outer_operands(members: Iterable[Node]) -> list[Node]:
    """What a group reads from outside, looking through the views that it takes in."""
    inside = set(members)
    found: dict[Node, None] = {}
    for node in inside_order(members):
        if node not in inside and not is_view(node) and node.op != "const":
            found.setdefault(node)
    return list(found)


def inside_order(members: Iterable[Node]) -> Iterator[Node]:
    """Operands, views and members in the order of first use, operands before users."""
    seen: set[Node] = set()
    inside = set(members)
    for member in members:
        for operand in member.operands:
            chain = [operand]
            while chain[-1] not in inside and is_view(chain[-1]):
                chain.append(chain[-1].operands[0])
            for node in reversed(chain):
                if node not in seen and node not in inside:
                    seen.add(node)
                    yield node
        yield member


class _Merger:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.units: dict[int, _Unit] = {}  # by id, in order of their last nodes
        self.unit_of: dict[Node, _Unit] = {}

    def run(self) -> list[_Unit]:
        for index, node in enumerate(self.graph.nodes):
            unit = self._unit(node, 1 << index)
            self.unit_of[node] = unit
            while unit.space is not None and self._grow(unit):
                pass
            self.units[id(unit)] = unit
        return list(self.units.values())

    def _unit(self, node: Node, bit: int) -> _Unit:
        space = space_of(node)
        aligned = aligned_operands(node) if space is not None else ()
        reads: set[Node] = set()
        needs: set[Node] = set()
        for operand in dict.fromkeys(node.operands):
            found = source(operand)
            if found is None or operand not in aligned:
                needs.add(operand)
            else:
                reads.add(found)
        # A weight that is also the value normalised is read in both ways.
        needs.update(o for o in node.operands[len(aligned) :] if o in aligned)
        ancestors = 0
        for operand in reads | needs:
            ancestors |= self.unit_of[operand].ancestors | self.unit_of[operand].bits
        return _Unit([node], bit, ancestors, reads, needs, space)

    def _grow(self, unit: _Unit) -> bool:
        """Merges one unit that ``unit`` reads from into it; False when none may be."""
        candidates = {id(u): u for u in map(self.unit_of.__getitem__, unit.reads)}
        for other in sorted(candidates.values(), key=lambda u: -u.bits):
            space = self._joined(other, unit)
            if space is not None:
                self._merge(other, unit, space)
                return True
        return False

    def _joined(self, producer: _Unit, unit: _Unit) -> Space | None:
        if producer is unit or producer.space is None or unit.space is None:
            return None
        space = producer.space.joined(unit.space)
        if space is None or len(producer.nodes) + len(unit.nodes) > MAX_MEMBERS:
            return None
        for operand in unit.reads | unit.needs:
            between = self.unit_of[operand]
            if between is producer and operand in unit.needs:
                return None
            if between is not producer and between.ancestors & producer.bits:
                return None
        members = self._ordered(producer, unit)
        return space if len(outer_operands(members)) <= MAX_OPERANDS else None

    def _merge(self, producer: _Unit, unit: _Unit, space: Space) -> None:
        unit.nodes = self._ordered(producer, unit)
        unit.bits |= producer.bits
        unit.ancestors = (unit.ancestors | producer.ancestors) & ~unit.bits
        inside = set(unit.nodes)
        unit.reads = (unit.reads | producer.reads) - inside
        unit.needs |= producer.needs
        unit.space = space
        for node in producer.nodes:
            self.unit_of[node] = unit
        del self.units[id(producer)]
        for other in self.units.values():
            if other.ancestors & unit.bits:
                other.ancestors |= unit.ancestors | unit.bits

    def _ordered(self, producer: _Unit, unit: _Unit) -> list[Node]:
        # Each list is in topological order, and no path leads from the unit to its producer.
        return [*producer.nodes, *unit.nodes]


def _bindable(members: list[Node]) -> bool:
    """Whether the shapes of a group's operands give every symbol in it a value."""
    shapes = [size for node in outer_operands(members) for size in node.shape]
    bound = {name for size in shapes if (name := sole_symbol(size)) is not None}
    needed = {name for size in shapes for name in symbols_of(size)}
    for node in inside_order(members):
        needed |= node.type.symbols
        for _, value in node.attrs:
            needed |= _attr_symbols(value)
    return needed <= bound


def _attr_symbols(value: Attr) -> frozenset[str]:
    if isinstance(value, tuple):
        return frozenset().union(*map(_attr_symbols, value))
    return symbols_of(value) if isinstance(value, Dim) else frozenset()
