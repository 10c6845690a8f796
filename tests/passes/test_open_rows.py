"""Rounding rows, spelled out."""

from __future__ import annotations

import pytest
import torch

from rewriting import assert_same_numbers, parse
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.verifier import verify
from tilewright.passes.fuse import fuse
from tilewright.passes.open_rows import open_rows

TEXT = """
def g(x: {type}[T, 64], w: {type}[64], static: f32[1]):
    n: {type}[T, 64] = rms_norm(x, w, eps=1e-06)
    rows: ({codes}[T, 64], f32[T, {groups}],) = quantize_rows(n, {static}dtype={codes}{group})
    q: {codes}[T, 64] = item(rows, index=0)
    s: f32[T, {groups}] = item(rows, index=1)
    return {{"q": q, "s": s}}
"""


def graph(
    codes: str,
    group: int = 0,
    static: bool = False,
    type_: str = "f32",
    tries: int = 0,
    text: str = TEXT,
) -> Graph:
    return parse(
        text.format(
            type=type_,
            codes=codes,
            groups=-(-64 // group) if group else 1,
            static="static, " if static else "",
            group=(f", group={group}" if group else "") + (f", tries={tries}" if tries else ""),
        )
    )


@pytest.mark.quick
@pytest.mark.parametrize("codes", ["f8e4m3", "i8"])
@pytest.mark.parametrize(("group", "static"), [(0, False), (32, False), (0, True)])
def test_the_codes_are_those_of_the_op(codes: str, group: int, static: bool) -> None:
    before = graph(codes, group, static)
    after = open_rows(before)
    verify(after)
    assert not any(node.op in ("quantize_rows", "item") for node in after.nodes)
    assert_same_numbers(before, after, {"T": 5}, tolerance=0)


@pytest.mark.parametrize("codes", ["f8e4m3", "i8"])
def test_rows_of_zeros_and_of_nan_have_the_ops_codes(codes: str) -> None:
    before = graph(codes)
    x = torch.randn(3, 64)
    x[0], x[1, 7] = 0.0, float("nan")
    inputs = (x, torch.ones(64), torch.ones(1))
    wanted, found = interpret(before, inputs), interpret(open_rows(before), inputs)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)


def test_a_norm_and_the_rounding_of_its_rows_share_a_kernel() -> None:
    found = fuse(open_rows(graph("f8e4m3")))
    calls = [node for node in found.nodes if node.op == "fused"]
    assert len(calls) == 1 and len(calls[0].types) == 2


def test_what_is_not_spelled_out_stays() -> None:
    wide = TEXT.replace("f32[T, {groups}]", "f64[T, {groups}]")
    tried = graph("f8e4m3", tries=8)
    for before in (graph("i8", 24), graph("i8", type_="f64", text=wide), tried):
        assert open_rows(before) == before
