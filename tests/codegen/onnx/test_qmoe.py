"""Experts in codes by QMoE, in ONNX Runtime, beside the interpreter; and what it does not take."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch

from onnx_running import Held
from tilewright.codegen.onnx.export import export_decoder
from tilewright.codegen.onnx.standard import CONVERTERS_OF
from tilewright.ir.build import input_node, make, param, reshape
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Attr, Node
from tilewright.ir.types import TensorType

EXPERTS, CHOSEN, VOCAB = 4, 2, 12


@dataclass(frozen=True)
class Form:
    """Tables of experts in ``codes`` by ``group``."""

    codes: DType = DType.U8
    group: int = 32
    zeros: bool = False
    biases: bool = False
    compute: DType | None = None
    activation: str = "silu"
    interleaved: bool = False
    alpha: float | None = None
    limit: float | None = None
    width: int = 64
    inner: int = 32


FORMS = {
    "4 bits": Form(),
    "whole rows": Form(group=0),
    "zero points": Form(group=16, zeros=True),
    "gpt-oss": Form(biases=True, interleaved=True, alpha=1.702, limit=2.0),
    "biases": Form(biases=True),
    "8 bits": Form(DType.I8, group=0),
    "rounded": Form(DType.I8, compute=DType.I8),
    "4 bits, rounded": Form(compute=DType.I8),
}
REFUSED = {
    "columns end within a group of 32": Form(inner=48),
    "no power of two": Form(group=48, width=96, inner=48),
    "their activation is relu": Form(activation="relu"),
    "activations are rounded": Form(DType.I8),
    "other than whole ones": Form(DType.U8, group=0, zeros=True),
}


def graph_of(form: Form) -> Graph:
    """Logits of tokens from a table of embeddings, by one layer of experts and nothing else."""
    generator = torch.Generator().manual_seed(2)
    held: dict[str, torch.Tensor] = {}

    def weight(name: str, tensor: torch.Tensor) -> Node:
        held[name] = tensor
        return param(name, TensorType(DType.from_torch(tensor.dtype), tuple(tensor.shape)))

    def table(name: str, rows: int, columns: int) -> Node:
        four, count = form.codes is DType.U8, EXPERTS * rows
        groups = columns // form.group + bool(columns % form.group) if form.group else 1
        stored = groups * form.group or columns
        shape = (count, stored // 2 if four else columns)
        low, high = (0, 256) if four else (-127, 128)
        codes = torch.randint(low, high, shape, generator=generator).to(form.codes.torch)
        scale = torch.rand(count, groups, generator=generator) * (0.02 if four else 0.002) + 0.001
        zero = torch.randint(0, 16, (count, groups), generator=generator).to(torch.uint8)
        dense = make(
            "dequantize",
            weight(f"{name}.codes", codes),
            weight(f"{name}.scale", scale),
            weight(f"{name}.zero", zero) if form.zeros else None,
            dtype=DType.F32,
            group=form.group,
            width=columns if four else None,
            compute=form.compute,
        )
        return reshape(dense, EXPERTS, rows, columns)

    def drawn(name: str, *shape: int) -> Node:
        return weight(name, torch.randn(shape, generator=generator))

    ids, rows = (
        input_node(name, TensorType(DType.I64, (symbol(size),)))
        for name, size in (("token_ids", "T"), ("logits_indices", "R"))
    )
    x = make("embedding", drawn("embed", VOCAB, form.width), ids)
    shares = make("linear", x, drawn("router", EXPERTS, form.width))
    top = make("topk", shares, k=CHOSEN, dim=1, largest=True, sorted=True)
    weights, experts = (make("item", top, index=i) for i in (0, 1))
    tables = (table("up", 2 * form.inner, form.width), table("down", form.width, form.inner))
    biases = (
        (drawn("up.bias", EXPERTS, 2 * form.inner), drawn("down.bias", EXPERTS, form.width))
        if form.biases
        else ()
    )
    attrs: dict[str, Attr] = {"activation": form.activation, "interleaved": form.interleaved}
    attrs |= {"alpha": form.alpha, "limit": form.limit}
    softmax = make("softmax", weights, dim=1)
    mixed = make("moe_experts", x, experts, softmax, *tables, *biases, **attrs)
    logits = make("index_select", mixed, rows, dim=0)
    return Graph("g", (ids, rows), (logits,), {name: Held(t) for name, t in held.items()})


def run(graph: Graph) -> tuple[torch.Tensor, list[str], tuple[str, ...]]:
    """Logits of every token, the ops of the emitted model, and its notes."""
    exported = export_decoder(graph, CONVERTERS_OF["onnxruntime"], {}, 16)
    proto = onnx_ir.to_proto(exported.model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    every = torch.arange(VOCAB)[None].numpy()
    (found,) = session.run(None, {"input_ids": every, "logits_indices": every})
    ops = [node.op_type for node in proto.graph.node]
    return torch.from_numpy(found)[0], ops, exported.notes


def error(graph: Graph, found: torch.Tensor) -> float:
    (wanted,) = interpret(graph, [torch.arange(VOCAB), torch.arange(VOCAB)])
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_experts_in_codes(form: Form) -> None:
    graph = graph_of(form)
    found, ops, notes = run(graph)
    assert ops.count("QMoE") == 1 and "Gemm" not in ops[ops.index("QMoE") :] and not notes
    assert error(graph, found) < (2e-6 if form.compute is None else 0.03)


@pytest.mark.parametrize(("told", "form"), REFUSED.items())
def test_what_it_does_not_take_is_expanded_with_a_note(told: str, form: Form) -> None:
    graph = graph_of(form)
    found, ops, notes = run(graph)
    assert "QMoE" not in ops and len(notes) == 1 and told in notes[0]
    assert error(graph, found) < 2e-6


def test_numbers_stay_numbers() -> None:
    graph = graph_of(Form())
    (picked,) = graph.outputs
    mixed = picked.operands[0]
    tables = {
        f"{i}": interpret(Graph("w", (), (t,), graph.weights), [])
        for i, t in enumerate(mixed.operands[3:])
    }
    dense = [param(n, TensorType(DType.F32, tuple(t.shape))) for n, (t,) in tables.items()]
    other = make("moe_experts", *mixed.operands[:3], *dense, **dict(mixed.attrs))
    graph = graph.with_weights({n: Held(t) for n, (t,) in tables.items()})
    graph = graph.with_outputs((make("index_select", other, picked.operands[1], dim=0),))
    found, ops, notes = run(graph)
    assert "QMoE" not in ops and not notes and error(graph, found) < 2e-6
