"""From a decode graph to what the persistent kernel computes: forms of calls, and calls in order.

What it does not know stops it, by name: the graph is then served by kernels of its own calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ...errors import UnsupportedError
from ...ir.dtypes import DType
from ...ir.graph import Graph, input_name, param_name
from ...ir.node import Node
from ...ir.ops.control import body_of
from ...ir.ops.quant import blocks
from ..eager.backend import is_call
from ..triton.kernels.linear_tiles import Problem
from ..triton.layout import VIEWS, Layout, located
from .codes import CodedProduct, Codes, coded_product
from .rope import frequencies_of, is_cast_of_positions


@dataclass(frozen=True, slots=True)
class Begin:
    """The token's row of the embedding, and cos and sin of its position."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product with one row of x, and what is fused with it.

    Attributes:
        n, k: rows and columns of the weight.
        norm, eps: whether x is normalised first, and the epsilon of that.
        gated, stepwise: whether silu of the first half of the columns is multiplied with the
            second half, and whether silu is rounded before.
        residual: whether something is added.
        chosen: whether the likeliest column is kept.
        codes: what the weight's are, None for bfloat16.
        norm_stepwise: whether the norm rounds before it multiplies with its weight, where x is
            rounded to codes behind it.
    """

    n: int
    k: int
    norm: bool = False
    eps: float = 0.0
    gated: bool = False
    stepwise: bool = False
    residual: bool = False
    chosen: bool = False
    codes: Codes | None = None
    norm_stepwise: bool = False

    @property
    def bits(self) -> int:
        """Of an element of the weight."""
        return 16 if self.codes is None else self.codes.bits

    @property
    def rounds(self) -> bool:
        """Whether x is rounded to codes."""
        return self.codes is not None and self.codes.rounds

    @property
    def row_scaled(self) -> bool:
        """Whether each row of the weight has one scale."""
        return self.codes is not None and self.codes.group == 0

    @property
    def row_bytes(self) -> int:
        """From a row of the weight to the next one."""
        return 2 * self.k if self.codes is None else self.codes.row_bytes(self.k)

    @property
    def weight_bytes(self) -> int:
        """Of the weight, its scales included."""
        scales = 0
        if self.codes is not None:
            groups = blocks(self.k, self.codes.group)
            scales = blocks(self.n, self.codes.block) * groups * self.codes.scale_bytes
        return self.n * self.row_bytes + scales

    @property
    def out_rows(self) -> int:
        """Elements of the result."""
        return self.n // 2 if self.gated else self.n

    def tile_rows(self, rows: int) -> int:
        """Elements of the result that a tile makes: of two chunks' rows, or of pairs of these."""
        return rows if self.gated else 2 * rows


@dataclass(frozen=True, slots=True)
class Attention:
    """Rope in halves, the write into the cache, and attention over it.

    Attributes:
        heads, kv_heads, head_dim, page_size: H, G, D and P.
        factor: of the scores, as exponents of 2.
        stepwise: whether rope rounds its products.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    factor: float
    stepwise: bool


Form: TypeAlias = Begin | Product | Attention


@dataclass(frozen=True, slots=True)
class Step:
    """One call. Memory goes by name: weights and inputs by their own, results as ``%0``, ``%1``…

    Attributes:
        form: index into the shape's forms.
        x, out: what it reads and writes.
        weight, norm, residual: of a product; the embedding is the weight of the first call.
        caches: of keys and values.
        scale: of a weight of codes.
    """

    form: int
    x: str
    out: str
    weight: str = ""
    norm: str = ""
    residual: str = ""
    caches: tuple[str, str] = ("", "")
    scale: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """All that a model's kernel depends on.

    Attributes:
        forms: of calls, each once.
        calls: in order.
        results: elements of each result by name.
        width: of the residual stream; ``head_dim``: D; ``inv_freq``: name of rope's frequencies.
    """

    forms: tuple[Form, ...]
    calls: tuple[Step, ...]
    results: Mapping[str, int]
    width: int
    head_dim: int
    inv_freq: str

    @property
    def products(self) -> tuple[Product, ...]:
        """The forms that read weights."""
        return tuple(form for form in self.forms if isinstance(form, Product))

    def form(self, step: Step) -> Form:
        """The form of a call."""
        return self.forms[step.form]

    @property
    def codes(self) -> Codes | None:
        """What weights are codes of, the same for all of them; None where none are codes."""
        return next((form.codes for form in self.products if form.codes is not None), None)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the products' weights."""
        forms = (self.form(step) for step in self.calls)
        return sum(form.weight_bytes for form in forms if isinstance(form, Product))


