"""``backend="onnxruntime"``: maximal regions of a graph as ONNX models, the rest as eager calls."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...autotune.store import Store
from ...ir.graph import Graph, param_name
from ...ir.interpreter import interpret
from ...ir.node import Attr, Node
from ...targets import Target
from ..base import Kernel, KVCacheKind, Lowered, ReadFile
from ..constants import closed_graph, expand_fused
from ..eager.backend import eager_call
from ..lowering import Buffers, assemble, cache_aliases
from ..partition import Region, partition
from ..program import Call, Program
from .emitter import Emitter, Refusal
from .model import Model, assemble_model
from .probe import Probe
from .session import RegionKernel, open_session
from .table import CONVERTERS


class OnnxBackend:
    """Lowers to ONNX, and runs it with ONNX Runtime: on the CPU, or by its CUDA provider."""

    name = "onnxruntime"
    kv_cache: KVCacheKind = "slot"
    fuses = False
    own_kernels = False
    reads_codes = True
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
        """One call and one model a region, one call a node that has no place in one.

        The models hold no weights: those are handed over, by reference, when the engine starts.
        """
        graph = expand_fused(graph)
        probe, buffers = Probe(), Buffers(graph)
        for node in graph.nodes:
            if node.op != "item":
                buffers.of(node)
        refusals: dict[Node, Refusal] = {}

        def converts(node: Node) -> bool:
            refusal = None if node.op == "item" else probe(node)
            if refusal is not None:
                refusals[node] = refusal
            return refusal is None

        calls: list[Call] = []
        files: dict[str, bytes] = {}
        told: dict[str, None] = {}
        for step in partition(graph, converts):
            if isinstance(step, Region):
                path = f"onnx/model_{len(files)}.onnx"
                model = _model(graph, step, buffers, max_model_len)
                told.update(dict.fromkeys(model.notes))
                files[path] = model.proto.SerializeToString(deterministic=True)
                calls.append(_region_call(path, model, step, buffers))
            elif step.node.op != "item":
                calls.append(eager_call(step.node, buffers))
        notes = dict.fromkeys(f"{n.op} runs on eager: {r.reason}" for n, r in refusals.items())
        return Lowered(assemble(graph, buffers, calls), files, (*notes, *told))

    def load(
        self,
        call: Call,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        read: ReadFile,
        device: torch.device,
    ) -> Kernel:
        """A session of the call's model over the engine's own weights.

        Raises:
            EngineError: ONNX Runtime does not open it, or has no provider for the device.
        """
        given = {
            name: weights[source].cpu()
            for name, source in zip(_strings(call, "tensors"), call.constants, strict=False)
        }
        given.update(_computed(call, weights))
        session = open_session(read(call.kernel.split("/", 1)[1]), given, device)
        types = [program.buffers[name] for name in call.results]
        shapes = [(t.dtype.torch, t.shape) for t in types]
        return RegionKernel(session, shapes, call.aliases, device)


def _model(graph: Graph, region: Region, buffers: Buffers, max_model_len: int | None) -> Model:
    e = Emitter(graph, buffers.names, region.nodes, CONVERTERS.get, max_model_len)
    for node in region.nodes:
        if node.op != "item" and node not in e.values:
            refusal = e.emit(node)
            assert refusal is None, f"{node}: {refusal}"
    return assemble_model(e, {buffers.of(node)[0]: node for node in region.outputs})


def _region_call(path: str, model: Model, region: Region, buffers: Buffers) -> Call:
    plain = {name: node for name, node in model.folded.items() if node.op == "param"}
    computed = {name: node for name, node in model.folded.items() if node.op != "param"}
    attrs: dict[str, Attr] = {"tensors": tuple(plain)}
    constants = [param_name(node) for node in plain.values()]
    if computed:
        stem = path.rsplit("/", 1)[1].split(".")[0]
        body, names = closed_graph(f"folded_{stem}", tuple(computed.values()))
        attrs |= {"folded": body, "folded_tensors": tuple(computed), "folded_from": names}
        constants += [name for name in names if name not in constants]
    return Call(
        f"{OnnxBackend.name}/{path}",
        tuple(buffers.of(node)[0] for node in model.inputs),
        tuple(buffers.of(node)[0] for node in region.outputs),
        attrs,
        tuple(constants),
        cache_aliases(model.inputs, region.outputs),
        origin=tuple(n.op for n in region.nodes if n.op != "item"),
    )


def _computed(call: Call, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is computed once from weights alone."""
    body = call.attrs.get("folded")
    if not isinstance(body, Graph):
        return {}
    inputs = [weights[name].cpu() for name in _strings(call, "folded_from")]
    with torch.inference_mode():
        values = interpret(body, inputs)
    return dict(zip(_strings(call, "folded_tensors"), values, strict=True))


def _strings(call: Call, name: str) -> tuple[str, ...]:
    value = call.attrs.get(name, ())
    assert isinstance(value, tuple)
    return tuple(map(str, value))


BACKEND = OnnxBackend()
