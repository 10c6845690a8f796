"""What a quantization scheme is: the parts of a weight, the value of them, and the product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...formats.weights import Weight
from ...ir.build import item, make
from ...ir.dtypes import DType
from ...ir.node import Node
from .config import QuantConfig

Parts = Mapping[str, Weight]
Nodes = Mapping[str, Node]


@dataclass(frozen=True, slots=True)
class Linear:
    """One product to quantize.

    Attributes:
        x: its left operand [..., K].
        bias: [N], or None.
        rows, width: N and K.
        dtype: of the weight and the result.
        static: the calibrated scale [1] of x, where the scheme wants one.
    """

    x: Node
    bias: Node | None
    rows: int
    width: int
    dtype: DType
    static: Node | None = None


class Scheme(ABC):
    """One way to quantize a linear. Subclasses set the attributes and fill in ``parts`` and
    ``value``; those that quantize activations ``product`` too.

    Attributes:
        name: as ``compile(quantize=…)`` takes it.
        groups: the group sizes that it has, its own first; 0 is a whole row.
        block_rows: rows that share a scale, 0 for all.
        methods: ways to choose codes, its own first.
        asymmetric: whether it can have zero points.
        activations: what of x is quantized: "none", "token" (a scale a row, made at run time),
            "tensor" (one calibrated scale) or "block" (a scale a row and group).
        computes: what ``QuantConfig.compute`` may be.
        rate: the element type that the product computes in, which a GPU must have a rate for; None
            where any will do.
    """

    name: ClassVar[str]
    groups: ClassVar[tuple[int, ...]] = (0,)
    block_rows: ClassVar[int] = 1
    methods: ClassVar[tuple[str, ...]] = ("rtn",)
    asymmetric: ClassVar[bool] = False
    activations: ClassVar[str] = "none"
    rate: ClassVar[str | None] = None
    codes: ClassVar[DType]
    computes: ClassVar[tuple[str, ...]] = ("float",)

    @abstractmethod
    def parts(self, weight: Weight, config: QuantConfig) -> Parts:
        """The parts of a weight [N, K] rounded to nearest, as expressions over it, by suffix."""

    @abstractmethod
    def value(self, parts: Nodes, linear: Linear, config: QuantConfig) -> Node:
        """The weight [N, K] that the parts stand for."""

    def product(self, parts: Nodes, linear: Linear, config: QuantConfig) -> Node | None:
        """The product with quantized activations; None for ``linear(x, value)``."""
        if self.activations == "none":
            return None
        group = config.group or 0
        rows = make("quantize_rows", linear.x, linear.static, dtype=self.codes, group=group)
        scale = item(rows, 1) if linear.static is None else linear.static
        return make(
            "scaled_linear",
            item(rows, 0),
            scale,
            parts["codes"],
            parts["scale"],
            linear.bias,
            dtype=linear.dtype,
            rows=self.block_rows,
            group=group,
        )