def read_decode(graph: Graph) -> Shape:
    """What the kernel computes of a fused decode graph, for one sequence.

    Raises:
        UnsupportedError: a call that it does not know, which is named.
    """
    reading = _Reading()
    for node in graph.nodes:
        if is_call(node) and node.op not in VIEWS:
            reading.take(node)
    return reading.shape()


@dataclass(slots=True)
class _Reading:
    forms: dict[Form, int] = field(default_factory=dict)
    calls: list[Step] = field(default_factory=list)
    results: dict[str, int] = field(default_factory=dict)
    names: dict[Node, str] = field(default_factory=dict)
    heads: dict[Node, Node] = field(default_factory=dict)  # append_kv by its result q
    rope: Node | None = None
    inv_freq: str = ""
    sampled: bool = False
    _codes: Codes | None = None

    def take(self, node: Node) -> None:
        """Appends what computes a node."""
        _insist(not self.sampled, node)
        ops = _ops(node)
        if ops == ("embedding",):
            self._begin(node)
        elif node.op == "fused" and node.attr("kind") == "linear":
            self._product(node)
        elif node.op == "append_kv":
            self._append(node)
        elif node.op == "paged_attention":
            self._attention(node)
        elif node.op == "sample":
            self._sample(node)
        elif not is_cast_of_positions(node):
            self._rope(node)

    def shape(self) -> Shape:
        first = self.calls[0] if self.calls else None
        assert first is not None and self.inv_freq, "a causal LM with rope begins with these"
        attention = next(form for form in self.forms if isinstance(form, Attention))
        width = self.results[first.out]
        forms, calls = tuple(self.forms), tuple(self.calls)
        return Shape(forms, calls, self.results, width, attention.head_dim, self.inv_freq)

    def _begin(self, node: Node) -> None:
        weight, ids = node.operands
        _insist(not self.calls and ids.op == "input" and weight.op == "param", node)
        _insist(weight.dtype is DType.BF16, node)
        out = self._result(node, _size(node))
        self._append_step(Begin(), "token_ids", out, weight=param_name(weight))

    def _product(self, node: Node) -> None:
        coded = coded_product(node)
        problem = Problem.located(node) if coded is None else coded.problem
        if problem is None or problem.bias is not None or problem.linear.dtype is not DType.BF16:
            raise _stopped(node)
        # A weight of codes is one more input of the body, behind those that the call gives.
        outer = dict(zip(problem.body.inputs, node.operands, strict=coded is None))
        weight = outer[problem.weight if coded is None else coded.weight]
        scale = "" if coded is None else self._scale(node, outer[coded.scale])
        form, norm = _form(node, problem, outer, coded)
        _insist(self._codes in (None, form.codes) or form.codes is None, node)
        self._codes = self._codes or form.codes
        _insist(weight.op == "param" and problem.x.offset == 0 and problem.k % 8 == 0, node)
        other = _epilogue(problem, node)[2]
        self._append_step(
            form,
            self._name(outer[problem.x.source], node),
            self._result(node, form.out_rows),
            weight=param_name(weight),
            norm=norm,
            residual="" if other is None else self._name(outer[other], node),
            scale=scale,
        )

    def _scale(self, node: Node, scale: Node) -> str:
        _insist(scale.op == "param", node)
        return param_name(scale)

    def _append(self, node: Node) -> None:
        q, cos, sin, q_norm, k_norm = node.args[5:]
        plain = {name for name, _ in node.attrs} <= {"layout", "stepwise"} and q_norm is k_norm
        _insist(plain and q_norm is None and node.attr("layout") == "half", node)
        if q is None or cos is None or sin is None:
            raise _stopped(node)
        for index, item in enumerate((cos, sin)):
            _insist(item.op == "item" and item.attr("index") == index, node)
            _insist(item.operands[0] is self.rope, node)
        _insist(2 * cos.shape[1] == q.shape[2], node)
        self.heads[node] = node

    def _attention(self, node: Node) -> None:
        q, k_cache, v_cache, tables, lengths = node.operands[:5]
        tables, _ = located(tables)  # who shares pages changes nothing: each is read by itself
        attrs = {name for name, _ in node.attrs}
        _insist(len(node.operands) == 5 and attrs == {"causal", "scale"}, node)
        append = q.operands[0] if q.op == "item" else q
        _insist(append in self.heads and tables.op == lengths.op == "input", node)
        items = ((q, 2), (k_cache, 0), (v_cache, 1))
        _insist(all(n.operands[0] is append and n.attr("index") == i for n, i in items), node)
        k, v, keys, values = append.operands[:4]
        _, heads, dim = q.shape
        _, page_size, kv_heads, _ = keys.shape
        sizes = (heads, kv_heads, dim, page_size, values.shape[3])
        _insist(all(isinstance(size, int) for size in sizes), node)
        heads, kv_heads, dim, page_size = (int(str(size)) for size in sizes[:4])
        _insist(sizes[4] == dim and dim & (dim - 1) == 0 and dim >= 16, node)
        _insist(keys.dtype is values.dtype is DType.BF16 and keys.op == values.op == "input", node)
        qkv = self._together(node, (append.operands[5], k, v), (heads, kv_heads, kv_heads), dim)
        factor = float(node.attr("scale")) * math.log2(math.e)  # type: ignore[arg-type]
        stepwise = bool(append.attr("stepwise"))
        self._append_step(
            Attention(heads, kv_heads, dim, page_size, factor, stepwise),
            self._name(qkv, node),
            self._result(node, heads * dim),
            caches=(input_name(keys), input_name(values)),
        )

    def _together(
        self, node: Node, parts: tuple[Node, ...], counts: tuple[int, ...], dim: int
    ) -> Node:
        """The buffer that q, k and v lie in, one behind the other."""
        (base, _), start = located(parts[0]), 0
        for part, count in zip(parts, counts, strict=True):
            found, layout = located(part)
            width = base.shape[-1]
            _insist(found is base and layout == Layout(start, (width, dim, 1)), node)
            start += count * dim
        return base

    def _rope(self, node: Node) -> None:
        frequencies = frequencies_of(node)
        if frequencies is None:
            raise _stopped(node)
        _insist(self.rope is None, node)
        self.rope, self.inv_freq = node, param_name(frequencies)

    def _sample(self, node: Node) -> None:
        last = self.calls[-1]
        _insist(self.names.get(node.operands[0]) == last.out, node)
        (form,) = (f for f, index in self.forms.items() if index == last.form)
        _insist(isinstance(form, Product) and not form.gated and not form.residual, node)
        self.sampled = True
        del self.calls[-1]
        uses = any(step.form == last.form for step in self.calls)
        if not uses:
            del self.forms[form]
        assert isinstance(form, Product)
        chosen, names = replace(form, chosen=True), (last.weight, last.norm, last.scale)
        weight, norm, scale = names
        self._append_step(chosen, last.x, last.out, weight=weight, norm=norm, scale=scale)

    def _append_step(
        self,
        form: Form,
        x: str,
        out: str,
        *,
        weight: str = "",
        norm: str = "",
        residual: str = "",
        caches: tuple[str, str] = ("", ""),
        scale: str = "",
    ) -> None:
        index = self.forms.setdefault(form, len(self.forms))
        self.calls.append(Step(index, x, out, weight, norm, residual, caches, scale))

    def _result(self, node: Node, size: int) -> str:
        name = self.names[node] = f"%{len(self.names)}"
        self.results[name] = size
        return name

    def _name(self, value: Node, user: Node) -> str:
        base, layout = located(value)
        _insist(base in self.names and layout.offset == 0, user)
        return self.names[base]


