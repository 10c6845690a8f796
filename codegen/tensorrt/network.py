"""What a TensorRT network is, before TensorRT sees it: layers as data, whose numbers can be checked
on any machine.

A layer has a kind, inputs by name, attributes and one output. Kinds and what they compute follow
TensorRT's operators of that name; the operands of a layer have one rank, and broadcast by sizes of
1. Sizes are numbers, or the symbols ``batch``, ``length`` and ``rows``::

    cast                x; dtype
    unary               x; op (exp, sqrt, …)
    activation          x; op (sigmoid, gelu_tanh, …)
    elementwise         a, b, which broadcast; op (sum, prod, greater, …)
    select              condition, a, b
    reduce              x; op (sum, avg, max, min), axes, which stay as 1
    softmax             x; axis
    normalization       x, scale, bias over the last axis; eps
    matrix_multiply     a, b; transpose: of b's last two axes
    shuffle             x; first (permutation), shape (0 keeps a size, -1 is what is left)
    slice               x; axis, start, stop, step
    concatenation       xs; axis
    gather              x, indices; axis
    kv_cache_update     cache [B, G, L, D], update [B, G, S, D], start i32[B]
    rotary_embedding    x [B, H, S, D], cos, sin [P, R / 2], positions [B, S]; interleaved, width R
    attention           q [B, H, S, D], k and v [B, G, L, D], mask bool [B, 1, S, L]; q is scaled
    quantize            x, scale []; dtype
    dequantize          codes, scale ([], or by rows [N], or by groups [N, K / group]); dtype
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ...ir.dtypes import DType
from ...ir.node import Attr


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input of a network.

    Attributes:
        name: unique within the network.
        dtype: its element type.
        shape: sizes, or symbols.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that is known when the network is built.

    Attributes:
        name: unique within the network.
        dtype: its element type.
        shape: its sizes.
        load: makes the tensor.
        four_bits: whether it is of signed 4-bit codes: ``load`` gives u8, two a byte, the even
            column in the low half, and ``dtype`` is u8.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    four_bits: bool = False

    def __str__(self) -> str:
        dtype = "i4" if self.four_bits else str(self.dtype)
        return f"{self.name}: {dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of one output.

    Attributes:
        kind: of those above.
        inputs: names of inputs, constants or other layers' outputs.
        output: a name of its own, which is the layer's too.
        attrs: by name.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, Attr]

    def __str__(self) -> str:
        attrs = [f"{name}={value}" for name, value in self.attrs.items()]
        return f"{self.output} = {self.kind}({', '.join((*self.inputs, *attrs))})"


@dataclass(frozen=True, slots=True)
class Network:
    """A network, its weights still to be loaded.

    Attributes:
        inputs: in order.
        constants: by name, those that a layer reads.
        layers: each behind those that it reads.
        outputs: names of values, by the names that they get outside.
        notes: what a user may want to know of the lowering.
    """

    inputs: tuple[Tensor, ...]
    constants: Mapping[str, Constant]
    layers: tuple[Layer, ...]
    outputs: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols of its inputs' sizes, in order."""
        found = {s: None for tensor in self.inputs for s in tensor.shape if isinstance(s, str)}
        return tuple(found)

    @property
    def dtypes(self) -> frozenset[DType]:
        """The element types that a GPU must have for it: every one of inputs, and of constants
        what is not float32, which all have for parts of a norm.
        """
        inputs = {tensor.dtype for tensor in self.inputs}
        return frozenset(inputs | {c.dtype for c in self.constants.values()} - {DType.F32})

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from (f"input {tensor}" for tensor in self.inputs)
        yield from (f"constant {constant}" for constant in self.constants.values())
        yield from map(str, self.layers)
        yield from (f"output {name} = {value}" for name, value in self.outputs.items())


@dataclass(slots=True)
class Parts:
    """A network that is being made; names are unique among all of its values."""

    inputs: list[Tensor] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def unique(self, name: str) -> str:
        """``name``, or a variant of it that is not taken yet; it is taken from now on."""
        candidate, count = name, 1
        while candidate in self.taken:
            candidate, count = f"{name}_{count}", count + 1
        self.taken.add(candidate)
        return candidate

    def network(self, outputs: Mapping[str, str]) -> Network:
        """The network without what no output needs."""
        needed = set(outputs.values())
        kept = []
        for layer in reversed(self.layers):
            if layer.output in needed:
                needed.update(layer.inputs)
                kept.append(layer)
        constants = {name: c for name, c in self.constants.items() if name in needed}
        inputs = tuple(tensor for tensor in self.inputs if tensor.name in needed)
        return Network(inputs, constants, tuple(kept[::-1]), dict(outputs), tuple(self.notes))
