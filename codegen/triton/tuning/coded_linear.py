"""Decode products over codes for the tuner: of rows of numbers (kernels/quant_linear.py), and of
rows that are rounded to codes too (kernels/scaled_linear.py, and kernels/packed_linear.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ....autotune.prior import Work
from ....autotune.space import Choice, Config, Constraint, Integer, Space, Value
from ....ir.dims import evaluate
from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..kernels import (
    linear,
    linear_epilogue,
    linear_kernel,
    linear_tiles,
    packed_linear,
    packed_linear_kernel,
    packed_linear_tiles,
    quant_linear,
    quant_linear_kernel,
    quant_linear_tiles,
    scaled_linear,
    scaled_linear_kernel,
    scaled_linear_tiles,
)
from ..kernels.linear_tiles import Cutting, GemmTiles, GemvTiles, Problem
from ..kernels.packed_linear import packed_linear_source
from ..kernels.packed_linear_tiles import (
    Packed,
    default_packed_gemms,
    default_packed_gemv,
    packed_shared_bytes,
)
from ..kernels.quant_linear import quant_linear_source
from ..kernels.quant_linear_tiles import (
    Quantized,
    default_quant_gemms,
    default_quant_gemv,
    quant_shared_bytes,
)
from ..kernels.scaled_linear import scaled_linear_source
from ..kernels.scaled_linear_tiles import (
    Scaled,
    default_scaled_gemms,
    default_scaled_gemv,
    scaled_shared_bytes,
)
from ..source import KernelSource
from .linear import LinearGemm, LinearGemv, bucket, config_of, gemm_of, gemv_of
from .problem import bases_of, layouts_of
from .template import (
    Contents,
    Facts,
    Sizes,
    Template,
    int_,
    power_range,
    sensible,
    with_default,
)

_THREADS_PER_SM = 2048
# A normal number in a group of 128 is off by 0.6% of their deviation, and so are sums of products,
# of which the largest error and the largest magnitude are as many deviations; 16 bits are 0.4%.
_ROUNDING = 3e-2
_USUAL = {DType.U8: 4.6, DType.I8: 73.0, DType.F8E4M3: 60.0}  # the magnitude of random codes


@dataclass(frozen=True, slots=True)
class Coded:
    """A product over codes that the kernels take.

    Attributes:
        quantized: as if x were numbers.
        scaled: where the graph rounds x too, else None.
        packed: where the weight lets the kernel round x, else None.
    """

    quantized: Quantized
    scaled: Scaled | None = None
    packed: Packed | None = None

    @classmethod
    def of(cls, node: Node) -> Coded | None:
        """The product of a node; None for others."""
        if node.op != "fused":
            return None
        layouts = layouts_of(node)
        if (scaled := Scaled.of(node, layouts)) is not None:
            return cls(scaled.quantized, scaled=scaled)
        if (packed := Packed.of(node, layouts)) is not None:
            return cls(packed.quantized, packed=packed)
        quantized = Quantized.of(node, layouts)
        return None if quantized is None else cls(quantized)

    @property
    def problem(self) -> Problem:
        """As the plain kernels see it."""
        return self.quantized.problem

    def code_bytes(self, columns: int) -> float:
        """Of so many columns of a row of codes."""
        return columns / self.quantized.per_byte

    @property
    def rounded(self) -> DType | None:
        """What several tokens of x are rounded to; None where they stay numbers."""
        if self.packed is not None and self.packed.by_matrix:
            return DType.I8
        return None if self.scaled is None else self.scaled.codes

    @property
    def widest(self) -> int:
        """Columns of a step of several tokens at most."""
        if self.packed is not None and self.packed.by_matrix:
            return self.packed.group
        return 512 if self.scaled is None or not self.quantized.group else 128

    def shared_bytes(self, tiles: GemmTiles) -> int:
        """Shared memory of a block."""
        if self.scaled is not None:
            return scaled_shared_bytes(self.scaled, tiles)
        if self.packed is not None and self.packed.by_matrix:
            return packed_shared_bytes(self.packed, tiles)
        return quant_shared_bytes(self.quantized, tiles)

    def default_gemv(self, target: Target) -> GemvTiles:
        """The default cut for one token."""
        if self.scaled is not None:
            return default_scaled_gemv(self.scaled, target)
        if self.packed is not None:
            return default_packed_gemv(self.packed, target)
        return default_quant_gemv(self.quantized, target)

    def default_gemms(self, target: Target, block_m: int) -> list[GemmTiles] | None:
        """The default cuts for up to ``block_m`` tokens; None where no kernel takes several."""
        cutting = Cutting(block_m)
        if self.scaled is not None:
            return default_scaled_gemms(self.scaled, target, cutting)
        if self.packed is not None:
            return default_packed_gemms(self.packed, target, cutting)
        return default_quant_gemms(self.quantized, target, cutting)

    def source(
        self, target: Target, gemv: GemvTiles | None, gemms: Sequence[GemmTiles]
    ) -> KernelSource | None:
        """The kernel of these cuts."""
        if self.scaled is not None:
            return scaled_linear_source(self.scaled, target, gemv, gemms)
        if self.packed is not None:
            return packed_linear_source(self.packed, target, gemv, gemms)
        return quant_linear_source(self.quantized, target, gemv, gemms)


class _CodedLinear(Template):
    """What the kernels have in common."""

    modules = (
        *(linear, linear_epilogue, linear_kernel, linear_tiles),
        *(quant_linear, quant_linear_kernel, quant_linear_tiles),
        *(scaled_linear, scaled_linear_kernel, scaled_linear_tiles),
        *(packed_linear, packed_linear_kernel, packed_linear_tiles),
    )

    def takes(self, node: Node) -> bool:
        """A ``fused`` node of kind "linear" whose weight is codes."""
        return Coded.of(node) is not None

    def serves(self, node: Node, target: Target) -> bool:
        """Where the target has the codes' type, and a kernel for each op of the body."""
        coded = Coded.of(node)
        if coded is None or not coded.quantized.fits(target):
            return False
        return coded.default_gemms(target, 16) is not None

    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """Sizes, types of numbers and codes, and the ops before and behind the product."""
        coded = coded_of(node)
        p, q = coded.problem, coded.quantized
        rounds = "" if coded.scaled is None else "rows" if coded.scaled.static is None else "static"
        return (
            ("dtype", str(p.linear.dtype)),
            ("codes", str(q.codes.dtype)),
            ("scale", str(q.scale.dtype)),
            ("zero", "" if q.zero is None else str(q.zero.dtype)),
            ("rows", q.rows),
            ("group", q.group),
            ("rounds", rounds),
            ("compute", "" if coded.packed is None else str(DType.I8)),
            ("before", "rms_norm" if p.norm is not None else ""),
            ("behind", " ".join([*(["bias"] if p.bias else []), *(m.op for m in p.members)])),
            ("parts", p.parts),
            ("k", p.k),
            ("n", p.n),
            ("tokens", evaluate(p.tokens, sizes)),
        )

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel with this one cut."""
        return self.kernel(coded_of(node), config, target)

    def rounding(self, node: Node) -> float:
        """Of x, where the weight lets the kernel round it to int8."""
        return 0.0 if coded_of(node).packed is None else _ROUNDING

    @abstractmethod
    def kernel(self, coded: Coded, config: Config, target: Target) -> KernelSource | None:
        """The kernel of a cut."""

    def contents(self, node: Node, sizes: Sizes, generator: torch.Generator, seed: int) -> Contents:
        """Codes of all values, and scales such that products are of the size of x."""
        q = coded_of(node).quantized
        inputs, bases = q.problem.body.inputs, bases_of(node)
        device = generator.device

        def base(part: Node) -> Node:
            found = bases[inputs.index(part)]
            assert found is not None
            return found

        def codes(shape: Sequence[int]) -> torch.Tensor:
            if q.codes.dtype is DType.F8E4M3:
                drawn = torch.randn(shape, generator=generator, device=device)
                return drawn.mul_(_USUAL[DType.F8E4M3])
            low, high = (0, 256) if q.codes.dtype is DType.U8 else (-127, 128)
            return torch.randint(low, high, shape, generator=generator, device=device)

        def scales(shape: Sequence[int]) -> torch.Tensor:
            usual = q.problem.k**-0.5 / _USUAL[q.codes.dtype]
            return torch.rand(shape, generator=generator, device=device).add_(0.5).mul_(usual)

        def zeros(shape: Sequence[int]) -> torch.Tensor:
            return torch.randint(0, 16, shape, generator=generator, device=device)

        made = {base(q.codes): codes, base(q.scale): scales}
        return made if q.zero is None else {**made, base(q.zero): zeros}


class QuantGemv(_CodedLinear):
    """The kernel for one token."""

    name = "quant_linear_gemv"
    constants = LinearGemv.constants

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Outputs of a program, columns of a step, warps."""
        coded, default = coded_of(node), self.default(node, sizes, target)
        p = coded.problem

        def bytes_of_a_thread(values: Mapping[str, Value]) -> float:
            tile = int_(values, "block_n") * p.parts * coded.code_bytes(int_(values, "block_k"))
            return tile / (32 * int_(values, "num_warps"))

        return Space(
            (
                power_range("block_n", 1, 16, int_(default, "block_n")),
                power_range("block_k", 512, 8192, int_(default, "block_k")),
                power_range("num_warps", 1, 8, int_(default, "num_warps")),
            ),
            (
                sensible(default, "no wider than the row", lambda c: int_(c, "block_k") < 2 * p.k),
                sensible(
                    default,
                    "16 bytes a thread in each row at least",
                    lambda c: coded.code_bytes(int_(c, "block_k")) >= 16 * 32,
                ),
                sensible(
                    default, "16 to 128 bytes a thread", lambda c: 16 <= bytes_of_a_thread(c) <= 128
                ),
            ),
        )

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """The kernel's own."""
        return config_of(coded_of(node).default_gemv(target))

    def kernel(self, coded: Coded, config: Config, target: Target) -> KernelSource | None:
        """The kernel for one token alone."""
        return coded.source(target, gemv_of(config), [])

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Codes once; x, which stays in the L2, by every program."""
        coded, tiles = coded_of(node), gemv_of(config)
        p = coded.problem
        rows, programs = tiles.block_n * p.parts, -(-p.n // tiles.block_n)
        weights = _weight_bytes(coded)
        flying = 2.0 * rows * coded.code_bytes(min(tiles.block_k, p.k))
        registers = int(flying) // 4 // (32 * tiles.num_warps) + 64
        blocks = min(
            _THREADS_PER_SM // (32 * tiles.num_warps), 65536 // 32 // tiles.num_warps // registers
        )
        return Work(
            dram_bytes=weights,
            l2_bytes=weights + programs * p.k * p.linear.dtype.bytes,
            flops=0.0,
            dtype=str(p.linear.dtype.torch).removeprefix("torch."),
            programs=programs,
            blocks_per_sm=max(1, blocks),
            bytes_in_flight=flying,
            steps=-(-p.k // tiles.block_k),
            stages=3,
        )

    def numerics(self, config: Config) -> str:
        """Threads sum what they hold first: the width of a step and the warps decide."""
        return f"block_k={config['block_k']} num_warps={config['num_warps']}"


class QuantGemm(_CodedLinear):
    """The kernel for several tokens; its cut is that of the bucket that holds them."""

    name = "quant_linear_gemm"
    constants = LinearGemm.constants

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Tiles, stages, and programs that share the columns of codes."""
        coded, default = coded_of(node), self.default(node, sizes, target)
        p, block_m = coded.problem, bucket(coded.problem, sizes)
        stages = int_(default, "num_stages")

        def in_flight(values: Mapping[str, Value]) -> float:
            rows = int_(values, "block_n") * p.parts
            return rows * coded.code_bytes(int_(values, "block_k")) * int_(values, "num_stages")

        return Space(
            (
                Choice("block_m", (block_m,)),
                with_default(
                    "block_n", [r // p.parts for r in (32, 64, 128)], int_(default, "block_n")
                ),
                power_range("block_k", 64, coded.widest, int_(default, "block_k")),
                power_range("num_warps", 4, 8, int_(default, "num_warps")),
                Integer("num_stages", min(2, stages), max(6, stages)),
                with_default("splits", (1, 2, 4, 8), int_(default, "splits")),
                with_default("ahead", (0, 1024), int_(default, "ahead")),
            ),
            (
                Constraint("columns for every split", lambda c: gemm_of(c).has_work(p.k)),
                Constraint(
                    "what the block's shared memory holds",
                    lambda c: coded.shared_bytes(gemm_of(c)) <= target.shared_memory_per_block,
                ),
                sensible(
                    default,
                    "two steps a program at least",
                    lambda c: p.k // int_(c, "block_k") // int_(c, "splits") >= 2,
                ),
                sensible(default, "8 KB of codes on their way", lambda c: in_flight(c) >= 8 << 10),
                sensible(
                    default,
                    "parts only where programs are few",
                    lambda c: (
                        int_(c, "splits") == 1
                        or -(-p.n // int_(c, "block_n")) * int_(c, "splits") <= 6 * target.sms
                    ),
                ),
            ),
        )

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """That of the bucket."""
        coded = coded_of(node)
        found = coded.default_gemms(target, bucket(coded.problem, sizes))
        assert found is not None, "what the template serves has a default"
        return config_of(found[-1])

    def kernel(self, coded: Coded, config: Config, target: Target) -> KernelSource | None:
        """The kernel with this one cut."""
        return coded.source(target, None, [gemm_of(config)])

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Codes once; x from the L2 by every program; parts of sums there and back."""
        coded, tiles = coded_of(node), gemm_of(config)
        p, tokens = coded.problem, evaluate(coded.problem.tokens, sizes)
        rows = tiles.block_n * p.parts
        columns, blocks = -(-p.n // tiles.block_n), -(-tokens // tiles.block_m)
        weights, dtype = _weight_bytes(coded), coded.rounded or p.linear.dtype
        x = columns * blocks * tiles.block_m * p.k * dtype.bytes
        parts = 8.0 * tiles.splits * p.n * p.parts * blocks * tiles.block_m
        resident = min(
            target.shared_memory_per_sm // (coded.shared_bytes(tiles) + 1024),
            _THREADS_PER_SM // (32 * tiles.num_warps),
        )
        return Work(
            dram_bytes=weights,
            l2_bytes=weights * blocks + x + (parts if tiles.splits > 1 else 0.0),
            flops=2.0 * p.n * p.parts * p.k * blocks * tiles.block_m,
            dtype=str(dtype.torch).removeprefix("torch."),
            programs=columns * blocks * tiles.splits,
            blocks_per_sm=max(1, resident),
            bytes_in_flight=(tiles.num_stages - 1) * rows * coded.code_bytes(tiles.block_k),
            steps=-(-p.k // tiles.block_k // tiles.splits),
            stages=tiles.num_stages,
            splits=tiles.splits,
            warps=tiles.num_warps,
            accumulators=rows * tiles.block_m / (32 * tiles.num_warps),
        )

    def numerics(self, config: Config) -> str:
        """Products add up column by column; parts begin where the cut says."""
        if config["splits"] == 1:
            return "splits=1"
        return f"splits={config['splits']} block_k={config['block_k']}"


def coded_of(node: Node) -> Coded:
    """The product of a call that the templates take."""
    found = Coded.of(node)
    assert found is not None, "asked of a call that the template takes"
    return found


def _weight_bytes(coded: Coded) -> float:
    q = coded.quantized
    return float(sum(evaluate(part.type.nbytes, {}) for part in q.parts))
