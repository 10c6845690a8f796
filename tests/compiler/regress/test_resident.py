"""Memory as the runner holds it, against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tilewright.codegen.plan import plan_buffers
from tilewright.codegen.program import Call, Program
from tilewright.compiler.regress.resident import resident_peak
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.types import TensorType

T = symbol("T")
F32 = TensorType(DType.F32, (T,))
BYTES = 400  # of each buffer at T = 100


def _call(operands, result, frees=(), kernel="triton/generated/add", **more):
    return Call(kernel, tuple(operands), (result,), frees=tuple(frees), **more)


def _program(*calls, **more):
    """x → … → the last result."""
    names = ["x", *(name for call in calls for name in call.results)]
    buffers = {**dict.fromkeys(names, F32), **more}
    return Program("p", buffers, ("x",), {}, (("y", names[-1]),), calls)


CHAIN = _program(_call("x", "a"), _call("a", "b", "a"), _call("b", "c", "b"), _call("c", "d", "c"))


def _peak(program, workspaces=None):
    plan = plan_buffers(program, {"T": 100})
    return resident_peak(program, plan, workspaces or [0] * len(program.calls))


@pytest.mark.quick
def test_a_chain_holds_two_results_at_once_and_all_where_nothing_is_freed():
    assert _peak(CHAIN) == 2 * BYTES
    kept = replace(CHAIN, calls=tuple(replace(call, frees=()) for call in CHAIN.calls))
    assert _peak(kept) == 4 * BYTES
    late = [replace(call, frees=()) for call in CHAIN.calls[:3]]
    late.append(replace(CHAIN.calls[3], frees=("a", "b", "c")))
    assert _peak(replace(CHAIN, calls=tuple(late))) == 4 * BYTES
    assert plan_buffers(kept, {"T": 100}).peak == plan_buffers(CHAIN, {"T": 100}).peak


def test_workspaces_go_as_their_call_returns():
    assert _peak(CHAIN, [1000, 0, 0, 0]) == BYTES + 1000
    assert _peak(CHAIN, [1000, 1000, 0, 0]) == 2 * BYTES + 1000
    assert _peak(CHAIN, [10, 10, 10, 0]) == 2 * BYTES + 10


def test_what_is_written_in_place_takes_nothing_more():
    in_place = replace(CHAIN.calls[1], aliases=((0, 0),))
    calls = (CHAIN.calls[0], in_place, *CHAIN.calls[2:])
    assert _peak(replace(CHAIN, calls=calls)) == 2 * BYTES
    short = _program(_call("x", "a"), _call("a", "b", "a", aliases=((0, 0),)))
    assert _peak(short) == BYTES
    into_input = _program(_call("x", "a", aliases=((0, 0),)), _call("a", "b", "a"))
    assert _peak(into_input) == BYTES


def test_a_view_keeps_its_memory_alive():
    grid = TensorType(DType.F32, (T, 1))
    view = _call("a", "v", "a", "eager/reshape", attrs={"shape": (T, 1)})
    program = _program(_call("x", "a"), view, _call("x", "b"), _call("vb", "c", "vb"), v=grid)
    assert _peak(program) == 3 * BYTES
    gone = replace(program.calls[1], kernel="triton/generated/reshape")  # a copy: a can go
    copied = replace(program, calls=(program.calls[0], gone, *program.calls[2:]))
    assert _peak(copied) == 3 * BYTES
    two = _program(_call("x", "a"), view, _call("v", "c", "v"), v=grid)
    assert _peak(two) == 2 * BYTES


def test_what_is_made_once_stays():
    fixed = TensorType(DType.F32, (25,))
    constant = _call("", "k", "", kernel="eager/const")
    program = _program(
        _call("x", "a"), constant, _call("ak", "b", "ak"), _call("b", "c", "b"), k=fixed
    )
    assert _peak(program) == 2 * BYTES + 100
