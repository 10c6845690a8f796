"""Writes a network's layers: values by IR node, constants, and the batch that tokens lie in.

A token-major value of the IR, [T, …], is [batch, length, …] in the network: TensorRT then needs no
arithmetic on sizes. Rows that logits are wanted of, [R, …], are [1, rows, …].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from ...ir.build import cast, const, reshape
from ...ir.dims import name_of
from ...ir.dtypes import DType
from ...ir.graph import Graph
from ...ir.node import Attr, Node
from ..constants import is_constant
from ..decoder import computed
from .network import Constant, Layer, Parts


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a node has no form in TensorRT."""

    reason: str


Converter: TypeAlias = "Callable[[Writer, Node], str | tuple[str, ...] | Refusal]"
TYPES = frozenset(
    {DType.F32, DType.F16, DType.BF16, DType.F8E4M3, DType.I64, DType.I32, DType.I8, DType.BOOL}
)
"""Element types that TensorRT computes in, or keeps."""
_LEADING: dict[str, tuple[int | str, ...]] = {"T": ("batch", "length"), "R": (1, "rows")}


class Writer:
    """Converts IR nodes, in order, to layers.

    Args:
        graph: whose nodes these are.
        names: readable names of its values.
        converters: by op.
        max_len: longest sequence in tokens, the length of caches and of tables over positions.
    """

    def __init__(
        self,
        graph: Graph,
        names: Mapping[Node, str],
        converters: Mapping[str, Converter],
        max_len: int,
    ) -> None:
        self.graph, self.names, self.converters, self.max_len = graph, names, converters, max_len
        self.parts = Parts()
        self.values: dict[Node, tuple[str, ...]] = {}
        self.heads_first: dict[Node, str] = {}
        self.memo: dict[object, str] = {}
        self.stem = graph.name

    # -- values ---------------------------------------------------------------------------------

    def emit(self, node: Node) -> Refusal | None:
        """Converts a node whose operands have values; a refused one gets values that stand for
        its own, so that what comes behind is looked at too.
        """
        self.stem = self.names.get(node, node.op)
        found = self._converted(node)
        if isinstance(found, Refusal):
            self.values[node] = ("",) * len(node.types)
            return found
        self.values[node] = (found,) if isinstance(found, str) else found
        return None

    def _converted(self, node: Node) -> str | tuple[str, ...] | Refusal:
        converter = self.converters.get(node.op)
        if converter is None:
            return Refusal("no layer computes it")
        odd = {t.dtype for t in node.types} - TYPES
        if odd:
            return Refusal(f"element type {min(map(str, odd))}")
        if any(leading(node, at) is None for at in range(len(node.types))):
            return Refusal(f"sizes {node.value_type}, not of tokens in axis 0")
        if any(leading(o) is None for o in node.operands if not is_constant(o)):
            return Refusal("an operand that is not of tokens in axis 0")
        return converter(self, node)

    def value(self, node: Node) -> str:
        """The name of a value that is no constant."""
        if node.op == "item" and node not in self.values:
            index = node.attr("index")
            assert isinstance(index, int)
            return self.values[node.operands[0]][index]
        (name,) = self.values[node]
        return name

    def operand(self, node: Node, rank: int, dtype: DType | None = None) -> str:
        """A value for a layer whose operands have ``rank`` dimensions in the network: a constant
        gets leading ones, and is cast to ``dtype`` where one is given.
        """
        if is_constant(node):
            return self.constant(node, rank, dtype)
        assert node.type.rank + 1 == rank, f"{node}: rank {rank}"
        name, same = self.value(node), dtype is None or dtype is node.dtype
        return name if same else self.add("cast", name, dtype=dtype)

    def constant(self, node: Node, rank: int | None = None, dtype: DType | None = None) -> str:
        """What is computed from weights alone, with leading ones up to ``rank``."""
        made = node if dtype is None or dtype is node.dtype else cast(node, dtype)
        shape = (1,) * ((rank or 0) - made.type.rank) + sizes_of(made)
        if shape != made.shape:
            made = reshape(made, *shape)
        stem = self.names.get(node, f"{self.stem}.{node.op}")
        return self.fold(made, stem)

    def fold(self, node: Node, stem: str) -> str:
        """A constant by its node."""
        key = ("fold", node)
        if key not in self.memo:
            load = partial(computed, node, self.graph)
            self.memo[key] = self.enter(stem, node.dtype, sizes_of(node), load)
        return self.memo[key]

    def enter(
        self,
        stem: str,
        dtype: DType,
        shape: tuple[int, ...],
        load: Callable[[], torch.Tensor],
        four_bits: bool = False,
    ) -> str:
        """A constant that ``load`` makes."""
        name = self.parts.unique(stem)
        self.parts.constants[name] = Constant(name, dtype, shape, load, four_bits)
        return name

    def scalar(self, value: float | int | bool, dtype: DType, rank: int) -> str:
        """A constant of ones as sizes."""
        return self.constant(const(value, dtype), rank)

    def note(self, text: str) -> None:
        """Tells the user something about the lowering."""
        self.parts.notes[text] = None

    # -- layers ---------------------------------------------------------------------------------

    def add(self, kind: str, *inputs: str, **attrs: Attr) -> str:
        """Adds a layer, and returns the name of its output; equal ones are one layer."""
        key = (kind, inputs, tuple(attrs.items()))
        if key not in self.memo or "" in inputs:
            name = self.parts.unique(f"{self.stem}.{kind}")
            self.parts.layers.append(Layer(kind, inputs, name, attrs))
            self.memo[key] = name
        return self.memo[key]

    def wide(self, x: str, dtype: DType) -> str:
        """A 16-bit value of ``dtype`` in float32; another one as it is."""
        return self.add("cast", x, dtype=DType.F32) if is_narrow(dtype) else x

    def narrow(self, x: str, dtype: DType) -> str:
        """What was computed wide, in ``dtype``."""
        return self.add("cast", x, dtype=dtype) if is_narrow(dtype) else x

    def transposed(self, x: str, order: Sequence[int]) -> str:
        """A value with its axes in another order."""
        return self.add("shuffle", x, first=tuple(order))


def is_narrow(dtype: DType) -> bool:
    """Whether numbers have 16 bits."""
    return dtype in (DType.F16, DType.BF16)


def leading(node: Node, index: int = 0) -> tuple[int | str, ...] | None:
    """The sizes that a value's first axis becomes; none for a cache, None where the value is not
    one of tokens with static sizes behind.
    """
    shape = node.types[index].shape
    name = name_of(shape[0]) if shape else None
    if name == "B":
        return ()
    known = name is not None and all(isinstance(size, int) for size in shape[1:])
    return _LEADING.get(name) if known and name is not None else None


def sizes_behind(node: Node) -> tuple[int, ...]:
    """The sizes of a value of tokens behind its first."""
    sizes = node.type.shape[1:]
    assert all(isinstance(size, int) for size in sizes), f"{node}: {sizes}"
    return sizes  # type: ignore[return-value]


def sizes_of(node: Node) -> tuple[int, ...]:
    """The sizes of a value whose sizes are static."""
    shape = node.type.shape
    assert all(isinstance(size, int) for size in shape), f"{node}: {shape}"
    return shape  # type: ignore[return-value]