def _form(
    node: Node, problem: Problem, outer: Mapping[Node, Node], coded: CodedProduct | None
) -> tuple[Product, str]:
    """What a product computes, and the name of the weight of its norm."""
    eps, norm, steps = 0.0, "", False
    if problem.norm is not None:
        scale = problem.norm.args[1]
        known = {"eps", "stepwise"} >= {name for name, _ in problem.norm.attrs}
        if scale is None or not known or outer[scale].op != "param":
            raise _stopped(node)
        _insist(outer[scale].dtype is DType.BF16, node)
        eps, norm = float(problem.norm.attr("eps")), param_name(outer[scale])  # type: ignore[arg-type]
        steps = bool(problem.norm.attr("stepwise"))
    gated, stepwise, residual = _epilogue(problem, node)
    codes = None if coded is None else coded.codes
    form = Product(
        problem.n * problem.parts,
        problem.k,
        bool(norm),
        eps,
        gated,
        stepwise,
        residual is not None,
        codes=codes,
        norm_stepwise=steps and codes is not None and codes.rounds,
    )
    # Rows of a chunk have one row of blocks of scales.
    fits = codes is None or codes.block == 1 or (form.n % 32 == 0 and form.out_rows % 16 == 0)
    _insist(fits, node)
    return form, norm


