"""Writes one ONNX graph: values by IR node, constants, views, and sizes known at run time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeAlias

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ...ir.dims import Call as SizeCall
from ...ir.dims import Dim, Size, evaluate, sole_symbol
from ...ir.dtypes import DType
from ...ir.graph import Graph
from ...ir.node import Attr, Node
from ...ir.types import TensorType
from ..constants import is_constant

MICROSOFT = "com.microsoft"
ELEMENT_TYPES: dict[DType, int] = {
    DType.F64: TensorProto.DOUBLE,
    DType.F32: TensorProto.FLOAT,
    DType.F16: TensorProto.FLOAT16,
    DType.BF16: TensorProto.BFLOAT16,
    DType.I64: TensorProto.INT64,
    DType.I32: TensorProto.INT32,
    DType.I16: TensorProto.INT16,
    DType.I8: TensorProto.INT8,
    DType.U8: TensorProto.UINT8,
    DType.BOOL: TensorProto.BOOL,
}
"""ONNX element type by ours, of what ONNX Runtime's CPU computes with."""
STORED_TYPES: dict[DType, int] = {**ELEMENT_TYPES, DType.F8E4M3: TensorProto.FLOAT8E4M3FN}
"""Those of an emitted model: codes too, which QuantizeLinear gives and DequantizeLinear takes."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a node has no ONNX form."""

    reason: str


Names: TypeAlias = "str | tuple[str, ...]"
Converter: TypeAlias = "Callable[..., Names | Refusal]"
"""``convert(emitter, node, *operand names)``: the names of the results; an absent operand is ''."""


@dataclass(slots=True)
class Shared:
    """What an ONNX graph and the branches within it hold in common.

    Attributes:
        taken: every value name in use.
        inline: small constants, written into the model.
        folded: IR values that are known when the engine starts, by the name they get: weights,
            and what is computed from nothing but weights and constants.
        four_bits: shapes of folded bytes that hold two 4-bit codes each, by name.
        leaves: values that come from outside, by node.
        notes: what a user may want to know of the conversion, once each.
        types: the ONNX element types that values may have.
    """

    taken: set[str] = field(default_factory=set)
    inline: dict[str, TensorProto] = field(default_factory=dict)
    folded: dict[Node, str] = field(default_factory=dict)
    four_bits: dict[str, tuple[int, ...]] = field(default_factory=dict)
    leaves: dict[Node, str] = field(default_factory=dict)
    constants: dict[tuple[object, ...], str] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    types: Mapping[DType, int] = field(default_factory=lambda: ELEMENT_TYPES)

    def unique(self, name: str) -> str:
        """``name``, or a variant of it that is not taken yet; it is taken from now on."""
        candidate, count = name, 1
        while candidate in self.taken:
            candidate, count = f"{name}_{count}", count + 1
        self.taken.add(candidate)
        return candidate


