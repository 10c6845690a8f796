"""Programs as plain data, and calls with guards: which are made at given sizes, and what frees."""

from __future__ import annotations

import json

import pytest

from tilewright.codegen.lowering import free_dead
from tilewright.codegen.program import Call, Program
from tilewright.errors import EngineError
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.types import TensorType

T = symbol("T")
ROW = TensorType(DType.F32, (T, 8))


def two_ways() -> Program:
    """y = exp(relu(x)): relu in one call for up to 4 rows, by way of a buffer for more."""
    calls = [
        Call("eager/relu", ("x",), ("h",), guard=(4 - T,)),
        Call("eager/neg", ("x",), ("between",), guard=(T - 5,)),
        Call("eager/neg", ("between",), ("h",), guard=(T - 5,)),
        Call("eager/exp", ("h",), ("y",)),
    ]
    buffers = dict.fromkeys(("x", "h", "between", "y"), ROW)
    return Program("two", buffers, ("x",), {}, (("y", "y"),), tuple(free_dead(calls, {"x", "y"})))


@pytest.mark.quick
def test_guards_are_plain_data_and_left_out_where_there_are_none() -> None:
    program = two_ways()
    data = json.loads(json.dumps(program.to_json()))
    assert Program.from_json(data) == program
    assert [call.get("guard") for call in data["calls"]] == [
        ["-1*T + 4"],
        ["T - 5"],
        ["T - 5"],
        None,
    ]
    data["calls"][0]["guard"] = ["__import__('os')"]
    with pytest.raises(EngineError, match="program"):
        Program.from_json(data)


@pytest.mark.quick
def test_a_buffer_that_two_calls_may_write_lives_to_its_last_reader() -> None:
    assert [call.frees for call in two_ways().calls] == [(), (), ("between",), ("h",)]


@pytest.mark.quick
def test_a_buffer_whose_last_reader_may_be_left_out_goes_there_all_the_same() -> None:
    calls = [
        Call("eager/relu", ("x",), ("h",)),
        Call("eager/exp", ("h",), ("y",), guard=(4 - T,)),
        Call("eager/neg", ("h",), ("y",), guard=(T - 5,)),
        Call("eager/abs", ("y",), ("z",)),
    ]
    planned = free_dead(calls, {"x", "z"})
    assert [call.frees for call in planned] == [(), (), ("h",), ("y",)]
    program = Program("p", {}, ("x",), {}, (("z", "z"),), tuple(planned))
    few = program.at({"T": 4}).calls
    assert [(call.kernel, call.frees) for call in few] == [
        ("eager/relu", ()),
        ("eager/exp", ("h",)),
        ("eager/abs", ("y",)),
    ]


@pytest.mark.quick
def test_at_given_sizes_there_are_no_guards_left() -> None:
    program = two_ways()
    few, many = program.at({"T": 4}), program.at({"T": 5})
    assert [call.kernel for call in few.calls] == ["eager/relu", "eager/exp"]
    assert [call.kernel for call in many.calls] == ["eager/neg", "eager/neg", "eager/exp"]
    assert not any(call.guard for one in (few, many) for call in one.calls)
    assert few.at({"T": 99}) is few
