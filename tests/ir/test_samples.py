"""Every op's sample calls: the inferred type is the real one, low precision is near float64."""

from __future__ import annotations

import pytest
import torch

from tilewright.ir.build import input_node, item, make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.schema import OpSchema, Sample, all_schemas, schema
from tilewright.ir.types import TensorType
from tilewright.ir.verifier import verify

WITHOUT = {"aten", "cond", "fused", "input", "item", "param"}


def _cases():
    for op in all_schemas():
        for i, sample in enumerate(op.samples(torch.Generator().manual_seed(1))):
            yield pytest.param(op, sample, id=f"{op.name}-{i}")


CASES = list(_cases())


def _graph(op: OpSchema, sample: Sample) -> Graph:
    args = [
        None
        if x is None
        else input_node(f"x{i}", TensorType(DType.from_torch(x.dtype), (*x.shape,)))
        for i, x in enumerate(sample.args)
    ]
    node = make(op.name, *args, **sample.attrs)
    results = [node] if isinstance(node.value_type, TensorType) else []
    outputs = results or [item(node, i) for i in range(len(node.types))]
    return Graph("call", tuple(a for a in args if a is not None), tuple(outputs))


def _present(sample: Sample) -> list[torch.Tensor]:
    return [x for x in sample.args if x is not None]


@pytest.mark.quick
def test_every_op_has_samples():
    without = {op.name for op in all_schemas() if not op.samples(torch.Generator().manual_seed(1))}
    assert without == WITHOUT


@pytest.mark.quick
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_inference_is_what_the_reference_gives(op, sample):
    graph = verify(_graph(op, sample))
    results = interpret(graph, _present(sample))
    for output, result in zip(graph.outputs, results, strict=True):
        assert (output.dtype.torch, output.shape) == (result.dtype, tuple(result.shape))


@pytest.mark.quick
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_samples_print_and_parse(op, sample):
    graph = _graph(op, sample)
    assert parse_graph(str(graph)) == graph


@pytest.mark.quick
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_costs_are_sizes(op, sample):
    node = next(iter(_graph(op, sample).calls()), None)
    if node is not None:
        cost = op.cost(node)
        assert cost.flops >= 0 and cost.bytes > 0


def _as(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return x.to(dtype) if x is not None and x.is_floating_point() else x


def _wide(value):
    results = value if isinstance(value, tuple) else (value,)
    return [r.double() for r in results]


def _continuous(op: OpSchema, sample: Sample) -> bool:
    # Rounding moves operands across the steps of these, and what they choose is not near.
    steps = {"floor", "ceil", "round", "remainder", "floordiv", "cast", "argmax", "argmin", "const"}
    steps |= {"quantize_rows", "scaled_append_kv"}
    return op.name not in steps and any(x.is_floating_point() for x in _present(sample))


SMOOTH = [case for case in CASES if _continuous(*case.values)]


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize(("op", "sample"), SMOOTH)
def test_low_precision_is_near_float64(op, sample, dtype):
    attrs = dict(sample.attrs)
    rounded = [_as(x, dtype.torch) for x in sample.args]
    exact = _wide(op.reference(*[_as(x, torch.float64) for x in rounded], **attrs))
    found = op.reference(*rounded, **attrs)
    rtol, atol = op.tolerance[dtype]
    for got, want in zip(_wide(found), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.quick
def test_gathered_bytes_do_not_count_the_whole_table():
    table = input_node("w", TensorType(DType.F16, (1000, 8)))
    ids = input_node("ids", TensorType(DType.I64, (3,)))
    node = make("embedding", table, ids)
    assert schema("embedding").cost(node).bytes == 3 * 8 + 2 * 3 * 8 * 2
