"""Programs on the eager backend: sizes bound from shapes, inputs checked, state in place."""

from __future__ import annotations

import weakref

import pytest
import torch

from tilewright.codegen.base import get_backend
from tilewright.codegen.lowering import free_dead
from tilewright.codegen.program import Call, Program
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


def two_ways() -> Program:
    """y = −|x| for up to 2 rows, and |−x| for more, which takes one buffer more."""
    type_ = TensorType(DType.F32, (N, 3))
    calls = [
        Call("eager/abs", ("x",), ("h",)),
        Call("eager/neg", ("h",), ("y",), guard=(2 - N,)),
        Call("eager/neg", ("x",), ("more",), guard=(N - 3,)),
        Call("eager/abs", ("more",), ("y",), guard=(N - 3,)),
        Call("eager/relu", ("y",), ("z",)),
    ]
    buffers = dict.fromkeys(("x", "h", "more", "y", "z"), type_)
    outputs = (("y", "y"), ("z", "z"))
    kept = {"x", "y", "z"}
    return Program("two", buffers, ("x",), {}, outputs, tuple(free_dead(calls, kept)))


@pytest.mark.quick
@pytest.mark.parametrize(("count", "sign"), [(1, -1), (2, -1), (3, 1), (9, 1)])
def test_of_calls_with_guards_those_are_made_whose_guards_hold(count: int, sign: int) -> None:
    runner, made, alive = ProgramRunner(two_ways(), {}, no_files), [], []

    def noting(call, kernel):
        def step(operands, sizes):
            made.append(call.results[0])
            (result,) = kernel(operands, sizes)
            alive.append(weakref.ref(result))
            return (result,)

        return step

    runner.steps = [(call, noting(call, kernel)) for call, kernel in runner.steps]
    x = torch.randn(count, 3)
    found = runner.run({"x": x})
    assert torch.equal(found["y"], sign * x.abs())
    assert torch.equal(found["z"], found["y"].relu())
    assert made == (["h", "y", "z"] if sign < 0 else ["h", "more", "y", "z"])
    left = [name for name, tensor in zip(made, alive, strict=True) if tensor() is not None]
    assert left == ["y", "z"]


@pytest.mark.quick
def test_equal_guards_are_worked_out_once_for_the_same_sizes(monkeypatch) -> None:
    worked_out = []

    def counted(self, sizes):
        worked_out.append((self.guard, sizes["N"]))
        return real(self, sizes)

    real = Call.runs_at
    monkeypatch.setattr(Call, "runs_at", counted)
    runner = ProgramRunner(two_ways(), {}, no_files)
    for count in (1, 1, 4, 4):
        x = torch.randn(count, 3)
        assert torch.equal(runner.run({"x": x})["y"], x.abs() * (-1 if count < 3 else 1))
    assert worked_out == [(guard, count) for count in (1, 4) for guard in ((2 - N,), (N - 3,))]


@pytest.mark.quick
def test_the_frees_of_a_call_that_is_not_made_are_freed() -> None:
    """h is read last by a call that is left out."""
    type_ = TensorType(DType.F32, (N, 3))
    calls = [
        Call("eager/abs", ("x",), ("h",)),
        Call("eager/neg", ("h",), ("y",), guard=(2 - N,)),
        Call("eager/relu", ("h",), ("y",), guard=(N - 3,), frees=("h",)),
        Call("eager/exp", ("y",), ("z",), frees=("y",)),
    ]
    program = Program("p", dict.fromkeys("xhyz", type_), ("x",), {}, (("z", "z"),), tuple(calls))
    runner, seen = ProgramRunner(program, {}, no_files), []

    def first(operands, sizes):
        result = operands[0].abs()
        seen.append(weakref.ref(result))
        return (result,)

    def last(operands, sizes):
        seen.append(seen[0]() is None)
        return (operands[0].exp(),)

    (head, _), *between, (tail, _) = runner.steps
    runner.steps = [(head, first), *between, (tail, last)]
    runner.run({"x": torch.randn(1, 3)})
    assert seen[1:] == [True]
