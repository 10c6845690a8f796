"""Decode products of 4-bit weights and rows that the weight lets them round to int8:
``linear(x, dequantize(codes, scale, zero?, compute=i8))``, the norm before, and the ops behind.

A launch normalises and rounds every row, by groups of columns. For one token the product then takes
8 codes a word to one word of two instructions, where floats take two instructions a code; several
tokens go through tensor cores in int8. A group's sums are exact, and scaled as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ....ir.dims import Size
from ....ir.dtypes import DType
from ....ir.node import Node
from ....ir.ops.quant import LARGEST, blocks
from ....targets import Target
from ..generate_text import helper_text, kernel_text
from ..layout import Layout
from ..source import HEADER, PDL, KernelSource, Launch, Pointer, Variant, has_pdl, jit_text
from . import linear_kernel, packed_linear_kernel, quant_linear_kernel, scaled_linear_kernel
from .linear import _Rows
from .linear_hands import Hands
from .linear_tiles import ANY, Cutting, GemmTiles, GemvTiles, are_taken
from .packed_linear_tiles import (
    SPAN,
    Packed,
    cut_packed_gemv,
    default_packed_gemms,
    invariant_packed_gemm,
)
from .quant_linear import _OWN as _QUANT
from .quant_linear import _SHARED, _QuantEntries
from .scaled_linear import CALLED

_CODED = ("_coded", "_shared_rows", "_of_spans")
_ROUNDS = ("_rounded", "_normed_row", "_group_scales")
_OWN = (
    *("_pack_rows", "_word_products", "_less_zeros", "_one_token_of_words"),
    *("_byte_halves", "_tokens_of_words"),
)
_ALONE = Hands()
_THREAD_COLUMNS = 16  # of a row, that a thread rounds


def emit_packed_linear(
    node: Node, layouts: tuple[Layout | None, ...], target: Target, cutting: Cutting = ANY
) -> KernelSource | None:
    """A kernel for a ``fused`` node of kind "linear" whose 4-bit weight has ``compute=i8``, for as
    many tokens as ``cutting`` says.

    None for other nodes, rows of codes that are no whole words, and groups of columns that are no
    power of two from 32 on: these are left to floats. So are several tokens of groups of 32.
    """
    packed = Packed.of(node, layouts)
    gemms = None if packed is None else default_packed_gemms(packed, target, cutting)
    if packed is None or gemms is None:
        return None
    return packed_linear_source(packed, target, cut_packed_gemv(packed, target, cutting), gemms)


def emit_invariant_packed_linear(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """As ``emit_packed_linear``, with one cut for any number of tokens."""
    packed = Packed.of(node, layouts)
    tiles = None if packed is None else invariant_packed_gemm(packed, target)
    if packed is None or tiles is None:
        return None
    return packed_linear_source(packed, target, None, [tiles])


def packed_linear_source(
    packed: Packed, target: Target, gemv: GemvTiles | None, gemms: Sequence[GemmTiles]
) -> KernelSource | None:
    """The kernel of a problem with these tiles, which are taken as by ``linear_source``.

    None where the body holds an op that kernels lack, a split would have no columns, or a step more
    than one group.
    """
    quantized = packed.quantized
    problem, pdl = quantized.problem, has_pdl(target)
    if not are_taken(problem, gemms) or not all(map(packed.takes, gemms)):
        return None
    entries = _PackedEntries(problem, pdl, quantized=quantized, packed=packed)
    several = entries if packed.by_matrix else _QuantEntries(problem, pdl, quantized=quantized)
    variants = []
    if gemv is not None:
        guard = (1 - problem.tokens,) if gemms else ()
        variants.append(replace(entries.single(gemv), guard=guard))
    for index, tiles in enumerate(gemms):
        guard = () if index == len(gemms) - 1 else (tiles.block_m - problem.tokens,)
        variants.append(replace(several.tokens(tiles, _ALONE), guard=guard))
    text = HEADER + helper_text([*entries.lines, *CALLED]) + jit_text(linear_kernel, _SHARED)
    text += jit_text(quant_linear_kernel, _CODED if several is entries else _QUANT)
    text += jit_text(scaled_linear_kernel, _ROUNDS) + jit_text(packed_linear_kernel, _OWN)
    text += "".join({**entries.texts, **several.texts}.values())
    # Sums may be contracted; the ops that round have nothing to contract.
    contracts = problem.linear.dtype is not DType.F32
    return KernelSource(problem.body.name, "template", text, tuple(variants), contracts)


@dataclass
class _PackedEntries(_QuantEntries):
    """The entry points over rows that a launch before has rounded."""

    packed: Packed | None = None

    def single(self, tiles: GemvTiles) -> Variant:
        """The launches for one token."""
        p = self.problem
        product = f"acc = _one_token_of_words({self._operands('weight_rows')}, BLOCK_K, PDL)"
        name = f"{p.body.name}_of_one"
        behind = {p.weight, p.bias, *(place.source for place in p.places.values())}
        inputs = [node for node in p.body.inputs if node in behind]
        arguments = (*self._arguments(inputs), *self._rounded())
        self._enter(name, arguments, [product, *self.lines])
        constants = self._constants(1, tiles.block_n, tiles.block_k, 1, 0)
        grid = (-(-p.n // tiles.block_n), 1, 1)
        launch = Launch(name, arguments, grid, constants, tiles.num_warps)
        return Variant((self._round(SPAN), launch), self._spaces())

    def tokens(self, tiles: GemmTiles, hands: Hands) -> Variant:
        """The launches for several tokens."""
        product = super().tokens(tiles, hands)
        return replace(product, launches=(self._round(tiles.block_k), *product.launches))

    def _rows(self, hands: Hands) -> _Rows:
        return _Rows("_of_rounded", ("", ""), self._rounded(), (), self._spaces())

    def _product(self, x: _Rows, hands: Hands, parts: bool) -> list[str]:
        tokens = "weight_rows, tl.minimum(tl.reshape(token, (BLOCK_M,)), tokens - 1)"
        product = f"acc = _tokens_of_words({self._operands(tokens)}, BLOCK_K, SPLITS, AHEAD, PDL)"
        if not parts:
            return [product, *self.lines]
        gathered = "acc, last = _gathered(acc, partial_ptr, counter_ptr, SPLITS)"
        return [product, gathered, "if last:", *(f"    {line}" for line in self.lines)]

    def _operands(self, rows: str) -> str:
        """The arguments of a product from x to X_GROUP, ``rows`` among them."""
        s = self._packed
        q = s.quantized
        zero = "None" if q.zero is None else self._pointer(q.zero)
        weight = f"{self._pointer(q.codes)}, {self._pointer(q.scale)}, {zero}"
        sizes = f"{q.width}, {q.rows}, {q.group}, {blocks(q.problem.k, q.group)}"
        return f"{self._of_x()}, {weight}, {rows}, {sizes}, {s.half}, {s.group}"

    def _rounded(self) -> tuple[Pointer, ...]:
        """The codes of x, their scales and, for zero points, their sums."""
        named = ("rounded_ptr", DType.I8), ("row_scale_ptr", DType.F32), ("row_sum_ptr", DType.I32)
        return tuple(
            Pointer(name, dtype, "workspace", index)
            for index, (name, dtype) in enumerate(named[: len(self._spaces())])
        )

    def _spaces(self) -> tuple[tuple[DType, Size], ...]:
        """As many sums as there are of the narrowest spans."""
        s, tokens = self._packed, self.problem.tokens
        spaces = [
            (DType.I8, tokens * (2 * s.half)),
            (DType.F32, tokens * s.groups),
            (DType.I32, tokens * blocks(2 * s.half, SPAN)),
        ]
        return tuple(spaces if s.quantized.zero is not None else spaces[:2])

    def _of_x(self) -> str:
        """The workspaces as functions take them, None for sums that nobody needs."""
        return ", ".join([*(pointer.name for pointer in self._rounded()), "None"][:3])

    def _round(self, span: int) -> Launch:
        """The launch that normalises and rounds every row, with sums over ``span`` columns."""
        s, p = self._packed, self.problem
        name, weight = f"{p.body.name}_round", self._norm_weight()
        inputs = [node for node in (p.x.source, weight) if node is not None]
        arguments = (*self._arguments(inputs, ()), *self._rounded())
        norm = "None" if weight is None else self._pointer(weight)
        stepwise = p.norm is not None and bool(p.norm.attr("stepwise"))
        line = (
            f"_pack_rows({self._x_start()}, {norm}, {self._of_x()}, {p.x.row}, {p.k}, {s.half}, "
            f"{s.group}, {p.norm is not None}, {p.eps!r}, {stepwise}, {LARGEST[DType.I8]!r}, "
            "BLOCK_K, SPAN, PDL)"
        )
        names = [argument.name for argument in arguments]
        about = f"rows of {p.k}, by groups of {s.group}"
        self.texts[name] = kernel_text(name, about, names, [line], ("BLOCK_K", "SPAN", PDL))
        block = max(1 << (2 * s.half - 1).bit_length(), s.group)
        warps = max(1, min(16, block // (32 * _THREAD_COLUMNS)))
        sums = SPAN if s.quantized.zero is None else span  # one launch for all, where none are made
        constants = {"BLOCK_K": block, "SPAN": sums, PDL: self.pdl}
        return Launch(name, arguments, (p.tokens, 1, 1), constants, warps)

    @property
    def _packed(self) -> Packed:
        assert self.packed is not None
        return self.packed
