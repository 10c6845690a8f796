"""Decode linears for the tuner: one token through FMA units, several through tensor cores; either
way the library is a candidate too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from types import ModuleType

import torch

from ....autotune.prior import Constants, Work
from ....autotune.space import Choice, Config, Constraint, Integer, Space, Value
from ....ir.dims import evaluate
from ....ir.node import Node
from ....targets import Target
from .. import unfused
from ..kernels import linear, linear_epilogue, linear_hands, linear_kernel, linear_tiles
from ..kernels.linear import linear_source
from ..kernels.linear_tiles import (
    GemmTiles,
    GemvTiles,
    Problem,
    default_gemm,
    default_gemv,
    shared_bytes,
)
from ..source import KernelSource
from .beside_library import (
    LIBRARY,
    beside_library,
    is_library,
    library_config,
    library_seconds,
    of_ours,
    separate_calls,
)
from .problem import bases_of, layouts_of, problem_graph
from .template import (
    Calls,
    Contents,
    Facts,
    Sizes,
    Template,
    int_,
    power_range,
    sensible,
    with_default,
)

BUCKETS = (16, 32, 64, 128)
"""Tokens that a tile of the matrix kernel holds: each has a cut of its own."""

_THREADS_PER_SM = 2048


class _Linear(Template):
    """What both kernels have in common."""

    modules: tuple[ModuleType, ...] = (
        *(linear, linear_epilogue, linear_hands, linear_kernel, linear_tiles, unfused),
    )

    def takes(self, node: Node) -> bool:
        """A ``fused`` node of kind "linear" that the kernels compute."""
        return node.op == "fused" and Problem.of(node, layouts_of(node)) is not None

    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """Sizes, the element type, and the ops before and behind the product."""
        p = problem_of(node)
        return (
            ("dtype", str(p.linear.dtype)),
            ("before", "rms_norm" if p.norm is not None else ""),
            ("behind", " ".join([*(["bias"] if p.bias else []), *(m.op for m in p.members)])),
            ("parts", p.parts),
            ("k", p.k),
            ("n", p.n),
            ("tokens", evaluate(p.tokens, sizes)),
        )

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """The cuts of the kernel, and the library."""
        return beside_library(self.cuts(node, sizes, target))

    @abstractmethod
    def cuts(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """The cuts of the kernel."""

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """The default cut."""
        return of_ours(self.default_cut(node, sizes, target).as_dict())

    @abstractmethod
    def default_cut(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """The default among ``cuts``."""

    def pinned(self, node: Node, sizes: Sizes, target: Target) -> Sequence[Config]:
        """The library's."""
        return (library_config(self.space(node, sizes, target)),)

    def calls(self, node: Node, config: Config, target: Target) -> Calls | None:
        """The library's product between generated kernels."""
        return separate_calls(problem_graph(node), target) if is_library(config) else None

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel with this one cut."""
        return None if is_library(config) else self.kernel(problem_of(node), config, target)

    @abstractmethod
    def kernel(self, problem: Problem, config: Config, target: Target) -> KernelSource | None:
        """The kernel of a cut."""

    def prior(self, node: Node, config: Config, sizes: Sizes, target: Target) -> float:
        """Of a cut by its work, of the library by the roofline."""
        if is_library(config):
            return library_seconds(problem_of(node), sizes, target)
        return super().prior(node, config, sizes, target)

    def contents(self, node: Node, sizes: Sizes, generator: torch.Generator, seed: int) -> Contents:
        """Weights such that products are of the size of x."""
        p = problem_of(node)
        weight = bases_of(node)[p.body.inputs.index(p.weight)]
        assert weight is not None

        def scaled(shape: Sequence[int]) -> torch.Tensor:
            value = torch.randn(shape, generator=generator, device=generator.device)
            return value.mul_(p.k**-0.5)

        return {weight: scaled}


class LinearGemv(_Linear):
    """The kernel for one token."""

    name = "linear_gemv"
    constants = Constants(
        latency=7.14e-6,
        dram=0.726,
        l2=3.09,
        sm=28.3e9,
        tail=0.0472,
        program=0.399e-6,
        overlap=19.8,
        step=0.294e-6,
        accumulator=0.0118,
        many_warps=0.292,
        few_warps=0.0677,
    )

    def cuts(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Outputs of a program, columns of a step, warps."""
        p, default = problem_of(node), self.default_cut(node, sizes, target)
        return Space(
            (
                power_range("block_n", 1, 16, int_(default, "block_n")),
                power_range("block_k", 256, 4096, int_(default, "block_k")),
                power_range("num_warps", 1, 16, int_(default, "num_warps")),
            ),
            (
                sensible(default, "no wider than the row", lambda c: int_(c, "block_k") < 2 * p.k),
                sensible(
                    default,
                    "16 bytes a thread in each row at least",
                    lambda c: int_(c, "block_k") * p.linear.dtype.bytes >= 16 * 32,
                ),
                sensible(
                    default,
                    "2 to 32 vectors of 16 bytes a thread",
                    lambda c: 2 <= _vectors(p, c) <= 32,
                ),
            ),
        )

    def default_cut(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """``default_gemv``."""
        return config_of(default_gemv(problem_of(node), target))

    def kernel(self, problem: Problem, config: Config, target: Target) -> KernelSource | None:
        """The kernel for one token alone."""
        return linear_source(problem, target, gemv_of(config), [])

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Weights once; x, which stays in the L2, by every program."""
        p, tiles = problem_of(node), gemv_of(config)
        rows = tiles.block_n * p.parts
        programs = -(-p.n // tiles.block_n)
        size = p.linear.dtype.bytes
        weights = float(p.n * p.parts * p.k * size)
        # Two tiles are on their way, in registers: 256 of them a thread are what there is.
        registers = 2 * rows * tiles.block_k * size // 4 // (32 * tiles.num_warps) + 48
        blocks = min(
            _THREADS_PER_SM // (32 * tiles.num_warps),
            65536 // 32 // tiles.num_warps // max(registers, 1),
        )
        return Work(
            dram_bytes=weights,
            l2_bytes=weights + programs * p.k * size,
            flops=0.0,
            dtype=str(p.linear.dtype.torch).removeprefix("torch."),
            programs=programs,
            blocks_per_sm=max(1, blocks),
            bytes_in_flight=2.0 * rows * min(tiles.block_k, p.k) * size,
            steps=-(-p.k // tiles.block_k),
            stages=3,
        )

    def numerics(self, config: Config) -> str:
        """Threads sum what they hold first: the width of a step and the warps decide."""
        if is_library(config):
            return LIBRARY
        return f"block_k={config['block_k']} num_warps={config['num_warps']}"


class LinearGemm(_Linear):
    """The kernel for several tokens; its cut is that of the bucket that holds them."""

    name = "linear_gemm"
    constants = Constants(
        l2=1.82,
        sm=84.5e9,
        tensor=1.14,
        tail=0.303,
        program=1.04e-6,
        overlap=1.37,
        part=0.347e-6,
        step=0.268e-6,
        accumulator=0.0477,
        many_warps=0.477,
    )

    def cuts(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Tiles, stages, and programs that share the columns of weights."""
        p, default = problem_of(node), self.default_cut(node, sizes, target)
        block_m = bucket(p, sizes)
        rows = [r // p.parts for r in (32, 64, 128)]
        ahead = (0, 512) if block_m <= 32 else (0,)
        stages = int_(default, "num_stages")
        return Space(
            (
                Choice("block_m", (block_m,)),
                with_default("block_n", rows, int_(default, "block_n")),
                power_range("block_k", 64, 256, int_(default, "block_k")),
                power_range("num_warps", 2, 8, int_(default, "num_warps")),
                Integer("num_stages", min(2, stages), max(8, stages)),
                with_default("splits", (1, 2, 4), int_(default, "splits")),
                with_default("ahead", ahead, int_(default, "ahead")),
            ),
            (
                Constraint("columns for every split", lambda c: gemm_of(c).has_work(p.k)),
                Constraint(
                    "what the block's shared memory holds",
                    lambda c: shared_bytes(p, gemm_of(c)) <= target.shared_memory_per_block,
                ),
                *_worth_trying(p, default, block_m, target),
            ),
        )

    def default_cut(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """``default_gemm`` of the bucket."""
        p = problem_of(node)
        tiles = default_gemm(p, target, bucket(p, sizes))
        assert tiles is not None, "what the template takes has a default"
        return config_of(tiles)

    def kernel(self, problem: Problem, config: Config, target: Target) -> KernelSource | None:
        """The kernel with this one cut."""
        return linear_source(problem, target, None, [gemm_of(config)])

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Weights once; x from the L2 by every program; parts of sums there and back."""
        p, tiles = problem_of(node), gemm_of(config)
        size, rows = p.linear.dtype.bytes, tiles.block_n * p.parts
        tokens = evaluate(p.tokens, sizes)
        columns, blocks = -(-p.n // tiles.block_n), -(-tokens // tiles.block_m)
        weights = float(p.n * p.parts * p.k * size)
        x = columns * blocks * tiles.block_m * p.k * size
        parts = 8.0 * tiles.splits * p.n * p.parts * blocks * tiles.block_m
        steps = -(-p.k // tiles.block_k // tiles.splits)
        shared = shared_bytes(p, tiles) + 1024
        resident = min(
            target.shared_memory_per_sm // shared, _THREADS_PER_SM // (32 * tiles.num_warps)
        )
        return Work(
            dram_bytes=weights,
            l2_bytes=weights * blocks + x + (parts if tiles.splits > 1 else 0.0),
            flops=2.0 * p.n * p.parts * p.k * blocks * tiles.block_m,
            dtype=str(p.linear.dtype.torch).removeprefix("torch."),
            programs=columns * blocks * tiles.splits,
            blocks_per_sm=max(1, resident),
            bytes_in_flight=float((tiles.num_stages - 1) * tiles.block_k * rows * size),
            steps=steps,
            stages=tiles.num_stages,
            splits=tiles.splits,
            warps=tiles.num_warps,
            accumulators=rows * tiles.block_m / (32 * tiles.num_warps),
        )

    def numerics(self, config: Config) -> str:
        """Products add up column by column; parts begin where the cut says."""
        if is_library(config):
            return LIBRARY
        if config["splits"] == 1:
            return "splits=1"
        return f"splits={config['splits']} block_k={config['block_k']}"


def problem_of(node: Node) -> Problem:
    """The problem of a call that the templates take."""
    found = Problem.of(node, layouts_of(node))
    assert found is not None, "asked of a call that the template takes"
    return found


def bucket(problem: Problem, sizes: Sizes) -> int:
    """The tokens of a tile for so many tokens."""
    tokens = evaluate(problem.tokens, sizes)
    return next((size for size in BUCKETS if tokens <= size), BUCKETS[-1])


def config_of(tiles: GemvTiles | GemmTiles) -> Config:
    """A cut by its fields."""
    return Config(tuple(asdict(tiles).items()))


def gemv_of(config: Config | Mapping[str, Value]) -> GemvTiles:
    """The cut of a config of `LinearGemv`."""
    return GemvTiles(*(int_(config, field.name) for field in fields(GemvTiles)))


def gemm_of(config: Config | Mapping[str, Value]) -> GemmTiles:
    """The cut of a config of `LinearGemm`."""
    return GemmTiles(*(int_(config, field.name) for field in fields(GemmTiles)))


def _worth_trying(
    p: Problem, default: Config, block_m: int, target: Target
) -> Sequence[Constraint]:
    return (
        sensible(
            default,
            "two steps a program at least",
            lambda c: p.k // int_(c, "block_k") // int_(c, "splits") >= 2,
        ),
        sensible(default, "32 KB on their way at least", lambda c: _in_flight(p, c) >= 32 << 10),
        sensible(
            default,
            "work for every warp",
            lambda c: int_(c, "num_warps") * 256 <= _rows(p, c) * block_m,
        ),
        sensible(
            default,
            "parts only where programs are few",
            lambda c: (
                int_(c, "splits") == 1
                or -(-p.n // int_(c, "block_n")) * int_(c, "splits") <= 4 * target.sms
            ),
        ),
    )


def _vectors(problem: Problem, values: Mapping[str, Value]) -> float:
    """Vectors of 16 bytes that a thread has in a tile."""
    tile = int_(values, "block_n") * problem.parts * int_(values, "block_k")
    return tile * problem.linear.dtype.bytes / 16 / (32 * int_(values, "num_warps"))


def _rows(problem: Problem, values: Mapping[str, Value]) -> int:
    return int_(values, "block_n") * problem.parts


def _in_flight(problem: Problem, values: Mapping[str, Value]) -> int:
    stage = int_(values, "block_k") * (_rows(problem, values) + int_(values, "block_m"))
    return stage * problem.linear.dtype.bytes * int_(values, "num_stages")
