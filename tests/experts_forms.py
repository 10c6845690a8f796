"""moe_experts for tests: nodes of every form, routings of every kind, and the truth in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tilewright.codegen.triton.kernels.experts import experts_source
from tilewright.codegen.triton.kernels.experts_tiles import Groups, GroupTiles, Problem, RowTiles
from tilewright.codegen.triton.layout import Layout, located
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import input_node, make, permute
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Attr, Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS, Target

H100 = TARGETS["h100"]
OP = schema("moe_experts")
T = symbol("T")
BESIDE = 3  # elements beside the rows of x, where x is a part of wider rows
GPT_OSS: dict[str, Attr] = {
    "activation": "silu",
    "interleaved": True,
    "limit": 7.0,
    "alpha": 1.702,
}
ROWS = (RowTiles(4, 32, 1), RowTiles(8, 32, 1))
GROUPS: tuple[tuple[Groups, int | None], ...] = (
    ((GroupTiles(16, 32, 32, 4, 2, 2), GroupTiles(16, 32, 32, 4, 2, 1)), None),
)


@dataclass(frozen=True)
class Form:
    """What a mixture is.

    Attributes:
        experts, slots, inner, width: E, k, F, K.
        dtype: of x and the weights.
        activation: the op's; "gpt_oss" for its whole form.
        biases: whether both products have one.
        transposed: whether the weights are stored [E, K, 2F] and [E, F, K].
        wide: whether x is a part of wider rows.
        routed: element types of ids and weights.
    """

    experts: int = 4
    slots: int = 2
    inner: int = 24
    width: int = 16
    dtype: DType = DType.F32
    activation: str = "silu"
    biases: bool = False
    transposed: bool = False
    wide: bool = False
    routed: tuple[DType, DType] = (DType.I64, DType.F32)


def node_of(form: Form) -> Node:
    """The call, over the symbol T."""
    e, f, k, dtype = form.experts, form.inner, form.width, form.dtype

    def given(name: str, *shape: int) -> Node:
        return input_node(name, TensorType(dtype, shape))

    x = input_node("x", TensorType(dtype, (T, k + 2 * BESIDE if form.wide else k)))
    if form.wide:
        x = make("slice", x, dim=1, start=BESIDE, stop=BESIDE + k)
    ids, weights = (
        input_node(n, TensorType(t, (T, form.slots)))
        for n, t in zip(("ids", "weights"), form.routed, strict=True)
    )
    if form.transposed:
        gate_up = permute(given("gate_up", e, k, 2 * f), 0, 2, 1)
        down = permute(given("down", e, f, k), 0, 2, 1)
    else:
        gate_up, down = given("gate_up", e, 2 * f, k), given("down", e, k, f)
    biases = (given("b1", e, 2 * f), given("b2", e, k)) if form.biases else (None, None)
    attrs = GPT_OSS if form.activation == "gpt_oss" else {"activation": form.activation}
    return make("moe_experts", x, ids, weights, gate_up, down, *biases, **attrs)


def layouts_of(node: Node) -> tuple[Layout | None, ...]:
    """Where each operand lies."""
    return tuple(None if arg is None else located(arg)[1] for arg in node.args)


def problem_of(node: Node) -> Problem:
    """What the kernels see."""
    found = Problem.of(node, layouts_of(node))
    assert found is not None
    return found


def source_of(
    node: Node,
    rows: tuple[RowTiles, RowTiles] | None = ROWS,
    groups: Sequence[tuple[Groups, int | None]] = GROUPS,
    target: Target = H100,
) -> KernelSource:
    """The kernel with small tiles."""
    return experts_source(problem_of(node), target, rows, groups)


def operands_of(
    form: Form, ids: torch.Tensor, seed: int = 0, device: str = "cpu"
) -> list[torch.Tensor | None]:
    """The buffers of a call whose tokens choose ``ids`` [T, k]; NaN beside the rows of a wide x."""
    generator = torch.Generator(device).manual_seed(seed)
    e, f, k, dtype = form.experts, form.inner, form.width, form.dtype.torch

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return value.mul_(scale).to(dtype)

    x = drawn(len(ids), k)
    if form.wide:
        x = torch.nn.functional.pad(x, (BESIDE, BESIDE), value=float("nan"))
    weights = torch.rand(ids.shape, generator=generator, device=device) + 0.1
    weights = (weights / weights.sum(-1, keepdim=True)).to(form.routed[1].torch)
    first, second = ((e, k, 2 * f), (e, f, k)) if form.transposed else ((e, 2 * f, k), (e, k, f))
    gate_up, down = drawn(*first, scale=2 * k**-0.5), drawn(*second, scale=f**-0.5)
    biases = (drawn(e, 2 * f), drawn(e, k)) if form.biases else (None, None)
    return [x, ids.to(device, form.routed[0].torch), weights, gate_up, down, *biases]


def truth_of(form: Form, node: Node, operands: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The op's reference, in float64, on the values that the operands have."""
    given = [x if x is None or not x.is_floating_point() else x.double() for x in operands]
    x, ids, weights, gate_up, down, *biases = given
    assert x is not None and gate_up is not None and down is not None
    if form.wide:
        x = x[:, BESIDE:-BESIDE]
    if form.transposed:
        gate_up, down = gate_up.mT, down.mT
    found = OP.reference(x, ids, weights, gate_up, down, *biases, **dict(node.attrs))
    assert isinstance(found, torch.Tensor)
    return found


def assert_near(
    form: Form, node: Node, operands: Sequence[torch.Tensor | None], found: torch.Tensor
) -> None:
    """A result in half precision is as near to float64's as torch's own, all in all and at its
    worst place; what is rounded between the products may leave both further off than a tolerance
    of the op for one value allows.

    Args:
        form: without transposed weights.
        operands: on a CPU.
        found: what the kernel gives.
    """
    truth = truth_of(form, node, operands)
    x, *others = operands
    assert x is not None
    x = x[:, BESIDE:-BESIDE].contiguous() if form.wide else x
    torchs = OP.reference(x, *others, **dict(node.attrs))
    assert isinstance(torchs, torch.Tensor)
    relative, absolute = OP.tolerance[form.dtype]
    error, torchs_error = found.cpu().double() - truth, torchs.double() - truth
    # A few values may be right by chance in torch's: one rounding more is allowed.
    assert error.norm() <= 1.05 * torchs_error.norm() + relative / 4 * truth.norm()
    assert error.abs().max() <= 2 * torchs_error.abs().max() + absolute


def routed(form: Form, tokens: int, kind: str, seed: int = 0) -> torch.Tensor:
    """Ids i64[T, k], each token's distinct: any, all of the same experts, or never the first."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "the same":
        chosen = torch.randperm(form.experts, generator=generator)[: form.slots]
        return chosen.repeat(tokens, 1)
    low = 1 if kind == "not the first" and form.slots < form.experts else 0
    rows = [
        low + torch.randperm(form.experts - low, generator=generator)[: form.slots]
        for _ in range(tokens)
    ]
    return torch.stack(rows)


ROUTINGS = st.sampled_from(["any", "the same", "not the first"])
FORMS = st.builds(
    Form,
    experts=st.sampled_from([2, 5, 8]),
    slots=st.sampled_from([1, 2]),
    inner=st.sampled_from([8, 24, 33]),
    width=st.sampled_from([16, 20, 40]),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "sigmoid", "gpt_oss"]),
    biases=st.booleans(),
    transposed=st.booleans(),
    wide=st.booleans(),
    routed=st.sampled_from([(DType.I64, DType.F32), (DType.I32, DType.BF16)]),
)
"""Small mixtures in float32."""