class Emitter:
    """Converts IR nodes, in order, to ONNX nodes.

    Args:
        graph: whose nodes these are.
        names: readable names of its values.
        members: the nodes that will be converted here.
        convert: the table of converters.
        max_len: longest sequence, None when unknown.
        shared: of the enclosing graph, for the body of a branch.
    """

    def __init__(
        self,
        graph: Graph,
        names: Mapping[Node, str],
        members: Collection[Node],
        convert: Callable[[str], Converter | None],
        max_len: int | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.graph, self.names, self.members, self.convert = graph, names, set(members), convert
        self.max_len, self.shared = max_len, shared or Shared()
        self.nodes: list[NodeProto] = []
        self.values: dict[Node, tuple[str, ...]] = {}
        self.memo: dict[object, str] = {}
        self.sources: dict[str, str] = {}
        self.fresh: list[object] = []
        self.stem = graph.name

    # -- values ---------------------------------------------------------------------------------

    def value(self, node: Node | None) -> str:
        """The ONNX name of a node's only result, '' for an absent operand.

        A value from outside is entered when first asked for.
        """
        if node is None:
            return ""
        if node in self.values:
            (name,) = self.values[node]
            return name
        if node.op == "item" and node.operands[0] in self.values:
            index = node.attr("index")
            assert isinstance(index, int)
            return self.values[node.operands[0]][index]
        if node.op == "const":
            return self.scalar(node.attr("value"), node.dtype)
        return self.fold(node) if is_constant(node) else self.leaf(node)

    def at_hand(self, node: Node) -> bool:
        """Whether a value is made here, or comes in anyway."""
        made = node.operands[0] if node.op == "item" else node
        return made in self.values or made.op == "input" or node in self.shared.leaves

    def leaf(self, node: Node) -> str:
        """The name of a value from outside."""
        found = self.shared.leaves.get(node)
        if found is None:
            found = self.shared.leaves[node] = self.shared.unique(self._name(node))
        return found

    def fold(self, node: Node) -> str:
        """The name of a value computed once, when the engine starts; no input is below it."""
        found = self.shared.folded.get(node)
        if found is None:
            found = self.shared.folded[node] = self.shared.unique(self._name(node))
        return found

    def fold_four_bits(self, node: Node, shape: tuple[int, ...]) -> str:
        """As ``fold``, for bytes that ONNX is to know as 4-bit codes u4[shape], two a byte."""
        name = self.fold(node)
        self.shared.four_bits[name] = shape
        return name

    def note(self, text: str) -> None:
        """Tells the user something about the conversion."""
        self.shared.notes[text] = None

    def emit(self, node: Node) -> Refusal | None:
        """Converts a node whose operands have values."""
        converter = self.convert(node.op)
        if converter is None:
            return Refusal("no ONNX form")
        if any(t.dtype not in self.shared.types for n in (node, *node.operands) for t in n.types):
            return Refusal("element type without an ONNX form")
        outer, self.stem = self.stem, self._name(node)
        start = len(self.nodes)
        self.fresh = []
        results = converter(self, node, *map(self.value, node.args))
        if not isinstance(results, Refusal):
            names = (results,) if isinstance(results, str) else results
            self.values[node] = self._named(names, start)
        self.stem = outer
        return results if isinstance(results, Refusal) else None

    def _name(self, node: Node) -> str:
        if node.op == "item":
            return f"{self._name(node.operands[0])}.{node.attr('index')}"
        return self.names.get(node) or f"{self.stem}.{node.op}"

    def _named(self, results: tuple[str, ...], start: int) -> tuple[str, ...]:
        """Gives the node's own name to results that its conversion made."""
        made = {name for proto in self.nodes[start:] for name in proto.output}
        renamed: dict[str, str] = {}
        for index, name in enumerate(results):
            wanted = self.stem if len(results) == 1 else f"{self.stem}.{index}"
            if name in made and wanted not in self.shared.taken and name not in renamed:
                self.shared.taken.add(wanted)
                renamed[name] = wanted
        for proto in self.nodes[start:]:
            proto.input[:] = [renamed.get(name, name) for name in proto.input]
            proto.output[:] = [renamed.get(name, name) for name in proto.output]
        for old, new in renamed.items():
            if old in self.sources:
                self.sources[new] = self.sources.pop(old)
        for key in self.fresh:
            self.memo[key] = renamed.get(self.memo[key], self.memo[key])
        return tuple(renamed.get(name, name) for name in results)

    # -- nodes ----------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: str, domain: str = "", **attrs: object) -> str:
        """Adds a node of one result, and returns its name."""
        return self.ops(op_type, *inputs, count=1, domain=domain, **attrs)[0]

    def ops(
        self, op_type: str, *inputs: str, count: int, domain: str = "", **attrs: object
    ) -> tuple[str, ...]:
        """Adds a node of ``count`` results."""
        names = tuple(self.shared.unique(f"{self.stem}.{op_type}") for _ in range(count))
        self.add(op_type, inputs, names, domain, **attrs)
        return names

    def add(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str = "",
        **attrs: object,
    ) -> None:
        """Adds a node whose results have names already; trailing absent operands are left out."""
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        present = {name: value for name, value in attrs.items() if value is not None}
        self.nodes.append(
            helper.make_node(op_type, given, list(outputs), outputs[0], domain=domain, **present)
        )

    def once(self, key: object, make: Callable[[], str]) -> str:
        """What ``make`` gives, computed once a graph."""
        if key not in self.memo:
            self.memo[key] = make()
            self.fresh.append(key)
        return self.memo[key]

    # -- constants ------------------------------------------------------------------------------

    def constant(self, value: np.ndarray) -> str:
        """A small constant tensor within the model."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self.shared.constants:
            flat = "_".join(str(x) for x in value.ravel()[:4].tolist())
            name = self.shared.unique(f"const_{value.dtype}_{flat}"[:48])
            self.shared.inline[name] = numpy_helper.from_array(value, name)
            self.shared.constants[key] = name
        return self.shared.constants[key]

    def scalar(self, value: Attr, dtype: DType) -> str:
        """A constant of shape []."""
        if dtype is DType.BF16:
            key = ("bf16", value)
            if key not in self.shared.constants:
                name = self.shared.unique(f"const_bf16_{value}")
                self.shared.inline[name] = helper.make_tensor(
                    name, TensorProto.BFLOAT16, (), [value]
                )
                self.shared.constants[key] = name
            return self.shared.constants[key]
        return self.constant(np.array(value, dtype=numpy_type(dtype)))

    def ints(self, *values: int) -> str:
        """A constant i64[n]."""
        return self.constant(np.array(values, dtype=np.int64))

    # -- shapes ---------------------------------------------------------------------------------

    def view(self, x: str, shape: Sequence[Size]) -> str:
        """``x`` with another shape, made from what ``x`` itself is a view of."""
        source = self.sources.get(x, x)
        target = self.target_shape(shape)
        key = ("view", source, target)
        if key not in self.memo:
            zero = 1 if 0 in shape else None
            made = self.op("Reshape", source, target, allowzero=zero)
            self.sources[made] = source
            self.memo[key] = made
            self.fresh.append(key)
        return self.memo[key]

    def target_shape(self, shape: Sequence[Size]) -> str:
        """A shape for Reshape: a single unknown size is left to ONNX."""
        unknown = [i for i, size in enumerate(shape) if isinstance(size, Dim)]
        if len(unknown) == 1 and 0 not in shape:
            return self.ints(*(-1 if isinstance(s, Dim) else s for s in shape))
        return self.shape(shape)

    def shape(self, sizes: Sequence[Size]) -> str:
        """i64[n] of sizes."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(*sizes)  # type: ignore[arg-type]
        if len(sizes) == 1:
            return self.size(sizes[0])
        parts = [self.size(size) for size in sizes]
        return self.once(("shape", tuple(sizes)), lambda: self.op("Concat", *parts, axis=0))

    def size(self, size: Size) -> str:
        """i64[1] of one size."""
        if isinstance(size, int):
            return self.ints(size)
        return self.once(("size", size), lambda: self._size(size))

    def _size(self, size: Dim) -> str:
        terms = []
        for monomial, coefficient in size.terms:
            factors = [self._symbol(a) if isinstance(a, str) else self._call(a) for a in monomial]
            if coefficient != 1 or not factors:
                factors.append(self.ints(coefficient))
            terms.append(reduce(lambda a, b: self.op("Mul", a, b), factors))
        return reduce(lambda a, b: self.op("Add", a, b), terms)

    def _call(self, atom: SizeCall) -> str:
        a, b = map(self.size, atom.args)
        if atom.name in ("min", "max"):
            return self.op(atom.name.capitalize(), a, b)
        rest = self.op("Mod", a, b)
        # Div truncates; after taking the remainder away it is exact.
        return rest if atom.name == "mod" else self.op("Div", self.op("Sub", a, rest), b)

    def _symbol(self, symbol: str) -> str:
        def make() -> str:
            node, axis = self._source_of(symbol)
            size = node.shape[axis]
            dim = self.op("Shape", self.value(node), start=axis, end=axis + 1)
            zero = evaluate(size, {symbol: 0})
            scale = evaluate(size, {symbol: 1}) - zero
            if zero:
                dim = self.op("Sub", dim, self.ints(zero))
            return dim if scale == 1 else self.op("Div", dim, self.ints(scale))

        return self.once(("symbol", symbol), make)

    def _source_of(self, symbol: str) -> tuple[Node, int]:
        """The input and axis that bind a symbol, best one whose size is the symbol itself."""
        binding = [
            (str(size) != symbol, node, axis)
            for node in self.graph.inputs
            for axis, size in enumerate(node.shape)
            if sole_symbol(size) == symbol
        ]
        assert binding, f"no input of {self.graph.name} binds {symbol}"
        _, node, axis = min(binding, key=lambda found: found[0])
        return node, axis


def numpy_type(dtype: DType) -> np.dtype:
    """The numpy dtype of a type that numpy has."""
    found: np.dtype = helper.tensor_dtype_to_np_dtype(ELEMENT_TYPES[dtype])
    return found


def value_info(name: str, type_: TensorType) -> onnx.ValueInfoProto:
    """Declares an input or output: sizes as numbers, symbols as names, expressions open."""
    dims = [
        size if isinstance(size, int) else str(size) if str(size).isidentifier() else None
        for size in type_.shape
    ]
    return helper.make_tensor_value_info(name, STORED_TYPES[type_.dtype], dims)
