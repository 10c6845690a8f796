"""Which of torch's libraries computes dense attention: told by a call, chosen by a tuner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.nn.functional import scaled_dot_product_attention

import tilewright as tw
from tilewright.autotune.search import quick_candidates
from tilewright.autotune.space import Config
from tilewright.autotune.store import Store
from tilewright.autotune.tunable import Ready
from tilewright.codegen.base import Lowered
from tilewright.codegen.program import Call
from tilewright.codegen.triton.backend import BACKEND
from tilewright.codegen.triton.library import ATTENTIONS, LibraryKernel
from tilewright.codegen.triton.scaled_library import scaled_product
from tilewright.codegen.triton.tuning.conditions import conditions_here
from tilewright.codegen.triton.tuning.problems import problems_of
from tilewright.compiler.tuning import problems_of_image
from tilewright.errors import EngineError
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import TARGETS
from tuning_records import choice_of

CPU, H100 = TARGETS["cpu"], TARGETS["h100"]


def attention(length: Size = 12) -> Graph:
    q, k, v = (
        input_node(name, TensorType(DType.F32, (2, heads, length, 16)))
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    )
    return Graph("g", (q, k, v), (make("attention", q, k, v, scale=0.25, causal=True),))


def lowered(path: Path, backend: str | None, graph: Graph) -> Lowered:
    """As a compile lowers it, with a record of this backend in the store."""
    store = Store(path / "tuning.jsonl")
    for one in problems_of(graph, H100, 1):
        config = one.default if backend is None else Config((("backend", backend),))
        store.add(choice_of(one, config, conditions=conditions_here()))
    return BACKEND.lower(graph, CPU, tuning=store)


@pytest.mark.parametrize("backend", [None, *ATTENTIONS])
def test_a_record_says_who_attends_and_the_numbers_are_the_ops(tmp_path, backend) -> None:
    graph = attention()
    found = lowered(tmp_path, backend, graph)
    (call,) = found.program.calls
    assert call.attrs.get("backend") == backend
    assert type(found.program).from_json(found.program.to_json()) == found.program
    inputs = {
        name: torch.randn(2, heads, 12, 16) for name, heads in zip("qkv", (4, 2, 2), strict=True)
    }
    (result,) = ProgramRunner(found.program, {}, found.files.__getitem__).run(inputs).values()
    torch.testing.assert_close(result, interpret(graph, list(inputs.values()))[0])
    (line,) = map(json.loads, found.files["tuning.jsonl"].splitlines())
    assert line["config"] == {"backend": backend or "auto"} and line["used"] is (
        backend is not None
    )


def test_attention_of_sizes_that_only_a_run_knows_is_left_to_torch(tmp_path) -> None:
    graph = attention(symbol("S"))
    assert not problems_of(graph, H100, 1)
    found = lowered(tmp_path, "cudnn", graph)
    assert "backend" not in found.program.calls[0].attrs and not found.files


@pytest.mark.quick
def test_torch_is_told_for_the_call_alone_and_only_a_strict_call_insists(monkeypatch) -> None:
    told = []

    def noting(*operands, **attrs):
        told.append([SDPBackend(value) for value in torch._C._get_sdp_priority_order()])
        told.append(set(_cur_sdpa_kernel_backends()))
        return scaled_dot_product_attention(*operands, **attrs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    before = _cur_sdpa_kernel_backends(with_priority=True)
    q = torch.randn(1, 2, 3, 8)
    attrs = {"scale": 0.3, "causal": False, "views": (None,) * 3, "backend": "math"}
    call = Call("triton/library/attention", ("q", "k", "v"), ("y",), attrs)
    for strict in (False, True):
        LibraryKernel(call, strict)((q, q, q), {})
        order, allowed = told[-2:]
        assert order[0] == SDPBackend.MATH
        assert len(allowed) == (1 if strict else len(ATTENTIONS))
        assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.quick
def test_operands_lie_where_the_sizes_say() -> None:
    """x is the half behind another of the same buffer."""
    rows = symbol("T")
    views = (((rows, 4), 4 * rows, (4, 1)), ((4, 4), 0, (1, 4)))
    call = Call("triton/library/linear", ("x", "w"), ("y",), {"views": views})
    kernel, weight = LibraryKernel(call), torch.randn(4, 4)
    for count in (3, 5, 3):
        both = torch.randn(2 * count, 4)
        (y,) = kernel((both, weight), {"T": count})
        torch.testing.assert_close(y, both[count:] @ weight)


class OnDevice(torch.Tensor):
    """Says that it is on a GPU: what torch's CPU multiplies, it is given as a GPU would be."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


@pytest.mark.quick
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [0, 1])
def test_scales_of_rows_or_of_all_are_the_librarys(tokens: int, static: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    rounded = schema("quantize_rows").reference
    xq, xs = rounded(torch.randn(tokens, 64, generator=generator), dtype=DType.F8E4M3)
    wq, ws = rounded(torch.randn(32, 64, generator=generator), dtype=DType.F8E4M3)
    xs, ws = (xs[0] if static else xs), (ws if rows else ws[:1])
    found = scaled_product(xq.as_subclass(OnDevice), xs, wq, ws, dtype=DType.BF16, rows=rows)
    doubles = (xq, xs.double(), wq, ws.double())
    wanted = schema("scaled_linear").reference(*doubles, dtype=DType.F64, rows=rows)
    deviation = float((found.double() - wanted).abs().max())
    assert deviation <= 1e-2 * float(wanted.abs().max())


@pytest.mark.quick
def test_a_library_that_this_version_does_not_know_is_refused() -> None:
    program = BACKEND.lower(attention(), CPU).program
    (call,) = program.calls
    other = Call(call.kernel, call.operands, call.results, {**call.attrs, "backend": "paper"})
    with pytest.raises(EngineError, match="triton/library/attention"):
        BACKEND.load(other, program, {}, lambda name: b"", torch.device("cpu"))


def test_each_library_is_a_candidate_with_a_digest_and_an_order_of_its_own() -> None:
    (one,) = problems_of(attention(), H100, 1)
    assert dict(one.key.problem)["queries"] == 12 and one.template.name == "attention"
    configs = quick_candidates(one)
    assert [c["backend"] for c in configs] == ["auto", *ATTENTIONS]
    ready = one.prepare(configs)
    assert len({r.digest for r in ready.values() if isinstance(r, Ready)}) == len(configs)
    assert len({one.numerics(c) for c in configs}) == len(configs)


def test_a_modules_attention_is_a_problem_of_its_engine() -> None:
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return scaled_dot_product_attention(q, k, v)

    q, k, v = (torch.randn(2, 4, 5, 16) for _ in range(3))
    engine = tw.compile(Module().eval(), (q, k, v), backend="triton", target="cpu")
    (one,) = problems_of_image(engine.image)
    assert one.template.name == "attention" and dict(one.key.problem)["head_dim"] == 16
    torch.testing.assert_close(engine(q, k, v), scaled_dot_product_attention(q, k, v))
