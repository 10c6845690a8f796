"""From a graph to calls of kernels, libraries and torch, in that order of preference.

Where a tuner found that a product is faster in a library at some numbers of tokens, the calls of
both are there, with guards (shares.py).

Views are no calls: kernels and libraries read through them. Where torch itself computes a node, its
operands are dense buffers, made by a copy kernel if need be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from ...errors import UnsupportedError
from ...ir.dims import Size, product
from ...ir.graph import Graph
from ...ir.node import Attr, Node
from ...ir.schema import schema
from ...targets import Target
from ..eager.backend import eager_call, is_call
from ..lowering import Buffers, assemble
from ..program import SHARED, Call, Program
from .candidates import INVARIANT, kernels_for
from .cuts import Cuts
from .fresh import Fresh
from .hand_on import find_links
from .kernels.cascade import cascade_operands, emit_cascade
from .kernels.linear import emit_linear, linear_source
from .kernels.linear_hands import Hands
from .kernels.linear_tiles import ANY, Cutting
from .kernels.wide_linear import wide_source
from .layout import VIEWS, Layout, is_dense, located
from .library import PREFIX, takes, views_of
from .package import kernel_id
from .quant_unfused import separated
from .shares import Share, Shares
from .source import Emit, KernelSource
from .wide import Wide, find_wide


def lower_graph(
    graph: Graph,
    target: Target,
    deterministic: bool = False,
    cutting: Cutting = ANY,
    cuts: Cuts | None = None,
    joins: bool = True,
) -> tuple[Program, tuple[KernelSource, ...], tuple[str, ...]]:
    """A Program, the sources of its kernels (each once), and what fell back to torch, in words.

    Args:
        graph: what is computed.
        target: where.
        deterministic: whether a row's sums come in one order, whatever it is computed with.
        cutting: of decode products.
        cuts: of what else has a choice.
        joins: whether products of many tokens may be kernels of ours (wide.py).

    Raises:
        UnsupportedError: ``deterministic``, and an op whose sums only a library or torch computes,
            in an order that may change with the number of rows.
    """
    lowering = _Lowering(graph, target, deterministic, cutting, cuts)
    if joins and not deterministic:
        lowering.wide = find_wide(graph, target, cuts)
    for node in graph.nodes:
        if is_call(node) and node.op not in VIEWS:
            lowering.compute(node)
    for output in graph.outputs:
        if output.op in VIEWS:
            lowering.dense(output)
    program = assemble(graph, lowering.buffers, lowering.calls)
    return program, tuple(lowering.sources.values()), tuple(dict.fromkeys(lowering.notes))


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        target: Target,
        deterministic: bool,
        cutting: Cutting,
        cuts: Cuts | None,
    ) -> None:
        self.target, self.buffers = target, Buffers(graph)
        self.deterministic = deterministic
        self.kernels = INVARIANT if deterministic else kernels_for(cutting, cuts)
        self.cutting = cutting
        self.links = find_links(graph, target, cutting, deterministic)
        self.shares = Shares(self.links, ANY if deterministic else cutting, target)
        self.wide: Mapping[Node, Wide] = {}
        self.calls: list[Call] = []
        self.sources: dict[str, KernelSource] = {}
        self.notes: list[str] = []
        self._dense: set[Node] = set()

    def compute(self, node: Node) -> None:
        """Appends the call of a node that is no view, or those of its shares."""
        if node in self.wide:
            self._compute_wide(node, self.wide[node])
            return
        shares = self.shares.of(node)
        if shares is None:
            self._compute(node)
            return
        bases = tuple(self.buffers.one(self._base(arg)[0]) for arg in node.operands)
        for share in shares:
            if share.library is None:
                source = self._share_source(share)
                self.calls.append(self._kernel_call(node, source, bases, share.handed, share.guard))
                continue
            with self._named(share.library.buffers_of(self.buffers)), self._guarded(share.guard):
                for _, part in share.library.parts:
                    self._compute(part)

    def _compute(self, node: Node) -> None:
        operands = [None if arg is None else self._base(arg) for arg in node.args]
        layouts = tuple(None if pair is None else pair[1] for pair in operands)
        bases = tuple(None if pair is None else self.buffers.one(pair[0]) for pair in operands)
        source = self._source(node, layouts)
        if source is None and self.deterministic and node.op in _SUMS:
            raise _varies(node)
        if source is not None:
            otherwise = (*self._fresh(node), *self._cascade(node, layouts))
            self.calls.append(self._kernel_call(node, source, bases, guard=otherwise))
        elif takes(node):
            attrs: dict[str, Attr] = {**dict(node.attrs), "views": views_of(node.args)}
            chosen = self.cutting.chosen
            backend = chosen.attention(node) if chosen and node.op == "attention" else None
            attrs |= {} if backend is None else {"backend": backend}
            self.calls.append(
                Call(PREFIX + node.op, bases, self.buffers.of(node), attrs, origin=(node.op,))
            )
        elif (separate := separated(node)) is not None:
            with self._named(separate.buffers_of(self.buffers)):
                for _, part in separate.parts:
                    self._compute(part)
        else:
            self._in_torch(node)

    def _fresh(self, node: Node) -> tuple[Size, ...]:
        """Appends the library's share of attention in steps of one new prompt, if it has one; the
        guard of the kernel's.
        """
        fresh = None if self.deterministic else Fresh.of(node, self.target)
        if fresh is None:
            return ()
        bases = tuple(self.buffers.one(self._base(arg)[0]) for arg in fresh.operands)
        attrs = {**fresh.attrs, "views": views_of(fresh.operands), "backend": "cudnn"}
        results, origin = self.buffers.of(node), _origin(node)
        self.calls.append(
            Call(
                PREFIX + "fresh_attention", bases, results, attrs, origin=origin, guard=fresh.guard
            )
        )
        return fresh.otherwise

    def _cascade(self, node: Node, layouts: tuple[Layout | None, ...]) -> tuple[Size, ...]:
        """Appends the call of attention in steps whose sequences share pages, if there is one; the
        guard of the other call. A deterministic Program, as the sums of a row would depend on its
        group, has no decode attention at all.
        """
        source = emit_cascade(node, layouts, self.target)
        if source is None:
            return ()
        operands = cascade_operands(node)
        bases = tuple(
            None if arg is None else self.buffers.one(self._base(arg)[0]) for arg in operands
        )
        call = self._kernel_call(node, self._once(source), bases, False, (SHARED - 1,))
        self.calls.append(call)
        return (0 - SHARED,)

    def _compute_wide(self, node: Node, wide: Wide) -> None:
        """Appends a node's calls in the library's shares, and our kernel's behind the last one."""
        product = wide.product
        for arg in node.operands:  # a copy of what both read is made at any size
            self._base(arg)
        for share in wide.shares:
            if share.tiles is None:
                with self._guarded(share.guard):
                    self._compute(node)
            elif node is product.last:
                source = self._once(wide_source(product.problem, self.target, share.tiles))
                joined = product.problem.node
                bases = tuple(self.buffers.one(self._base(arg)[0]) for arg in joined.operands)
                call = self._kernel_call(node, source, bases, linked=False, guard=share.guard)
                self.calls.append(replace(call, origin=_origin(joined)))

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
                return self._once(source)
        assert self.links.hands(node) is None, "what is linked is what kernels take"
        return None

    def _share_source(self, share: Share) -> KernelSource:
        """The template with the cuts of a share alone."""
        problem = share.problem
        gemv = self.cutting.gemv(problem, self.target) if share.one_token else None
        hands = self.links.hands(problem.node) if share.handed else None
        source = linear_source(problem, self.target, gemv, share.gemms, hands or Hands())
        assert source is not None, "a part of the cuts of a kernel that there is"
        return self._once(source)

    def _once(self, source: KernelSource) -> KernelSource:
        return self.sources.setdefault(kernel_id(source), source)

    @contextmanager
    def _named(self, names: Mapping[Node, str]) -> Iterator[None]:
        """Inside, nodes have these buffers: those of a product's parts. Nodes that are alike are
        one, and another product's parts, or the graph's own nodes, may be like these.
        """
        known = self.buffers.names
        before = {node: known[node] for node in names if node in known}
        known.update(names)
        yield
        for node in names:
            del known[node]
        known.update(before)

    @contextmanager
    def _guarded(self, guard: tuple[Size, ...]) -> Iterator[None]:
        """Calls that are appended inside have this guard."""
        start = len(self.calls)
        yield
        added = self.calls[start:]
        assert not any(call.aliases for call in added), "guarded calls write buffers of their own"
        self.calls[start:] = [replace(call, guard=guard) for call in added]

    def _emits(self, node: Node) -> Sequence[Emit]:
        hands = self.links.hands(node)
        if hands is None:
            return self.kernels.get(node.op, ())
        return (partial(emit_linear, cutting=self.cutting, hands=hands),)

    def _kernel_call(
        self,
        node: Node,
        source: KernelSource,
        bases: tuple[str | None, ...],
        linked: bool = True,
        guard: tuple[Size, ...] = (),
    ) -> Call:
        call = Call(
            f"triton/{source.kind}/{kernel_id(source)}",
            bases,
            self.buffers.of(node),
            aliases=schema(node.op).aliases,
            origin=_origin(node),
            guard=guard,
        )
        return self.links.extended(call, node, self.buffers) if linked else call

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
    | {"scaled_linear", "scaled_paged_attention"}
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
