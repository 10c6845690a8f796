"""Programs on the eager backend: sizes bound from shapes, inputs checked, state in place."""

from __future__ import annotations

import pytest
import torch

from tilewright.codegen.base import get_backend
from tilewright.errors import UsageError
from tilewright.formats.weights import Held
from tilewright.ir.build import input_node, make, param
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.types import TensorType
from tilewright.runtime.runner import ProgramRunner, bind_sizes
from tilewright.targets import Target

N = symbol("N")
TABLE = torch.arange(12, dtype=torch.float32).reshape(4, 3)


def no_files(name: str) -> bytes:
    raise AssertionError(f"nothing to read, but {name} was")


def runner_of(graph: Graph, **options) -> ProgramRunner:
    program = get_backend("eager").lower(graph, Target.parse("cpu")).program
    weights = {name: weight.load() for name, weight in graph.weights.items()}
    return ProgramRunner(program, weights, no_files, **options)


def shifted() -> Graph:
    """x f32[N, 3], ids i64[N] → x + table[ids], and the table itself."""
    x = input_node("x", TensorType(DType.F32, (N, 3)))
    ids = input_node("ids", TensorType(DType.I64, (N,)))
    table = param("table", TensorType(DType.F32, (4, 3)))
    outputs = (make("add", x, make("embedding", table, ids)), table)
    return Graph("shifted", (x, ids), outputs, {"table": Held(TABLE, "table")}, ("sum", "table"))


@pytest.mark.quick
@pytest.mark.parametrize("count", [1, 2, 7])
def test_sizes_are_bound_anew_at_each_run(count: int) -> None:
    runner = runner_of(shifted())
    x, ids = torch.randn(count, 3), torch.randint(4, (count,))
    found = runner.run({"x": x, "ids": ids})
    assert torch.equal(found["sum"], x + TABLE[ids])
    assert torch.equal(found["table"], TABLE)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "input 'x'.*dimension 1 of 4"),
        ({"x": torch.zeros(2)}, "input 'x'.*1 dimensions"),
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, "input 'x'.*float64"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "with N = 2, found dimension 0 of 3"),
        ({"ids": torch.zeros(2, dtype=torch.int32)}, "int32"),
        ({"ids": None}, "input 'ids'.*no tensor"),
    ],
)
def test_an_input_that_does_not_fit_is_named(changed, message: str) -> None:
    inputs = {"x": torch.zeros(2, 3), "ids": torch.zeros(2, dtype=torch.int64), **changed}
    inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    runner = runner_of(shifted())
    with pytest.raises(UsageError, match=message):
        runner.run(inputs)


@pytest.mark.quick
def test_a_derived_size_is_solved_for_its_symbol() -> None:
    x = input_node("x", TensorType(DType.F32, (2 * N + 1,)))
    program = runner_of(Graph("odd", (x,), (make("neg", x),))).program
    assert bind_sizes(program, {"x": torch.zeros(7)}) == {"N": 3}
    with pytest.raises(UsageError, match="dimension 0 of 8"):
        bind_sizes(program, {"x": torch.zeros(8)})


@pytest.mark.quick
def test_state_is_written_in_place() -> None:
    slots, pages = symbol("T"), symbol("P")
    cache = input_node("cache", TensorType(DType.F32, (3, pages, 1, 2)))
    new = input_node("new", TensorType(DType.F32, (slots, 1, 2)))
    where = input_node("where", TensorType(DType.I64, (slots,)))
    written = make("kv_write", cache, new, where)
    runner = runner_of(Graph("write", (cache, new, where), (written,), {}, ("cache",)))
    memory = torch.zeros(3, 4, 1, 2)
    values = torch.randn(2, 1, 2)
    result = runner.run({"cache": memory, "new": values, "where": torch.tensor([5, 0])})["cache"]
    assert result.data_ptr() == memory.data_ptr()
    expected = torch.zeros(12, 1, 2)
    expected[[5, 0]] = values
    assert torch.equal(memory, expected.reshape(3, 4, 1, 2))


@pytest.mark.quick
@pytest.mark.parametrize("inference", [True, False])
def test_results_are_inference_tensors_only_where_they_stay_inside(inference: bool) -> None:
    runner = runner_of(shifted(), inference=inference)
    found = runner.run({"x": torch.zeros(2, 3), "ids": torch.zeros(2, dtype=torch.int64)})
    assert found["sum"].is_inference() is inference
    assert not found["sum"].requires_grad
