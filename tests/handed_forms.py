"""Pairs of decode products for tests, of which one may hand on to the other: graphs, what goes in,
and what comes out in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st

from linear_forms import B, Form, body_of, in_float64, tensor
from tilewright.codegen.triton import lowering
from tilewright.codegen.triton.hand_on import Links
from tilewright.codegen.triton.kernels import linear_tiles
from tilewright.codegen.triton.kernels.linear_tiles import GemmTiles
from tilewright.ir.build import make, param
from tilewright.ir.dims import evaluate
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph, param_name
from tilewright.ir.node import Node

WEIGHTS = ("weight", "scale", "bias")


@dataclass(frozen=True)
class Pair:
    """Two products, each [B, K] to [B, N], the second over the first one's result.

    Attributes:
        first, second: what they are; the second one's K is the first one's N.
    """

    first: Form = Form(k=32, n=48, behind=("residual",))
    second: Form = Form(k=48, n=24, norm="weight")

    @property
    def graph(self) -> Graph:
        """Both results, so that neither is lost."""
        h = product_of("first", self.first, tensor("x", self.first.dtype, B, self.first.k))
        return graph_of(h, product_of("second", self.second, h))


def product_of(name: str, form: Form, x: Node, **attrs: object) -> Node:
    """A ``fused`` product over x, its weights params; ``attrs`` are more ones of its norm."""
    body = body_of(form)
    if attrs:
        body = _with_norm(body, attrs)
    outer = []
    for inner in body.inputs:
        own = str(inner.attr("name"))
        if own == "x":
            outer.append(x)
        else:
            given = f"{name}_{own}"
            is_weight = own in WEIGHTS
            outer.append(
                param(given, inner.type) if is_weight else tensor(given, inner.dtype, *inner.shape)
            )
    return make("fused", *outer, body=replace(body, name=f"{name}_body"), kind="linear")


def _with_norm(body: Graph, attrs: dict[str, object]) -> Graph:
    values: dict[Node, Node] = {}
    for node in body.nodes:
        if node.op == "input":
            dtype = body.inputs[0].dtype  # stepwise norms have one element type
            values[node] = tensor(str(node.attr("name")), dtype, *node.shape)
        elif node.op == "const":
            values[node] = node
        else:
            more = attrs if node.op == "rms_norm" else {}
            operands = (a and values[a] for a in node.args)
            values[node] = make(node.op, *operands, **{**dict(node.attrs), **more})
    return Graph(body.name, tuple(values[n] for n in body.inputs), (values[body.outputs[0]],))


def graph_of(*outputs: Node) -> Graph:
    """The graph of these outputs; what they read are its inputs."""
    inputs = [node for node in Graph("g", (), outputs).nodes if node.op == "input"]
    return Graph("g", tuple(inputs), outputs)


def drawn(
    graph: Graph, tokens: int, seed: int = 0, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and weights by name: rows of x as large as those of a residual stream are."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(node: Node) -> torch.Tensor:
        shape = [evaluate(size, {"B": tokens}) for size in node.shape]
        value = torch.randn(shape, generator=generator, device=device)
        if node.op == "param" and len(shape) == 2:
            value *= shape[1] ** -0.5
        return value.to(node.dtype.torch)

    inputs = {str(node.attr("name")): draw(node) for node in graph.inputs}
    return inputs, {param_name(node): draw(node) for node in graph.params}


def truth(
    graph: Graph, inputs: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The outputs in float64, nothing rounded between products."""
    values: dict[Node, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op in ("input", "param"):
            given = inputs if node.op == "input" else weights
            values[node] = given[str(node.attr("name"))].double()
        else:
            body = node.attr("body")
            assert isinstance(body, Graph)
            values[node] = in_float64(body, [values[operand] for operand in node.operands])
    return [values[output] for output in graph.outputs]


@contextmanager
def cut(*cuts: GemmTiles) -> Iterator[None]:
    """Products cut like this, in order of their tokens, whatever their shape; one token as ever."""
    by_tokens = dict(zip((16, 32, 64, 128), cuts, strict=False))

    def tiles(problem: object, target: object, block_m: int) -> GemmTiles:
        tiles = replace(by_tokens.get(block_m, cuts[-1]), block_m=block_m)
        return tiles if tiles.has_work(problem.k) else replace(tiles, splits=1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(linear_tiles, "default_gemm", tiles)
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Nothing is handed on."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lowering, "find_links", lambda *args: Links())
        yield


@st.composite
def pairs(draw: st.DrawFn, dtypes: Sequence[DType] = (DType.F32, DType.BF16)) -> Pair:
    """Pairs of a few columns; those between them are a multiple of 16, and often no power of 2."""
    steps = st.lists(st.sampled_from(["residual", "columns", "gelu"]), max_size=2)
    dtype, width = draw(st.sampled_from(dtypes)), draw(st.sampled_from([16, 48, 64, 80, 144]))
    first = Form(
        k=draw(st.sampled_from([7, 40, 64])),
        n=width,
        dtype=dtype,
        bias=draw(st.booleans()),
        halves=draw(st.booleans()),
        behind=tuple(draw(steps)),
    )
    second = Form(
        k=width,
        n=draw(st.sampled_from([3, 20, 33, 64])),
        dtype=dtype,
        norm="weight",
        bias=draw(st.booleans()),
        halves=draw(st.booleans()),
        behind=tuple(draw(steps)),
    )
    return Pair(first, second)
