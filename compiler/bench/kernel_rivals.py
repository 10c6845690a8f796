"""What else computes the op of a call: torch op by op, torch.compile, a library.

Each is prepared for a set of the call's operands, and then launched without arguments, so that all
are timed on the same operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from ...codegen.eager.inplace import IN_PLACE
from ...ir.graph import Graph
from ...ir.interpreter import bind_symbols, resolve_attr
from ...ir.node import Node
from ...ir.schema import schema
from ..regress.timing.problems import Operands, Problem
from .step_calls import StepCall

NAMES = ("torch.compile", "eager", "library")

MOST_NODES = 400
"""For torch.compile: a reference that goes from sequence to sequence is traced as one long list."""

Launch: TypeAlias = Callable[[], Any]
Prepare: TypeAlias = Callable[[Operands], Launch]
Compiler: TypeAlias = Callable[[torch.nn.Module], Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class KernelRival:
    """One that does what a call does.

    Attributes:
        name: as in ``NAMES``.
        label: what it is, for reading.
        prepare: gives a launch on operands of the call.
        is_whole: whether it gives the call's results; a library may compute its main part alone.
    """

    name: str
    label: str
    prepare: Prepare
    is_whole: bool = True


class Unavailable(Exception):
    """There is no such rival; the text says why."""


def prepare_ours(problem: Problem) -> Prepare:
    """The call's own kernel."""
    return lambda operands: lambda: problem.kernel(operands, problem.sizes)


def make_rival(name: str, call: StepCall, compiler: Compiler | None = None) -> KernelRival:
    """The rival of a name in ``NAMES``.

    Args:
        name: of it.
        call: what it has to do.
        compiler: for "torch.compile"; by default that.

    Raises:
        Unavailable: nothing of that name computes the call.
    """
    try:
        if name == "library":
            return _library(call)
        module = trace(call)
    except LookupError as error:
        raise Unavailable(str(error)) from error
    if name == "eager":
        return KernelRival(name, "eager", _prepared(call, module))
    size = len(getattr(module, "graph", torch.fx.Graph()).nodes)
    if size > MOST_NODES:
        raise Unavailable(
            f"torch would be given {size} operations: the reference is no model of it"
        )
    compiled = (compiler or _torch_compile)(module)
    return KernelRival(name, "torch.compile", _prepared(call, compiled))


def trace(call: StepCall) -> torch.nn.Module:
    """The references of a call's ops as one torch module over its node's arguments: what torch is
    given, without this package's interpreter between. What it reads of the operands (lengths) is
    taken as constant.

    Raises:
        LookupError: the call is not of one node, or is not given all of its arguments.
        Unavailable: a reference that cannot be traced.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    # Copies, for it runs while it is traced, and may write in place.
    args = call.arguments(tuple(None if x is None else x.clone() for x in call.problem.operands))
    node = call.nodes[0]
    function = IN_PLACE.get(node.op) or schema(node.op).reference
    attrs = {name: resolve_attr(value, call.problem.sizes) for name, value in node.attrs}
    try:
        traced: torch.nn.Module = make_fx(lambda *given: function(*given, **attrs))(*args)
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        raise Unavailable(f"torch cannot trace it: {text}") from error
    return traced


def _torch_compile(module: torch.nn.Module) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(module, fullgraph=True, dynamic=False)
    return compiled


def _prepared(call: StepCall, function: Callable[..., Any]) -> Prepare:
    def prepare(operands: Operands) -> Launch:
        args = call.arguments(operands)
        return lambda: function(*args)

    return prepare


def _library(call: StepCall) -> KernelRival:
    if call.problem.call.kind == "library":
        raise Unavailable("it is the library's already")
    call.arguments(call.problem.operands)
    node = call.nodes[0]
    if node.op == "paged_attention":
        return KernelRival("library", *_attention(call, node))
    return KernelRival("library", "cuBLAS, products alone", _products(call, node), False)


def _products(call: StepCall, node: Node) -> Prepare:
    """The products of a node by ``F.linear``, each on random rows."""
    found = _weights(call, node)
    if not found:
        raise Unavailable("no library computes it")

    def prepare(operands: Operands) -> Launch:
        args = call.arguments(operands)
        pairs = []
        for index, rows in found:
            weight = args[index]
            assert weight is not None
            pairs.append((weight.new_empty(rows, weight.shape[1]).normal_(), weight))
        return lambda: [F.linear(x, weight) for x, weight in pairs]

    return prepare


def _weights(call: StepCall, node: Node) -> list[tuple[int, int]]:
    """(which argument is the weight, rows of x) of each product of a node."""
    args = call.arguments(call.problem.operands)
    if node.op == "linear":
        assert args[0] is not None and args[1] is not None
        return [(1, args[0].numel() // args[1].shape[1])]
    body = node.attr("body")
    if node.op != "fused" or not isinstance(body, Graph):
        return []
    sizes = bind_symbols(body, [x for x in args if x is not None])
    return [
        (body.inputs.index(weight), _rows(x, sizes))
        for x, weight in (n.operands[:2] for n in body.calls() if n.op == "linear")
        if weight in body.inputs
    ]


def _rows(x: Node, sizes: dict[str, int]) -> int:
    shape: tuple[int, ...] = resolve_attr(x.shape, sizes)
    return torch.Size(shape[:-1]).numel()


def _attention(call: StepCall, node: Node) -> tuple[str, Prepare]:
    """torch's attention on a dense cache: cuDNN where it takes it, else flash."""
    own = [name for name in ("window", "softcap") if node.attr(name) is not None]
    own += [name for name, arg in zip(("sinks", "alibi"), node.args[6:], strict=False) if arg]
    if own:
        raise Unavailable(f"no library attends with {', '.join(own)}")
    scale = node.attr("scale")

    def prepare(operands: Operands) -> Launch:
        q, k, v, causal = _dense(call.arguments(operands))
        return lambda: _sdpa(q, k, v, causal, scale)

    return "cuDNN, dense cache", prepare


def _dense(args: Operands) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """q [B, H, S, D], K and V [B, G, S, D] of sequences that are all of one length."""
    q, k_cache, v_cache, tables, lens = args[:5]
    assert q is not None and k_cache is not None and v_cache is not None
    assert tables is not None and lens is not None
    count, length = len(lens), int(lens[0])
    new = q.shape[0] // count
    queries = q.view(count, new, *q.shape[1:]).transpose(1, 2).contiguous()
    k, v = (
        cache[tables.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous()
        for cache in (k_cache, v_cache)
    )
    return queries, k, v, new > 1


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: Any) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
