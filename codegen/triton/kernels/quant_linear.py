"""Decode products whose weights are codes: ``linear(x, dequantize(codes, scale, zero?))``.

They are the plain kernels (linear.py) with another way to their sums: codes are read as they are
stored, and decoded in registers. The norm before the product and the ops behind it are the same.

Sums are float32. Codes are exact numbers, and a scale joins the sum of those that it is for:
nothing is rounded on the way. Where a step of several tokens has groups of several scales, the
weight is rounded to the type that ``dequantize`` declares, for that is what tensor cores take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..generate_text import helper_text, kernel_text
from ..layout import Layout
from ..source import HEADER, Argument, KernelSource, Launch, Variant, has_pdl, jit_text
from . import linear_kernel, quant_linear_kernel
from .linear import _CONSTANTS, _Entries, _Rows
from .linear_hands import Hands
from .linear_tiles import ANY, Cutting, GemmTiles, GemvTiles, are_taken
from .quant_linear_tiles import (
    Quantized,
    cut_gemv,
    default_quant_gemms,
    invariant_quant_gemm,
)

_SHARED = ("_inputs", "_prefetch", "_gathered", "_normalise")
_OWN = (
    *("_coded", "_shared_rows", "_of_spans", "_nibbles", "_raised", "_span_sums", "_excess"),
    *("_one_token_of_codes", "_halves", "_of_tile", "_scaled_tile", "_scaled_halves"),
    *("_of_small_groups", "_tokens_of_codes"),
)
_ALONE = Hands()


def emit_quant_linear(
    node: Node, layouts: tuple[Layout | None, ...], target: Target, cutting: Cutting = ANY
) -> KernelSource | None:
    """A kernel for a ``fused`` node of kind "linear" whose weight it dequantizes, for as many
    tokens as ``cutting`` says.

    None for other nodes, where an operand has no rows with a static stride, where a body holds an
    op that kernels lack, and for codes that the target has no type for.
    """
    quantized = Quantized.of(node, layouts)
    gemms = None if quantized is None else default_quant_gemms(quantized, target, cutting)
    if quantized is None or gemms is None:
        return None
    return quant_linear_source(quantized, target, cut_gemv(node, quantized, target, cutting), gemms)


def emit_invariant_quant_linear(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """As ``emit_quant_linear``, with one cut for any number of tokens: a token's sums come in one
    order, whatever it is computed with.
    """
    quantized = Quantized.of(node, layouts)
    tiles = None if quantized is None else invariant_quant_gemm(quantized, target)
    if quantized is None or tiles is None:
        return None
    return quant_linear_source(quantized, target, None, [tiles])


def quant_linear_source(
    quantized: Quantized, target: Target, gemv: GemvTiles | None, gemms: Sequence[GemmTiles]
) -> KernelSource | None:
    """The kernel of a problem with these tiles, which are taken as by ``linear_source``.

    None where the body holds an op that kernels lack, a split would have no columns, or the target
    no type for the codes.
    """
    problem = quantized.problem
    if not quantized.fits(target) or not are_taken(problem, gemms):
        return None
    entries = _QuantEntries(problem, has_pdl(target), quantized=quantized)
    variants = []
    if gemv is not None:
        guard = (1 - problem.tokens,) if gemms else ()
        variants.append(Variant((entries.one_token(gemv),), guard=guard))
    for index, tiles in enumerate(gemms):
        guard = () if index == len(gemms) - 1 else (tiles.block_m - problem.tokens,)
        variants.append(replace(entries.tokens(tiles, _ALONE), guard=guard))
    text = HEADER + helper_text(entries.lines)
    text += jit_text(linear_kernel, _SHARED) + jit_text(quant_linear_kernel, _OWN)
    text += "".join(entries.texts.values())
    # Half of the instructions of a sum. Narrow types are rounded in so many words all the same.
    contracts = problem.linear.dtype is not DType.F32
    return KernelSource(problem.body.name, "template", text, tuple(variants), contracts)


@dataclass
class _QuantEntries(_Entries):
    """The entry points over codes, scales and zero points in the place of the weight."""

    quantized: Quantized | None = None

    def one_token(self, tiles: GemvTiles) -> Launch:
        """The launch for one token."""
        p, weight = self.problem, self._norm_weight()
        norm = "None" if weight is None else self._pointer(weight)
        product = (
            f"acc = _one_token_of_codes({self._x_start()}, {norm}, "
            f"{self._codes('weight_rows')}, {p.norm is not None}, {p.eps!r}, BLOCK_K, PDL)"
        )
        arguments = self._arguments(p.body.inputs)
        self._enter(p.body.name, arguments, [product, *self.lines])
        constants = self._constants(1, tiles.block_n, tiles.block_k, 1, 0)
        grid = (-(-p.n // tiles.block_n), 1, 1)
        return Launch(p.body.name, arguments, grid, constants, tiles.num_warps)

    def _product(self, x: _Rows, hands: Hands, parts: bool) -> list[str]:
        rows, _ = x.text
        tokens = "weight_rows, tl.minimum(tl.reshape(token, (BLOCK_M,)), tokens - 1)"
        product = (
            f"acc = _tokens_of_codes({rows}, {self._codes(tokens)}, BLOCK_K, SPLITS, AHEAD, PDL)"
        )
        if not parts:
            return [product, *self.lines]
        gathered = "acc, last = _gathered(acc, partial_ptr, counter_ptr, SPLITS)"
        return [product, gathered, "if last:", *(f"    {line}" for line in self.lines)]

    def _codes(self, rows: str) -> str:
        """The arguments of a product from the codes to SHARED, ``rows`` among them."""
        q = self.quantized
        assert q is not None
        zero = "None" if q.zero is None else self._pointer(q.zero)
        sizes = f"{q.problem.k}, {q.width}, {q.rows}, {q.group}, {q.shared}"
        return f"{self._pointer(q.codes)}, {self._pointer(q.scale)}, {zero}, {rows}, {sizes}"

    def _arguments(
        self, inputs: Sequence[Node], more: Sequence[Argument] | None = None
    ) -> tuple[Argument, ...]:
        q, weight = self.quantized, self.problem.weight
        assert q is not None
        own = [node for node in inputs if node is not weight]
        return super()._arguments([*own, *(q.parts if weight in inputs else ())], more)

    def _enter(self, name: str, arguments: Sequence[Argument], lines: Sequence[str]) -> None:
        q = self.quantized
        assert q is not None
        if name not in self.texts:
            names = [argument.name for argument in arguments]
            about = str(q.node.attr("body"))  # as the graph has it, without the weight
            lines = [*self._preamble(), *lines]
            self.texts[name] = kernel_text(name, about, names, lines, _CONSTANTS)