def _epilogue(problem: Problem, node: Node) -> tuple[bool, bool, Node | None]:
    """Whether the product is gated, rounded between, and what is added to it."""
    if not problem.members:
        return False, False, None
    _insist(len(problem.members) == 1, node)
    (member,) = problem.members
    if member.op == "gated":
        halves = [(part.op, part.attr("dim"), part.attr("start")) for part in member.operands]
        _insist(halves == [("slice", 1, 0), ("slice", 1, problem.n)], node)
        _insist(member.attr("activation") == "silu", node)
        return True, bool(member.attr("stepwise")), None
    _insist(member.op == "add" and problem.parts == 1, node)
    others = [arg for arg in member.operands if arg is not problem.linear]
    _insist(len(others) == 1 and others[0].op == "input", node)
    (other,) = others
    _insist(other.shape == member.shape, node)
    return False, False, other


def _ops(node: Node) -> tuple[str, ...]:
    return (node.op,) if node.attr("kind") == "linear" else _inner(node)


def _inner(node: Node) -> tuple[str, ...]:
    if node.op != "fused":
        return (node.op,)
    return tuple(inner.op for inner in body_of(node).calls())


def _size(node: Node) -> int:
    size = node.shape[-1]
    _insist(isinstance(size, int), node)
    return int(str(size))


def _insist(holds: bool, node: Node) -> None:
    if not holds:
        raise _stopped(node)


def _stopped(node: Node) -> UnsupportedError:
    inner = [op for op in _inner(node) if op not in VIEWS]
    what = " + ".join(inner)
    types = ", ".join(map(str, node.types))
    return UnsupportedError(
        f"one launch for all layers: {what} of {types}",
        expected="the calls of a dense decoder in bfloat16: embedding, rms_norm + linear, linear + "
        "add, silu gates, rope in halves, plain paged attention, sample; weights in bfloat16, or "
        "all codes of one kind: e4m3 by rows or blocks, 4 bits by groups without zero points",
        found=str(node)[:200],
        remedy="Its decode steps run as a graph of separate kernels.",
    )
