"""Decode linears for tests: every prologue and epilogue as a ``fused`` node, its operands, and what
it gives in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tilewright.codegen.triton.kernels.linear_tiles import Problem
from tilewright.codegen.triton.layout import located
from tilewright.ir.build import const, input_node, make
from tilewright.ir.dims import Size, evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType

B = symbol("B")
# Of the largest magnitude: the product, and each op behind it, are rounded to the element type.
ERROR = {DType.F32: 1e-5, DType.F16: 4e-3, DType.BF16: 3e-2}


@dataclass(frozen=True)
class Form:
    """What is static in a product: sizes, what stands before it, and what behind it."""

    k: int = 48
    n: int = 24
    dtype: DType = DType.F32
    norm: str = "none"  # "weight", "bare"
    bias: bool = False
    halves: bool = False
    behind: tuple[str, ...] = ()
    strided: bool = False

    @property
    def rows(self) -> int:
        """Of the weight."""
        return self.n * (2 if self.halves else 1)


def tensor(name: str, dtype: DType, *shape: Size) -> Node:
    return input_node(name, TensorType(dtype, shape))


def body_of(form: Form) -> Graph:
    x = tensor("x", form.dtype, B, form.k)
    inputs, value = [x], x
    if form.norm != "none":
        scale = tensor("scale", DType.F32, form.k) if form.norm == "weight" else None
        inputs += [] if scale is None else [scale]
        value = make("rms_norm", x, scale, eps=1e-5)
    weight = tensor("weight", form.dtype, form.rows, form.k)
    bias = tensor("bias", form.dtype, form.rows) if form.bias else None
    inputs += [weight, *([] if bias is None else [bias])]
    value = make("linear", value, weight, bias)
    if form.halves:
        first, second = (
            make("slice", value, dim=1, start=s, step=1, stop=s + form.n) for s in (0, form.n)
        )
        value = make("gated", first, second, activation="gelu_tanh")
    for index, step in enumerate(form.behind):
        value = STEPS[step](value, inputs, form, f"r{index}")
    return Graph("body", tuple(inputs), (value,))


def _beside(value: Node, inputs: list[Node], form: Form, name: str, *shape: Size) -> Node:
    inputs.append(tensor(name, form.dtype, *shape))
    return make("add", inputs[-1], value)


STEPS = {
    "residual": lambda v, i, f, name: _beside(v, i, f, name, B, f.n),
    "columns": lambda v, i, f, name: _beside(v, i, f, name, f.n),
    "rows": lambda v, i, f, name: _beside(v, i, f, name, B, 1),
    "scaled": lambda v, i, f, name: make("mul", v, const(0.37, f.dtype)),
    "gelu": lambda v, i, f, name: make("gelu", v),
    "capped": lambda v, i, f, name: make("tanh", v),
    "square": lambda v, i, f, name: make("mul", v, v),
    "x": lambda v, i, f, name: make("add", i[0], v),  # where it is as wide as the result
}


def node_of(form: Form) -> Node:
    """The call: x a part of wider rows where it is strided."""
    body = body_of(form)
    outer = [input_node(f"outer_{i}", n.type) for i, n in enumerate(body.inputs)]
    if form.strided:
        wide = tensor("wide", form.dtype, B, form.k + 8)
        outer[0] = make("slice", wide, dim=1, start=8, step=1, stop=form.k + 8)
    return make("fused", *outer, body=body, kind="linear")


def problem_of(node: Node) -> Problem | None:
    return Problem.of(node, tuple(located(operand)[1] for operand in node.operands))


def operands_of(
    form: Form, tokens: int, seed: int = 0, device: str = "cpu"
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Buffers for the call's operands, and the operands in them."""
    generator = torch.Generator(device).manual_seed(seed)
    bases, operands = [], []
    for outer, inner in zip(node_of(form).operands, body_of(form).inputs, strict=True):
        base, layout = located(outer)
        shape = [evaluate(size, {"B": tokens}) for size in base.shape]
        data = torch.randn(shape, generator=generator, device=device)
        if inner.shape == (form.rows, form.k):
            data *= form.k**-0.5  # sums of order 1: float16 has room for their squares
        data = data.to(inner.dtype.torch)
        own = [evaluate(size, {"B": tokens}) for size in inner.shape]
        bases.append(data)
        operands.append(data.as_strided(own, [int(str(s)) for s in layout.strides], layout.offset))
    return bases, operands


def in_float64(body: Graph, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The body's result over these operands, computed in float64."""
    values: dict[Node, Node] = {}
    for node in body.nodes:
        if node.op == "input":
            values[node] = tensor(str(node.attr("name")), DType.F64, *node.shape)
        elif node.op == "const":
            values[node] = const(node.attr("value"), DType.F64)  # type: ignore[arg-type]
        else:
            values[node] = make(node.op, *(a and values[a] for a in node.args), **dict(node.attrs))
    wide = Graph("wide", tuple(values[n] for n in body.inputs), (values[body.outputs[0]],))
    return interpret(wide, [operand.double() for operand in operands])[0]


def assert_close(
    form: Form,
    found: torch.Tensor,
    wanted: torch.Tensor,
    about: object = None,
    least: float = 0.0,
) -> None:
    """The result has the shape, the type and, but for rounding, the numbers of float64.

    ``about`` is told of a failure instead of the form; ``least`` is an error to allow in any case.
    """
    assert found.shape == wanted.shape and found.dtype is form.dtype.torch
    bound = max(ERROR[form.dtype], least) * (1.0 + float(wanted.abs().max()))
    error = float((found.double() - wanted).abs().max())
    told = f"{about or form}, {wanted.shape[0]} tokens"
    assert error <= bound, f"{told}: off by {error:.3g} of {bound:.3g}"


@st.composite
def forms(draw: st.DrawFn, large: bool = False) -> Form:
    """Forms of a few columns, as interpreters take them; ``large`` ones are for a device, with so
    many elements that squares of squares would not fit float16.
    """
    steps = st.lists(st.sampled_from(sorted(set(STEPS) - {"x"})), max_size=3, unique=large)
    return Form(
        k=draw(st.sampled_from([1, 7, 16, 40, 64, 100] + [600, 1000, 2048, 4100] * large)),
        n=draw(st.sampled_from([1, 3, 8, 20, 33] + [64, 200, 515] * large)),
        dtype=draw(st.sampled_from([DType.F32, DType.BF16, DType.F16])),
        norm=draw(st.sampled_from(["none", "weight", "bare"])),
        bias=draw(st.booleans()),
        halves=draw(st.booleans()),
        behind=tuple(draw(steps)),
        strided=draw(st.booleans()),
    )
