"""Tables of experts in codes: what the experts give is what they give of the numbers."""

from __future__ import annotations

import pytest
import torch

from tilewright.formats.stored_codes import StoredCodes
from tilewright.formats.weights import Held, Weight, apply_weight
from tilewright.ir.build import input_node, make, param
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.types import TensorType
from tilewright.passes.expert_codes import expert_codes

EXPERTS, WIDTH, INNER = 3, 32, 16
ROUNDS = {"rounds": torch.int8}


def _coded(rows: int, columns: int, name: str, group: int = 16, **more: object) -> StoredCodes:
    g = torch.Generator().manual_seed(len(name) + 7 * rows)
    codes = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
    scale = torch.rand(rows, columns // group, generator=g).half()
    parts = (Held(codes, f"{name}.codes"), Held(scale, f"{name}.scale"))
    return StoredCodes(*parts, group=group, **more)  # type: ignore[arg-type]


def _stacked(weights: list[Weight]) -> Weight:
    lifted = [apply_weight("reshape", (w,), shape=(1, *w.shape)) for w in weights]
    return apply_weight("concat", tuple(lifted), dim=0)


def _graph(gate: list[Weight], up: list[Weight], down: list[Weight]) -> Graph:
    """As a checkpoint with a file's tensor an expert and projection is read."""
    both = apply_weight("concat", (_stacked(gate), _stacked(up)), dim=1)
    weights = {"up": both, "down": apply_weight("cast", (_stacked(down),), dtype=torch.float32)}
    x = input_node("x", TensorType(DType.F32, (5, WIDTH)))
    ids = input_node("ids", TensorType(DType.I64, (5, 2)))
    shares = input_node("shares", TensorType(DType.F32, (5, 2)))
    tables = [param(n, TensorType(DType.F32, tuple(w.shape))) for n, w in weights.items()]
    mixed = make("moe_experts", x, ids, shares, *tables, activation="silu")
    return Graph("g", (x, ids, shares), (mixed,), weights)


def _experts(name: str, rows: int, columns: int, **more: object) -> list[Weight]:
    return [_coded(rows, columns, name + "x" * e, **more).weight() for e in range(EXPERTS)]


def test_both_tables_become_codes() -> None:
    graph = _graph(
        _experts("gate", INNER, WIDTH), _experts("up", INNER, WIDTH), _experts("down", WIDTH, INNER)
    )
    coded = expert_codes(graph, DType.I8)
    assert set(coded.weights) == {"up.codes", "up.scale", "down.codes", "down.scale"}
    assert coded.weights["up.codes"].shape == (EXPERTS * 2 * INNER, WIDTH // 2)
    found = [node for node in coded.nodes if node.op == "dequantize"]
    assert {node.attr("compute") for node in found} == {DType.I8} and len(found) == 2
    inputs = [torch.randn(5, WIDTH), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)]
    torch.testing.assert_close(interpret(coded, inputs), interpret(graph, inputs))


@pytest.mark.parametrize(
    "down",
    [
        [Held(torch.randn(WIDTH, INNER), f"w{e}") for e in range(EXPERTS)],
        [*_experts("down", WIDTH, INNER)[1:], Held(torch.randn(WIDTH, INNER), "w")],
        [*_experts("down", WIDTH, INNER)[1:], _coded(WIDTH, INNER, "other", group=8).weight()],
        _experts("down", WIDTH, INNER, **ROUNDS),
    ],
    ids=["numbers", "one in numbers", "one by other groups", "activations rounded"],
)
def test_a_table_that_is_no_stack_of_like_codes_is_left(down: list[Weight]) -> None:
    up = [Held(torch.randn(INNER, WIDTH), f"up{e}") for e in range(EXPERTS)]
    graph = _graph(up, up, down)
    assert expert_codes(graph) is graph
