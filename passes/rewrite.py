"""The rewrite engine: rules are tried on every node, operands first, until none applies.

A rule sees nodes whose operands are in normal form already, and answers with a node of the same
type or with None.
Whatever it builds is brought to normal form in turn, so rules never need to simplify their own
results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..errors import GraphError
from ..ir.build import make, param
from ..ir.build import rebuild as rebuild
from ..ir.dtypes import DType
from ..ir.graph import Graph, Weight
from ..ir.node import Attr, Node
from ..ir.types import TensorType

MAX_FIRINGS = 200  # rules that follow one another on one node; real chains have under ten
MAX_SWEEPS = 12


@dataclass(slots=True)
class Context:
    """What a rule may know beyond its node: weights, and how often a value is used.

    Attributes:
        weights: the graph's weights by name, with those that rules added.
        uses: users of each node in the graph that the sweep started from; nodes that rules made
        count as used once.
        graph: the graph that the sweep started from, None outside of a sweep.
        memo: what rules found out about that graph.
    """

    weights: dict[str, Weight]
    uses: Counter[Node] = field(default_factory=Counter)
    graph: Graph | None = None
    memo: dict[str, object] = field(default_factory=dict)

    def single_use(self, node: Node) -> bool:
        """Whether at most one node (or output) reads ``node``: replacing that reader makes it
        disappear.
        """
        return self.uses[node] <= 1

    def add_weight(self, name: str, weight: Weight) -> Node:
        """Enters a weight and returns its param; another weight of that name gets a numbered
        name.
        """
        unique, count = name, 1
        while unique in self.weights and self.weights[unique] != weight:
            count += 1
            unique = f"{name}.{count}"
        self.weights[unique] = weight
        return param(unique, TensorType(DType.from_torch(weight.dtype), tuple(weight.shape)))


Apply: TypeAlias = Callable[[Node, Context], Node | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """A named rewrite of nodes with one of the ``ops``: ``apply`` gives the replacement, or
    None to decline.
    """

    name: str
    ops: tuple[str, ...]
    apply: Apply


def rule(*ops: str) -> Callable[[Apply], Rule]:
    """Declares a function ``(node, context) -> Node | None`` as a rule for nodes of the given
    ops.
    """
    return lambda function: Rule(function.__name__, ops, function)


def rewrite(graph: Graph, rules: Iterable[Rule]) -> Graph:
    """Applies ``rules`` everywhere, also in nested graphs, until nothing changes.

    Args:
        graph: left as it is. Its inputs stay, even unused ones.
        rules: tried in this order on each node.

    Returns:
        The rewritten graph; weights that no node names are dropped.

    Raises:
        GraphError: a rule changed a node's type, or rules undo one another.
    """
    table: dict[str, list[Rule]] = {}
    for each in rules:
        for op in each.ops:
            table.setdefault(op, []).append(each)
    bodies: dict[Graph, Graph] = {}
    for _ in range(MAX_SWEEPS):
        sweep = _Sweep(table, Context(dict(graph.weights), graph=graph), graph, bodies)
        swept = sweep.run()
        if not sweep.fired:
            return swept
        graph = swept
    raise _no_fixed_point(sweep.fired[-5:], f"no fixed point after {MAX_SWEEPS} sweeps")


def substitute(graph: Graph, replacements: Mapping[Node, Node]) -> Graph:
    """The graph with nodes exchanged; what replaces them is not searched again.

    Types may change: users are made anew, so their types follow.
    """
    values: dict[Node, Node] = dict(replacements)
    for node in graph.nodes:
        if node not in values:
            values[node] = rebuild(node, values)
    return graph.with_outputs(tuple(values[output] for output in graph.outputs))


class _Sweep:
    """One bottom-up pass. ``normal`` maps nodes to their normal form; ``next`` a node to what
    it became so far.
    """

    def __init__(
        self,
        table: Mapping[str, Sequence[Rule]],
        context: Context,
        graph: Graph,
        bodies: dict[Graph, Graph],
    ) -> None:
        self.table, self.context, self.graph, self.bodies = table, context, graph, bodies
        self.normal: dict[Node, Node] = {node: node for node in graph.inputs}
        self.next: dict[Node, Node] = {}
        self.names: dict[Node, str] = {}
        self.fired: list[str] = []
        self.old_uses: Counter[Node] = Counter(graph.outputs)
        for node in graph.nodes:
            self.old_uses.update(set(node.operands))

    def run(self) -> Graph:
        for node in self.graph.nodes:
            self.normalise(node)
            # Before its users are looked at, so that single-use guards hold for them.
            self.context.uses[self.normal[node]] += self.old_uses[node]
        outputs = tuple(self.normal[output] for output in self.graph.outputs)
        return replace(self.graph, weights=self.context.weights).with_outputs(outputs)

    def normalise(self, root: Node) -> None:
        """Fills ``normal[root]``, with a stack of its own: graphs are thousands of nodes deep."""
        stack, waiting = [root], {root}
        while stack:
            node = stack[-1]
            needed = self.step(node)
            if needed is None:
                waiting.discard(stack.pop())
                continue
            if needed in waiting or len(stack) > len(self.graph.nodes) + MAX_FIRINGS:
                raise _no_fixed_point(self.fired[-4:], f"{node} leads back to itself")
            waiting.add(needed)
            stack.append(needed)

    def step(self, node: Node) -> Node | None:
        """Brings ``node`` one step further; returns a node whose normal form it needs first,
        None when done.
        """
        if node in self.normal:
            return None
        target = self.next.get(node)
        if target is None:
            for operand in node.operands:
                if operand not in self.normal:
                    return operand
            target = self.in_bodies(rebuild(node, self.normal))
            if target is node:
                target = self.fire(node)
            self.next[node] = target
        if target is not node and target not in self.normal:
            return target
        self.normal[node] = self.normal.get(target, target)
        return None

    def fire(self, node: Node) -> Node:
        """The answer of the first rule that applies, ``node`` itself when none does."""
        for each in self.table.get(node.op, ()):
            result = each.apply(node, self.context)
            if result is None or result is node:
                continue
            if result.value_type != node.value_type:
                raise GraphError(
                    f"rule {each.name} on {node}",
                    expected=f"a replacement of type {node.value_type}",
                    found=str(result.value_type),
                    remedy="Correct the rule; it must keep the type.",
                )
            self.fired.append(each.name)
            return result
        return node

    def in_bodies(self, node: Node) -> Node:
        """``node`` with the graphs in its attributes rewritten too."""
        if not any(isinstance(value, Graph) for _, value in node.attrs):
            return node
        attrs: dict[str, Attr] = {name: self.body(value) for name, value in node.attrs}
        return make(node.op, *node.args, **attrs)

    def body(self, value: Attr) -> Attr:
        if not isinstance(value, Graph):
            return value
        if value not in self.bodies:
            rules = dict.fromkeys(each for found in self.table.values() for each in found)
            self.bodies[value] = rewrite(value, rules)
            self.bodies[self.bodies[value]] = self.bodies[value]
        return self.bodies[value]


def _no_fixed_point(names: Sequence[str], found: str) -> GraphError:
    return GraphError(
        f"rewrite rules {', '.join(dict.fromkeys(names))}",
        expected="a fixed point",
        found=found,
        remedy="Make one of the rules decline what the others produce.",
    )
