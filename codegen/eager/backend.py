"""Lowers each node to a call of its op, and loads such calls as torch functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch

from ...autotune.store import Store
from ...ir.graph import Graph
from ...ir.interpreter import resolve_attr
from ...ir.node import Node
from ...ir.ops.control import resolve_aten
from ...ir.schema import schema
from ...targets import Target
from ..base import Kernel, KVCacheKind, Lowered, ReadFile
from ..by_sizes import BySizes
from ..lowering import Buffers, assemble
from ..program import Call, Program
from .inplace import IN_PLACE


class EagerBackend:
    """``backend="eager"``: correct everywhere, fast nowhere."""

    name = "eager"
    kv_cache: KVCacheKind = "paged"
    fuses = True
    own_kernels = False
    reads_codes = False
    reads_unseen = False

    def lower(
        self,
        graph: Graph,
        target: Target,
        max_model_len: int | None = None,
        deterministic: bool = False,
        max_sequences: int | None = None,
        tuning: Store | None = None,
    ) -> Lowered:
        """One call a node, in the graph's order."""
        buffers = Buffers(graph)
        calls = [eager_call(node, buffers) for node in graph.nodes if is_call(node)]
        return Lowered(assemble(graph, buffers, calls))

    def load(
        self,
        call: Call,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        read: ReadFile,
        device: torch.device,
    ) -> Kernel:
        """The op's torch function; ops that write caches do so in place."""
        op = call.kernel.split("/", 1)[1]
        if op == "aten":
            resolve_aten(str(call.attrs["target"]))  # a GraphError now, not in the middle of a run
        # Kernels of other loaders take buffers as dense; torch may answer in strides it likes.
        mixed = any(other.loader == "triton" for other in program.calls)
        return _EagerKernel(op, call, device, dense=mixed)


def is_call(node: Node) -> bool:
    """Whether a node computes something at run time."""
    return node.op not in ("input", "param", "item")


def eager_call(node: Node, buffers: Buffers) -> Call:
    """The call of one node by its op's reference."""
    return Call(
        f"eager/{node.op}",
        tuple(buffers.one(arg) for arg in node.args),
        buffers.of(node),
        dict(node.attrs),
        aliases=schema(node.op).aliases,
        origin=(node.op,),
    )


class _EagerKernel:
    """One op with its attributes, the symbolic sizes among them resolved."""

    def __init__(self, op: str, call: Call, device: torch.device, dense: bool = False) -> None:
        self.dense = dense
        self.function = IN_PLACE.get(op) or schema(op).reference
        attrs = dict(call.attrs)
        self.attrs = BySizes(
            lambda sizes: {name: resolve_attr(value, sizes) for name, value in attrs.items()}
        )
        self.device = device

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        # Ranges and constants are made on the default device. To have one costs every function of
        # torch a detour through Python, so it is set here alone.
        with nullcontext() if self.device.type == "cpu" else self.device:
            result = self.function(*operands, **self.attrs.at(sizes))
            results = result if isinstance(result, tuple) else (result,)
        return tuple(map(_aligned, results)) if self.dense else results


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Dense and 16-byte aligned: itself, or a copy. Caches are both, and stay in place."""
    dense = tensor.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()


BACKEND = EagerBackend()
