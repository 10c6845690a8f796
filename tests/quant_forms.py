"""Decode products with quantized weights for tests: the forms of linear_forms.py over codes, their
operands, and what they give in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from linear_forms import Form, body_of, forms, in_float64, operands_of, tensor
from tilewright.codegen.triton.kernels.quant_linear_tiles import Quantized
from tilewright.codegen.triton.layout import located
from tilewright.ir.build import input_node, item, make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Attr, Node
from tilewright.ir.ops.quant import blocks, packed_width
from tilewright.ir.schema import schema

LARGE = {DType.U8: 8.0, DType.I8: 64.0, DType.F8E4M3: 60.0}  # a code of usual magnitude


@dataclass(frozen=True)
class QuantForm:
    """A form whose weight is dequantized from codes: u8 means 4 bits."""

    form: Form = Form()
    codes: DType = DType.U8
    group: int = 16
    rows: int = 1
    scale: DType = DType.F32
    zero: DType | None = None
    compute: DType | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the codes, and of scales and zero points."""
        n, k = self.form.rows, self.form.k
        width = packed_width(k, self.group) if self.codes is DType.U8 else k
        return (n, width), (blocks(n, self.rows), blocks(k, self.group))

    @property
    def attrs(self) -> dict[str, Attr]:
        """Of ``dequantize``, but its type."""
        width = self.form.k if self.codes is DType.U8 else None
        shape: dict[str, Attr] = {"rows": self.rows, "group": self.group, "width": width}
        return {**shape, "compute": self.compute}


def quant_body(form: QuantForm) -> Graph:
    """``body_of``, its weight dequantized."""
    codes, scales = form.shapes
    parts = [tensor("q", form.codes, *codes), tensor("scales", form.scale, *scales)]
    if form.zero is not None:
        parts.append(tensor("zeros", form.zero, *scales))
    plain = body_of(form.form)
    values: dict[Node, Node] = {}
    inputs: list[Node] = []
    for node in plain.nodes:
        if node.op == "input" and node.attr("name") == "weight":
            values[node] = make("dequantize", *parts, dtype=form.form.dtype, **form.attrs)
            inputs += parts
        elif node.op == "input":
            values[node] = node
            inputs.append(node)
        else:
            args = [None if arg is None else values[arg] for arg in node.args]
            values[node] = make(node.op, *args, **dict(node.attrs))
    return Graph("body", tuple(inputs), (values[plain.outputs[0]],))


def quant_node(form: QuantForm) -> Node:
    """The call: x a part of wider rows where it is strided."""
    body, inner = quant_body(form), form.form
    outer = [input_node(f"outer_{i}", n.type) for i, n in enumerate(body.inputs)]
    if inner.strided:
        wide = tensor("wide", inner.dtype, inner_rows(body), inner.k + 8)
        outer[0] = make("slice", wide, dim=1, start=8, step=1, stop=inner.k + 8)
    return make("fused", *outer, body=body, kind="linear")


def inner_rows(body: Graph):
    """The symbol of the number of tokens."""
    return body.inputs[0].shape[0]


def quantized_of(form: QuantForm) -> Quantized:
    """What the kernels see."""
    node = quant_node(form)
    found = Quantized.of(node, tuple(located(operand)[1] for operand in node.operands))
    assert found is not None
    return found


