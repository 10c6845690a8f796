"""``backend="tensorrt"``: maximal regions of a graph over slots as engines, the rest as eager
calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import torch

from ...autotune.store import Store
from ...ir.graph import Graph
from ...ir.node import Node
from ...targets import Target
from ..base import Kernel, KVCacheKind, Lowered, ReadFile
from ..constants import expand_fused
from ..decoder import caches_of
from ..eager.backend import eager_call
from ..lowering import Buffers, assemble, cache_aliases
from ..partition import Region, Single, partition
from ..program import Call, Program
from .builder import build_engine
from .decoder import told
from .flavor import RTX, Flavor, find_flavor
from .kernel import OwnEngine, RegionKernel, load_run
from .profiles import decoder_profiles
from .regions import Piece, lower_region, refusals

_WORTH = frozenset({"linear", "scaled_linear", "slot_attention"})
"""Ops without which a region is left to torch: an engine costs more than it saves."""
NO_PLUGINS = "TensorRT for RTX takes no plugins: none of our kernels stands in for a layer"
_FEWEST = 8  # sequences at once, where nobody says


class TensorRTBackend:
    """Lowers to networks, builds their engines without a GPU where the flavor can, and runs them
    with the TensorRT that built them.
    """

    name = "tensorrt"
    kv_cache: KVCacheKind = "slot"
    fuses = False
    own_kernels = False
    reads_codes = False  # of few checkpoints: not of those with zero points, or int8 in groups
    reads_unseen = True

    def lower(
        self,
        graph: Graph,
        target: Target,
        max_model_len: int | None = None,
        deterministic: bool = False,
        max_sequences: int | None = None,
        tuning: Store | None = None,
    ) -> Lowered:
        """One call and one engine a region, one call a node that has no place in one; all of them
        where the graph is no causal LM's over slots. Engines hold their weights.

        Raises:
            UnsupportedError: no TensorRT is installed, or it does not build for the target, or it
                refuses a region.
        """
        graph = expand_fused(graph)
        buffers = Buffers(graph)
        for node in graph.nodes:
            if node.op != "item":
                buffers.of(node)
        refused = refusals(graph, buffers.names, max_model_len or 1)
        notes = [f"{text} runs on eager" for text in told(refused, {})]
        if refused and find_flavor().name == RTX:
            notes.append(NO_PLUGINS)
        steps, light = _plan(graph, set(refused))
        if light:
            ops = ", ".join(dict.fromkeys(node.op for node in light))
            notes.append(f"too few to be worth an engine run on eager: {ops}")
        calls: list[Call] = []
        files: dict[str, bytes] = {}
        build = _Build(graph, buffers, target, max_model_len or 1, max_sequences or _FEWEST)
        for step in steps:
            if isinstance(step, Region):
                path = f"tensorrt/region_{len(files) // 2}.engine"
                piece, engine, more = build(step)
                notes.extend(more)
                files[path] = engine
                files[path.replace(".engine", ".txt")] = f"{piece.network}\n".encode()
                calls.append(_region_call(path, build.flavor, piece, step, buffers))
            elif step.node.op != "item":
                calls.append(eager_call(step.node, buffers))
        unique = tuple(dict.fromkeys(notes))
        return Lowered(assemble(graph, buffers, calls), files, unique)

    def load(
        self,
        call: Call,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        read: ReadFile,
        device: torch.device,
    ) -> Kernel:
        """A region on the device; on a CPU, by the reference of its layers, where this process made
        the engine: so its numbers are compared without the GPU that it is for.

        Raises:
            EngineError: TensorRT does not open it, or is missing.
        """
        return RegionKernel(call, program, load_run(call, read, device))


def _plan(graph: Graph, refused: set[Node]) -> tuple[list[Region | Single], list[Node]]:
    """Regions and single nodes in order, and the nodes that are single for want of company."""
    steps = partition(graph, lambda node: node not in refused)
    light = [
        node
        for step in steps
        if isinstance(step, Region) and not any(n.op in _WORTH for n in step.nodes)
        for node in step.nodes
        if node.op != "item"
    ]
    if light:
        out = refused | set(light)
        steps = partition(graph, lambda node: node not in out)
    return steps, light


class _Build:
    """Builds the engines of a graph."""

    def __init__(
        self, graph: Graph, buffers: Buffers, target: Target, max_model_len: int, batch: int
    ) -> None:
        self.graph, self.buffers, self.target = graph, buffers, target
        self.max_model_len, self.batch = max_model_len, batch
        self.flavor: Flavor = find_flavor()
        self.names = {
            **buffers.names,
            **{node: cache.past for node, cache in caches_of(graph).items()},
        }

    def __call__(self, region: Region) -> tuple[Piece, bytes, Sequence[str]]:
        """A region's network, its engine and notes on it."""
        outputs = {self.buffers.of(node)[0]: node for node in region.outputs}
        piece = lower_region(self.graph, region.nodes, outputs, self.names, self.max_model_len)
        profiles = decoder_profiles(self.batch, self.max_model_len)
        file = BytesIO()
        built = build_engine(piece.network, self.flavor, [self.target.arch], profiles, file)
        return piece, OwnEngine.of(file.getvalue(), piece.network), built.notes


def _region_call(path: str, flavor: Flavor, piece: Piece, region: Region, buffers: Buffers) -> Call:
    return Call(
        f"{TensorRTBackend.name}/{path}",
        tuple(buffers.of(node)[0] for node in piece.inputs),
        tuple(buffers.of(node)[0] for node in region.outputs),
        {
            "inputs": tuple(tensor.name for tensor in piece.network.inputs),
            "flavor": flavor.name,
            "version": flavor.version,
        },
        aliases=cache_aliases(piece.inputs, region.outputs),
        origin=tuple(n.op for n in region.nodes if n.op != "item"),
    )


BACKEND = TensorRTBackend()
