"""From a graph to calls of kernels, libraries and torch, in that order of preference.

Views are no calls: kernels and libraries read through them. Where torch itself computes a node, its
operands are dense buffers, made by a copy kernel if need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ...errors import UnsupportedError
from ...ir.dims import product
from ...ir.graph import Graph
from ...ir.node import Attr, Node
from ...ir.schema import schema
from ...targets import Target
from ..eager.backend import eager_call, is_call
from ..lowering import Buffers, assemble
from ..program import Call, Program
from .candidates import INVARIANT, kernels_for
from .hand_on import find_links
from .kernels.linear import emit_linear
from .kernels.linear_tiles import ANY, Cutting
from .layout import VIEWS, Layout, is_dense, located
from .library import PREFIX, takes, views_of
from .package import kernel_id
from .source import Emit, KernelSource


def lower_graph(
    graph: Graph,
    target: Target,
    deterministic: bool = False,
    cutting: Cutting = ANY,
) -> tuple[Program, tuple[KernelSource, ...], tuple[str, ...]]:
    """A Program, the sources of its kernels (each once), and what fell back to torch, in words.

    Raises:
        UnsupportedError: ``deterministic``, and an op whose sums only a library or torch computes,
            in an order that may change with the number of rows.
    """
    lowering = _Lowering(graph, target, deterministic, cutting)
    for node in graph.nodes:
        if is_call(node) and node.op not in VIEWS:
            lowering.compute(node)
    for output in graph.outputs:
        if output.op in VIEWS:
            lowering.dense(output)
    program = assemble(graph, lowering.buffers, lowering.calls)
    return program, tuple(lowering.sources.values()), tuple(dict.fromkeys(lowering.notes))


class _Lowering:
    def __init__(self, graph: Graph, target: Target, deterministic: bool, cutting: Cutting) -> None:
        self.target, self.buffers = target, Buffers(graph)
        self.deterministic = deterministic
        self.kernels = INVARIANT if deterministic else kernels_for(cutting)
        self.cutting = cutting
        self.links = find_links(graph, target, cutting, deterministic)
        self.calls: list[Call] = []
        self.sources: dict[str, KernelSource] = {}
        self.notes: list[str] = []
        self._dense: set[Node] = set()

    def compute(self, node: Node) -> None:
        """Appends the call of a node that is no view."""
        operands = [None if arg is None else self._base(arg) for arg in node.args]
        layouts = tuple(None if pair is None else pair[1] for pair in operands)
        bases = tuple(None if pair is None else self.buffers.one(pair[0]) for pair in operands)
        source = self._source(node, layouts)
        if source is None and self.deterministic and node.op in _SUMS:
            raise _varies(node)
        if source is not None:
            self.calls.append(self._kernel_call(node, source, bases))
        elif takes(node):
            attrs: dict[str, Attr] = {**dict(node.attrs), "views": views_of(node)}
            self.calls.append(
                Call(PREFIX + node.op, bases, self.buffers.of(node), attrs, origin=(node.op,))
            )
        else:
            self._in_torch(node)

    def dense(self, node: Node) -> None:
        """Appends the copy of a view into a buffer of its own, once."""
        if node in self._dense or node.op not in VIEWS:
            return
        self._dense.add(node)
        base, layout = located(node)
        # A dense prefix of a larger buffer is dense too, but no reshape of it.
        whole = product(base.shape) == product(node.shape)
        if base is not node and whole and is_dense(layout, node.shape):
            self.dense(base)
            viewed = eager_call(node, self.buffers)  # torch makes a view of it, not a copy
            name, attrs = self.buffers.one(base), {"shape": node.shape}
            self.calls.append(
                replace(viewed, kernel="eager/reshape", operands=(name,), attrs=attrs)
            )
            return
        base, layout = self._base(node.operands[0])
        source = self._source(node, (layout,))
        if source is not None:
            name = self.buffers.one(base)
            self.calls.append(self._kernel_call(node, source, (name,)))
        else:
            self.dense(node.operands[0])
            self.calls.append(eager_call(node, self.buffers))

    def _base(self, node: Node) -> tuple[Node, Layout]:
        """The buffer that a value lies in, and where; a reshape that must copy is one of them."""
        base, layout = located(node)
        self.dense(base)
        return base, layout

    def _source(self, node: Node, layouts: tuple[Layout | None, ...]) -> KernelSource | None:
        for emit in self._emits(node):
            source = emit(node, layouts, self.target)
            if source is not None:
                return self.sources.setdefault(kernel_id(source), source)
        assert self.links.hands(node) is None, "what is linked is what kernels take"
        return None

    def _emits(self, node: Node) -> Sequence[Emit]:
        hands = self.links.hands(node)
        if hands is None:
            return self.kernels.get(node.op, ())
        return (partial(emit_linear, cutting=self.cutting, hands=hands),)

    def _kernel_call(self, node: Node, source: KernelSource, bases: tuple[str | None, ...]) -> Call:
        call = Call(
            f"triton/{source.kind}/{kernel_id(source)}",
            bases,
            self.buffers.of(node),
            aliases=schema(node.op).aliases,
            origin=_origin(node),
        )
        return self.links.extended(call, node, self.buffers)

    def _in_torch(self, node: Node) -> None:
        for operand in node.operands:
            self.dense(operand)
        self.calls.append(eager_call(node, self.buffers))
        if node.op not in _FREE:
            what = node.attr("target") if node.op == "aten" else node.op
            types = ", ".join(map(str, node.types))
            self.notes.append(f"{what}: runs in torch, no kernel takes {types}")


_FREE = frozenset({"const", "iota", "dim_value"})
_SUMS = frozenset(
    {"linear", "matmul", "conv", "attention", "paged_attention", "moe_experts", "fused", "cumsum"}
    | {"scaled_linear"}
)


def _varies(node: Node) -> UnsupportedError:
    return UnsupportedError(
        f"deterministic=True with {node.op} over {node.value_type}",
        expected="an op that a kernel of ours computes, row by row in one order",
        found="one that a library or torch computes, in an order that may change with the batch",
        remedy="Compile without deterministic=True.",
    )


def _origin(node: Node) -> tuple[str, ...]:
    body = node.attr("body")
    return tuple(n.op for n in body.calls()) if isinstance(body, Graph) else (node.op,)