def quant_operands(
    form: QuantForm, tokens: int, seed: int = 0, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Buffers for the call's operands, and the result in float64 over the dequantized weight."""
    bases, operands = operands_of(form.form, tokens, seed, device)
    plain = body_of(form.form)
    at = [str(node.attr("name")) for node in plain.inputs].index("weight")
    parts = _parts(form, _weights(seed, device), device)
    reference = schema("dequantize").reference
    codes, scale, *zero = parts
    attrs = {**form.attrs, "dtype": DType.F64}
    weight = reference(codes, scale.double(), *zero, **attrs)
    wanted = in_float64(plain, [*operands[:at], weight, *operands[at + 1 :]])
    return [*bases[:at], *parts, *bases[at + 1 :]], wanted


def packed_operands(
    form: QuantForm, group: int, tokens: int, seed: int = 0, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Buffers for the call's operands, and the result in float64 over rows of x rounded to int8 by
    groups, as the type they come in has them.
    """
    bases, _ = quant_operands(form, tokens, seed, device)
    _, operands = operands_of(form.form, tokens, seed, device)
    names = [str(node.attr("name")) for node in body_of(form.form).inputs]
    x, parts = _rows_of(form.form, operands), _parts(form, _weights(seed, device), device)
    codes, scales = schema("quantize_rows").reference(x, dtype=DType.I8, group=group)
    by = scales.double().repeat_interleave(group, -1)[:, : form.form.k]
    codes_of_weight, scale, *zero = parts
    attrs = {**form.attrs, "dtype": DType.F64}
    weight = schema("dequantize").reference(codes_of_weight, scale.double(), *zero, **attrs)
    product = (codes.double() * by) @ weight.T
    return bases, _behind(form.form, operands, names, product)


def _rows_of(form: Form, operands: list[torch.Tensor]) -> torch.Tensor:
    """What is rounded: x, or what its norm makes of it."""
    if form.norm == "none":
        return operands[0]
    scale = operands[1] if form.norm == "weight" else None
    return schema("rms_norm").reference(operands[0], scale, eps=1e-5)


def _weights(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed + 1)


def _parts(form: QuantForm, generator: torch.Generator, device: str) -> list[torch.Tensor]:
    shape, scales = form.shapes
    given = {"generator": generator, "device": device}
    if form.codes is DType.U8:
        codes = torch.randint(0, 256, shape, **given).to(torch.uint8)
    elif form.codes is DType.I8:
        codes = torch.randint(-127, 128, shape, **given).to(torch.int8)
    else:
        codes = (torch.randn(shape, **given) * 60).to(torch.float8_e4m3fn)
    usual = form.form.k**-0.5 / LARGE[form.codes]
    scale = ((torch.rand(scales, **given) + 0.5) * usual).to(form.scale.torch)
    if form.zero is None:
        return [codes, scale]
    return [codes, scale, torch.randint(0, 16, scales, **given).to(form.zero.torch)]


@st.composite
def quant_forms(draw: st.DrawFn, large: bool = False) -> QuantForm:
    """Every type of codes by rows, groups and blocks, with zero points and without, in every form
    of a product; widths need not divide by groups.
    """
    codes = draw(st.sampled_from(list(LARGE)))
    groups = [0, 8, 16, 24, 128] if codes is DType.U8 else [0, 7, 16, 128]
    form = draw(forms(large))
    group = draw(st.sampled_from(groups))
    if codes is DType.U8 and group == 0 and form.k % 2:
        form = replace(form, k=form.k + 1)
    scales = st.sampled_from([DType.F32, DType.BF16])
    zeros = st.sampled_from([None, None, DType.U8, DType.F32])
    return QuantForm(
        form, codes, group, draw(st.sampled_from([1, 1, 0, 5])), draw(scales), draw(zeros)
    )


@dataclass(frozen=True)
class ScaledForm:
    """A form whose operands are both codes, by rows (``group`` 0) or by blocks."""

    form: Form = Form()
    codes: DType = DType.F8E4M3
    group: int = 0
    rows: int = 1
    static: bool = False

    @property
    def weight(self) -> QuantForm:
        """Its weight, as the other operand being numbers would have it."""
        return QuantForm(self.form, self.codes, self.group, self.rows)


def scaled_body(form: ScaledForm) -> Graph:
    """``body_of``, both operands of its product in codes."""
    codes, scales = form.weight.shapes
    parts = [tensor("q", form.codes, *codes), tensor("scales", DType.F32, *scales)]
    static = tensor("static", DType.F32, 1) if form.static else None
    plain, values, inputs = body_of(form.form), dict[Node, Node | None](), []
    for node in plain.nodes:
        if node.op == "input" and node.attr("name") == "weight":
            values[node] = None
            inputs += [*parts, *([] if static is None else [static])]
        elif node.op == "input":
            values[node] = node
            inputs.append(node)
        elif node.op == "linear":
            x, _, bias = (None if arg is None else values[arg] for arg in node.args)
            rows = make("quantize_rows", x, static, dtype=form.codes, group=form.group)
            scale = item(rows, 1) if static is None else static
            attrs = {"dtype": form.form.dtype, "rows": form.rows, "group": form.group}
            values[node] = make("scaled_linear", item(rows, 0), scale, *parts, bias, **attrs)
        else:
            args = [None if arg is None else values[arg] for arg in node.args]
            values[node] = make(node.op, *args, **dict(node.attrs))
    output = values[plain.outputs[0]]
    assert output is not None
    return Graph("body", tuple(inputs), (output,))


def scaled_node(form: ScaledForm) -> Node:
    """The call: x a part of wider rows where it is strided."""
    body, inner = scaled_body(form), form.form
    outer = [input_node(f"outer_{i}", n.type) for i, n in enumerate(body.inputs)]
    if inner.strided:
        wide = tensor("wide", inner.dtype, inner_rows(body), inner.k + 8)
        outer[0] = make("slice", wide, dim=1, start=8, step=1, stop=inner.k + 8)
    return make("fused", *outer, body=body, kind="linear")


def scaled_operands(
    form: ScaledForm, tokens: int, seed: int = 0, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Buffers for the call's operands, and the result in float64 over what the codes of both stand
    for: rows are rounded as the type they come in has them.
    """
    bases, operands = operands_of(form.form, tokens, seed, device)
    plain = body_of(form.form)
    names = [str(node.attr("name")) for node in plain.inputs]
    at = names.index("weight")
    x, parts = _rows_of(form.form, operands), _parts(form.weight, _weights(seed, device), device)
    static = [torch.tensor([0.01], device=device)] if form.static else []
    reference = schema("quantize_rows").reference
    codes, scales = reference(x, *static, dtype=form.codes, group=form.group)
    attrs = {"dtype": DType.F64, "rows": form.rows, "group": form.group}
    product = schema("scaled_linear").reference(
        codes, scales.double(), parts[0], parts[1].double(), None, **attrs
    )
    wanted = _behind(form.form, operands, names, product)
    return [*bases[:at], *parts, *static, *bases[at + 1 :]], wanted


def _behind(
    form: Form, operands: list[torch.Tensor], names: list[str], product: torch.Tensor
) -> torch.Tensor:
    """What is behind a product, in float64: that of the body with x and an identity's product."""
    eye = torch.eye(form.rows, dtype=torch.float64, device=product.device)
    rest = replace(form, k=form.rows, norm="none", strided=False)
    known = dict(zip(names, operands, strict=True))
    inputs = [
        product if name == "x" else eye if name == "weight" else known[name]
        for name in (str(node.attr("name")) for node in body_of(rest).inputs)
    ]
    return in_float64(body_of(rest), inputs)


@st.composite
def scaled_forms(draw: st.DrawFn, large: bool = False) -> ScaledForm:
    """Both types of codes by rows, by tensors and by blocks, in every form of a product. Norms are
    bfloat16's: a last bit of them may move a code, and by that more than narrower bounds allow.
    """
    form = draw(forms(large))
    if form.dtype is not DType.BF16:
        form = replace(form, norm="none")
    group, rows = draw(st.sampled_from([(0, 1), (0, 1), (0, 0), (32, 1), (128, 16)]))
    static = group == 0 and draw(st.booleans())
    codes = draw(st.sampled_from([DType.F8E4M3, DType.I8]))
    return ScaledForm(form, codes, group, rows, static)


@st.composite
def packed_forms(draw: st.DrawFn, large: bool = False) -> QuantForm:
    """4-bit codes in every form of a product that rounds x, by groups and by rows; widths need not
    divide by groups. Norms are bfloat16's, as in ``scaled_forms``.
    """
    form = draw(forms(large))
    if form.dtype is not DType.BF16:
        form = replace(form, norm="none")
    group = draw(st.sampled_from([32, 64, 128, 256, 0]))
    if group == 0:
        form = replace(form, k=-(-form.k // 8) * 8)
    zero = draw(st.sampled_from([None, None, DType.U8, DType.F32]))
    scale = draw(st.sampled_from([DType.F32, DType.BF16]))
    rows = draw(st.sampled_from([1, 1, 0, 5]))
    return QuantForm(form, DType.U8, group, rows, scale, zero, DType.I8)
