"""The numbers that codes of a weight can stand for, and scales that fit what the weight is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats.weights import Held, apply_weight
from ...ir.dtypes import DType
from ...ir.ops.quant import LARGEST
from ...passes.schemes import Parts, QuantConfig, Scheme
from ...passes.schemes.int4 import FINE

SHRINKS = tuple(1 - step / 40 for step in range(21))
"""Shares of a group's range that are tried as its scale: 1 down to 0.5."""
RANK, ROUNDS = 64, 4  # directions that scales are judged by, iterations that find them
STRETCHES = tuple(2 ** (step / 32) for step in range(32))
"""The same for floats: up to the next octave, in which their codes repeat, so that nothing is cut.
A row has one scale, and the inputs of most linears a direction that outweighs all others: in it the
errors of a row can be made to cancel.
"""


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes of a weight [N, K], which stand for ``(code - zero) * scale``.

    Attributes:
        codes: i8, f8e4m3, or u8 for four bits.
        low, high: the least and greatest code.
        middle: the zero point where there are none of groups.
        group: columns that share a scale, 0 for all.
        symmetric: whether there are no zero points.
        fine: whether scales are bfloat16.
    """

    codes: DType
    low: int
    high: int
    middle: int
    group: int
    symmetric: bool
    fine: bool

    @staticmethod
    def of(scheme: Scheme, config: QuantConfig) -> Grid:
        """The grid of a scheme."""
        group = config.group or 0
        if scheme.codes is DType.U8:
            return Grid(DType.U8, 0, 15, 8, group, config.symmetric, 0 < group <= FINE)
        largest = int(LARGEST[scheme.codes])
        return Grid(scheme.codes, -largest, largest, 0, group, True, False)

    def by_group(self, x: torch.Tensor) -> torch.Tensor:
        """[N, K] -> [N, G, group], the last group filled up with zeros."""
        width = self.group or x.shape[1]
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % width))
        return padded.view(x.shape[0], -1, width)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of a group's range, that may be its scale."""
        return STRETCHES if self.codes is DType.F8E4M3 else SHRINKS

    def ranges(self, groups: torch.Tensor, shrink: float = 1.0) -> tuple[torch.Tensor, ...]:
        """Scale and zero point of each group [N, G, 1] for a share of its range."""
        if self.symmetric:
            most = groups.abs().amax(-1, keepdim=True) * shrink
            scale = most * 2 / (self.high - self.low)
            zero = torch.full_like(scale, self.middle)
            return self.stored(scale), zero
        least = groups.amin(-1, keepdim=True).clamp(max=0) * shrink
        most = groups.amax(-1, keepdim=True).clamp(min=0) * shrink
        scale = self.stored((most - least) / (self.high - self.low))
        return scale, (-least / scale).round().clamp(self.low, self.high)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale as the parts hold it; 1 where all is zero."""
        kept = scale.bfloat16().float() if self.fine else scale
        return torch.where(kept == 0, torch.ones_like(kept), kept)

    def encode(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes, as floats."""
        if self.codes is DType.F8E4M3:
            return (x / scale).clamp(self.low, self.high).to(self.codes.torch).float()
        return ((x / scale).round() + zero).clamp(self.low, self.high)

    def rounded(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """What the codes of x stand for."""
        return (self.encode(x, scale, zero) - zero) * scale

    def fit(self, weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points [N, G] that lose the least of each group's own product.

        Args:
            weight: [N, K].
            gram: [K, K], the sum of x xᵀ over inputs x: the loss of a group is d H dᵀ, for the
                group's errors d and its own block H.
        """
        groups = self.by_group(weight)
        width, count = groups.shape[2], groups.shape[1]
        pad = count * width - weight.shape[1]
        whole = torch.nn.functional.pad(gram, (0, pad, 0, pad)).view(count, width, count, width)
        blocks = [_Block.of(whole[i, :, i]) for i in range(count)]
        best = torch.full(groups.shape[:2], float("inf"))
        scale, zero = (x[..., 0] for x in self.ranges(groups))
        for shrink in self.shares:
            tried, point = self.ranges(groups, shrink)
            error = self.rounded(groups, tried, point) - groups
            loss = torch.stack([block.loss(error[:, i]) for i, block in enumerate(blocks)], 1)
            better = loss < best
            best = torch.where(better, loss, best)
            scale = torch.where(better, tried[..., 0], scale)
            zero = torch.where(better, point[..., 0], zero)
        return scale, zero

    def parts(
        self, name: str, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> Parts:
        """Codes [N, K], scales and zero points [N, G] as the parts of a scheme, in memory."""
        kept = scale.bfloat16() if self.fine else scale.contiguous()
        if self.codes is not DType.U8:
            found = {"codes": codes.to(self.codes.torch), "scale": kept}
        else:
            four = Held(codes.to(torch.uint8), name)
            packed = apply_weight("pack_codes", (four,), group=self.group).load()
            found = {"codes": packed, "scale": kept}
            if not self.symmetric:
                found["zero"] = zero.to(torch.uint8)
        return {suffix: Held(tensor, f"{name}.{suffix}") for suffix, tensor in found.items()}

    def columns(self, by_group: torch.Tensor, width: int) -> torch.Tensor:
        """[N, G] -> [N, K]."""
        return by_group.repeat_interleave(self.group or width, 1)[:, :width]


@dataclass(frozen=True, slots=True)
class _Block:
    """A gram [K, K] as ``B Bᵀ + diag(d)``: losses of many weights [N, K] at N K r, not N K²."""

    factor: torch.Tensor
    rest: torch.Tensor

    @staticmethod
    def of(gram: torch.Tensor) -> _Block:
        """B [K, r] of the directions that weigh the most, by subspace iteration from a fixed start
        (Halko et al., 0909.4061), d so that the diagonal is right. A small gram is exact.
        """
        width = len(gram)
        rank = min(RANK, width)
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(width, rank, generator=generator))[0]
        for _ in range(ROUNDS if rank < width else 1):
            basis = torch.linalg.qr(gram @ basis)[0]
        sizes, turned = torch.linalg.eigh(basis.T @ gram @ basis)
        factor = basis @ turned * sizes.clamp(min=0).sqrt()
        return _Block(factor, (gram.diagonal() - factor.square().sum(1)).clamp(min=0))

    def loss(self, error: torch.Tensor) -> torch.Tensor:
        """Of each row [N] of the errors [N, K] of a weight."""
        return (error @ self.factor).square().sum(-1) + error.square() @ self.rest


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    """The mean of x xᵀ over inputs [tokens, K], float32."""
    wide = rows.float()
    return wide.T @ wide / max(len(wide), 1)


def steady_gram(rows: torch.Tensor) -> torch.Tensor:
    """As `gram_of`, as if K more inputs had been met whose columns have nothing in common: of few
    tokens most of what columns seem to share is chance, and codes would fit that.
    """
    gram, (count, width) = gram_of(rows), rows.shape
    share = count / (count + width)
    return gram * share + torch.diag(gram.diagonal()) * (1 - share)


def loss_of(error: torch.Tensor, gram: torch.Tensor) -> float:
    """The mean squared error of a product whose weight [N, K] is wrong by ``error``."""
    return ((error @ gram) * error).sum().item()
