"""Products of e4m3 codes as Q/DQ of the standard, in ONNX Runtime, beside the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch

from onnx_running import Held
from tilewright.codegen.onnx.export import export_decoder
from tilewright.codegen.onnx.standard import CONVERTERS_OF
from tilewright.errors import UnsupportedError
from tilewright.ir.build import input_node, item, make, param
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.types import TensorType

VOCAB, COUNT = 20, 7


@dataclass(frozen=True)
class Form:
    """Scales of a weight by ``rows`` (0: all) and ``group``; ``x`` is rounded "token", "tensor",
    "block", or not at all.
    """

    width: int
    rows: int = 1
    group: int = 0
    x: str = ""
    dtype: DType = DType.F32


FORMS = {
    "rows": Form(12),
    "tensor": Form(12, rows=0),
    "blocks": Form(20, rows=4, group=8),
    "float16 blocks": Form(16, rows=4, group=8, dtype=DType.F16),
    "tokens": Form(12, x="token"),
    "tensors": Form(12, rows=0, x="tensor"),
    "blocks of both": Form(20, rows=4, group=8, x="block"),
    "bfloat16 tokens": Form(12, x="token", dtype=DType.BF16),
}


def product_of(form: Form) -> Graph:
    """Logits [R, COUNT] of tokens from a table, by a product as ``form`` has it."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(VOCAB, form.width, generator=generator)
    table[3] = 0.0  # a row without a magnitude has a scale of 1
    table[4] *= 1e3
    groups = -(-form.width // form.group) if form.group else 1
    numbers = -(-COUNT // form.rows) if form.rows else 1
    held = {
        "table": table.to(form.dtype.torch),
        "codes": (torch.randn(COUNT, form.width, generator=generator) * 60).to(torch.float8_e4m3fn),
        "scale": torch.rand(numbers, groups, generator=generator) * 0.02 + 0.001,
        "bias": torch.randn(COUNT, generator=generator).to(form.dtype.torch),
        "static": torch.tensor([0.02]),
    }
    parts = {
        name: param(name, TensorType(DType.from_torch(t.dtype), tuple(t.shape)))
        for name, t in held.items()
    }
    ids, rows = (
        input_node(name, TensorType(DType.I64, (symbol(size),)))
        for name, size in (("token_ids", "T"), ("logits_indices", "R"))
    )
    x = make("index_select", make("embedding", parts["table"], ids), rows, dim=0)
    scales = {"rows": form.rows, "group": form.group, "dtype": form.dtype}
    if form.x:
        static = parts["static"] if form.x == "tensor" else None
        coded = make("quantize_rows", x, static, dtype=DType.F8E4M3, group=form.group)
        scale = item(coded, 1) if static is None else static
        operands = (item(coded, 0), scale, parts["codes"], parts["scale"], parts["bias"])
        logits = make("scaled_linear", *operands, **scales)
    else:
        weight = make("dequantize", parts["codes"], parts["scale"], **scales)
        logits = make("linear", x, weight, parts["bias"])
    return Graph("g", (ids, rows), (logits,), {n: Held(t) for n, t in held.items()})


def run(graph: Graph, flavor: str, ids: torch.Tensor) -> tuple[torch.Tensor, onnx.ModelProto]:
    """Logits of every token by the emitted model, checked as its writer checks it."""
    proto = onnx_ir.to_proto(export_decoder(graph, CONVERTERS_OF[flavor], {}, 16).model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    every = np.arange(len(ids))[None]
    feeds = {"input_ids": ids[None].numpy(), "logits_indices": every}
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("logits", "cpu")
    session.run_with_iobinding(binding)
    (found,) = binding.get_outputs()
    return torch.from_dlpack(found._ortvalue)[0], proto


@pytest.mark.parametrize("flavor", CONVERTERS_OF)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_products_of_e4m3(form: Form, flavor: str) -> None:
    graph, ids = product_of(form), torch.tensor([3, 4, 0, 17])
    found, proto = run(graph, flavor, ids)
    (wanted,) = interpret(graph, [ids, torch.arange(4)])
    largest = wanted.float().abs().amax(-1, keepdim=True)
    apart = (found.float() - wanted.float()).abs() / largest
    assert apart.max() < (2e-6 if form.dtype is DType.F32 else 8e-3)
    held = {t.name: t for t in proto.graph.initializer}["codes"]
    assert held.data_type == onnx.TensorProto.FLOAT8E4M3FN
    rounds, numbers = (
        [node for node in proto.graph.node if node.op_type == f"{kind}Linear"]
        for kind in ("Quantize", "Dequantize")
    )
    # Nothing stands between the two, so that a runtime sees a pair.
    assert [node.output[0] in {n.input[0] for n in numbers} for node in rounds] == [True] * bool(
        form.x
    )
    assert len(numbers) == 1 + bool(form.x)


def test_scales_that_are_searched_for_have_no_form() -> None:
    graph = product_of(FORMS["tokens"])
    (product,) = graph.outputs
    coded = product.operands[0].operands[0]
    searched = make("quantize_rows", coded.operands[0], dtype=DType.F8E4M3, tries=4)
    operands = (item(searched, 0), item(searched, 1), *product.operands[2:])
    other = graph.with_outputs((make("scaled_linear", *operands, dtype=DType.F32),))
    with pytest.raises(UnsupportedError, match=r"op quantize_rows.*searched for"):
        export_decoder(other, CONVERTERS_OF["standard"], {}, 16)
