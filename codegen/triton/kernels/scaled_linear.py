"""Decode products of two operands in codes: ``scaled_linear`` over rows that are rounded to codes,
the norm before, and the ops behind.

A launch normalises and rounds every row, for all of a row has a say in its scale, and all programs
of the product need all of the row. The product itself then is that of quant_linear.py for one
token, whose x is numbers that codes stand for; several tokens go through tensor cores in the codes'
own type. A group's sums are scaled as a whole, so that nothing else is rounded on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ....ir.dtypes import DType
from ....ir.node import Node
from ....ir.ops.quant import blocks
from ....targets import Target
from ..generate_ops import TRITON_NAMES
from ..generate_text import helper_text, kernel_text
from ..layout import Layout
from ..source import HEADER, PDL, KernelSource, Launch, Pointer, Variant, has_pdl, jit_text
from . import linear_kernel, quant_linear_kernel, scaled_linear_kernel
from .linear import _Rows
from .linear_hands import Hands
from .linear_tiles import ANY, Cutting, GemmTiles, GemvTiles, are_taken
from .quant_linear import _QuantEntries
from .scaled_linear_tiles import Scaled, default_scaled_gemms, invariant_scaled_gemm, scaled_gemv

_PLAIN = ("_weights", "_inputs", "_prefetch", "_gathered")
_CODED = (
    *("_coded", "_shared_rows", "_of_spans", "_nibbles", "_raised", "_span_sums", "_excess"),
    "_one_token_of_codes",
)
_OWN = ("_rounded", "_normed_row", "_group_scales", "_round_rows", "_tokens_of_both")
CALLED = ("_by_largest",)
"""Of functions.py, by what rounds rows."""
_ALONE = Hands()
_THREAD_COLUMNS = 8  # of a row, that a thread rounds
_MOST_WARPS = 16


def emit_scaled_linear(
    node: Node, layouts: tuple[Layout | None, ...], target: Target, cutting: Cutting = ANY
) -> KernelSource | None:
    """A kernel for a ``fused`` node of kind "linear" whose product is ``scaled_linear``, for as
    many tokens as ``cutting`` says.

    None for other nodes, groups of columns that are no power of two from 32 on, and codes that the
    target has no type for.
    """
    scaled = Scaled.of(node, layouts)
    gemms = None if scaled is None else default_scaled_gemms(scaled, target, cutting)
    if scaled is None or gemms is None:
        return None
    gemv = scaled_gemv(node, scaled, target, cutting)
    return scaled_linear_source(scaled, target, gemv, gemms)


def emit_invariant_scaled_linear(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """As ``emit_scaled_linear``, with one cut for any number of tokens."""
    scaled = Scaled.of(node, layouts)
    tiles = None if scaled is None else invariant_scaled_gemm(scaled, target)
    if scaled is None or tiles is None:
        return None
    return scaled_linear_source(scaled, target, None, [tiles])


def scaled_linear_source(
    scaled: Scaled, target: Target, gemv: GemvTiles | None, gemms: Sequence[GemmTiles]
) -> KernelSource | None:
    """The kernel of a problem with these tiles, which are taken as by ``linear_source``.

    None where the body holds an op that kernels lack, a split would have no columns, or the target
    no type for the codes.
    """
    quantized = scaled.quantized
    problem = quantized.problem
    if not quantized.fits(target) or not are_taken(problem, gemms):
        return None
    entries = _ScaledEntries(problem, has_pdl(target), quantized=quantized, scaled=scaled)
    variants = []
    if gemv is not None:
        guard = (1 - problem.tokens,) if gemms else ()
        variants.append(replace(entries.single(gemv), guard=guard))
    for index, tiles in enumerate(gemms):
        guard = () if index == len(gemms) - 1 else (tiles.block_m - problem.tokens,)
        variants.append(replace(entries.tokens(tiles, _ALONE), guard=guard))
    text = HEADER + helper_text([*entries.lines, *CALLED]) + jit_text(linear_kernel, _PLAIN)
    text += jit_text(quant_linear_kernel, _CODED) + jit_text(scaled_linear_kernel, _OWN)
    text += "".join(entries.texts.values())
    # Sums may be contracted; the ops that round have nothing to contract.
    contracts = problem.linear.dtype is not DType.F32
    return KernelSource(problem.body.name, "template", text, tuple(variants), contracts)


@dataclass
class _ScaledEntries(_QuantEntries):
    """The entry points over rows that a launch before has rounded."""

    scaled: Scaled | None = None

    def single(self, tiles: GemvTiles) -> Variant:
        """The launches for one token."""
        s, p = self._scaled, self.problem
        group = s.quantized.group
        # Groups of x are scaled before the product: its sums know the weight's scales only.
        dtype = DType.F32 if group else s.codes
        rounded = Pointer("rounded_ptr", dtype, "workspace", 0)
        scales = Pointer("row_scale_ptr", DType.F32, "workspace", 1)
        product = (
            f"acc = _one_token_of_codes(rounded_ptr, None, {self._codes('weight_rows')}, "
            "False, 0.0, BLOCK_K, PDL)"
        )
        scale = () if group else ("acc *= tl.load(row_scale_ptr)",)
        name = f"{p.body.name}_of_one"
        behind = {p.weight, p.bias, *(place.source for place in p.places.values())}
        inputs = [node for node in p.body.inputs if node in behind]
        arguments = (*self._arguments(inputs), rounded, scales)
        self._enter(name, arguments, [product, *scale, *self.lines])
        constants = self._constants(1, tiles.block_n, tiles.block_k, 1, 0)
        grid = (-(-p.n // tiles.block_n), 1, 1)
        launch = Launch(name, arguments, grid, constants, tiles.num_warps)
        spaces = ((dtype, p.tokens * p.k), (DType.F32, p.tokens * self._groups))
        return Variant((self._round(rounded, scales), launch), spaces)

    def _rows(self, hands: Hands) -> _Rows:
        p = self.problem
        rounded = Pointer("rounded_ptr", self._scaled.codes, "workspace", 0)
        scales = Pointer("row_scale_ptr", DType.F32, "workspace", 1)
        spaces = ((rounded.dtype, p.tokens * p.k), (DType.F32, p.tokens * self._groups))
        launch = self._round(rounded, scales)
        text = f"{rounded.name}, {scales.name}", ""
        return _Rows("_of_rounded", text, (rounded, scales), (), spaces, (launch,))

    def _product(self, x: _Rows, hands: Hands, parts: bool) -> list[str]:
        q, (rows, _) = self._scaled.quantized, x.text
        tokens = "tl.minimum(tl.reshape(token, (BLOCK_M,)), tokens - 1)"
        product = (
            f"acc = _tokens_of_both({rows}, {self._pointer(q.codes)}, {self._pointer(q.scale)}, "
            f"weight_rows, {tokens}, {q.problem.k}, {q.rows}, {q.group}, BLOCK_K, SPLITS, AHEAD, "
            "PDL)"
        )
        if not parts:
            return [product, *self.lines]
        gathered = "acc, last = _gathered(acc, partial_ptr, counter_ptr, SPLITS)"
        return [product, gathered, "if last:", *(f"    {line}" for line in self.lines)]

    def _round(self, rounded: Pointer, scales: Pointer) -> Launch:
        """The launch that normalises every row and rounds it into workspaces."""
        s, p = self._scaled, self.problem
        values = rounded.dtype is DType.F32
        name = f"{p.body.name}_round" + ("_to_values" if values else "")
        weight, static = self._norm_weight(), s.static
        inputs = [node for node in (p.x.source, weight, static) if node is not None]
        arguments = (*self._arguments(inputs, ()), rounded, scales)
        norm, given = ("None" if node is None else self._pointer(node) for node in (weight, static))
        stepwise = p.norm is not None and bool(p.norm.attr("stepwise"))
        line = (
            f"_round_rows({self._x_start()}, {norm}, {given}, {rounded.name}, {scales.name}, "
            f"{p.x.row}, {p.k}, {s.quantized.group}, {p.norm is not None}, {p.eps!r}, {stepwise}, "
            f"{s.largest!r}, {s.codes is DType.I8}, {TRITON_NAMES[s.codes]}, BLOCK_K, PDL)"
        )
        names = [argument.name for argument in arguments]
        self.texts[name] = kernel_text(name, str(s.rounds), names, [line], ("BLOCK_K", PDL))
        block = max(1 << (p.k - 1).bit_length(), s.quantized.group)
        warps = max(1, min(_MOST_WARPS, block // (32 * _THREAD_COLUMNS)))
        return Launch(name, arguments, (p.tokens, 1, 1), {"BLOCK_K": block, PDL: self.pdl}, warps)

    @property
    def _scaled(self) -> Scaled:
        assert self.scaled is not None
        return self.scaled

    @property
    def _groups(self) -> int:
        q = self._scaled.quantized
        return blocks(q.problem.k, q.group)
