"""Products of many tokens for the tuner: the persistent kernel at each of its numbers of tokens,
the library beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields

from ....autotune.prior import Constants, Work
from ....autotune.space import Boolean, Choice, Config, Constraint, Parameter, Space, Value
from ....ir.dims import evaluate
from ....ir.node import Node
from ....targets import Target
from .. import unfused
from ..kernels import (
    linear,
    linear_epilogue,
    linear_kernel,
    linear_tiles,
    wide_linear,
    wide_linear_kernel,
    wide_linear_tiles,
)
from ..kernels.linear_tiles import Problem
from ..kernels.wide_linear import wide_source
from ..kernels.wide_linear_tiles import SPACE, WideTiles, default_wide, takes_tiles, takes_wide
from ..source import KernelSource
from ..wide import default_tiles
from .beside_library import LIBRARY, is_library, library_config, of_ours
from .linear import _Linear, problem_of
from .template import Facts, Sizes, sensible

_STEPS = 2  # of a program's share of tiles that are shared, at least
_WAIT = 1e-6  # seconds between two tiles of a program, where none begins while one is stored
_GROUP, _OTHER_GROUP = 8, 1.03
_ROUNDS = 4  # of tiles, from which a last one that is not full costs less than parts do


class WideLinear(_Linear):
    """The kernel for many tokens; its cut is that of the numbers of tokens from one bucket on."""

    name = "wide_linear"
    modules = (
        *(wide_linear, wide_linear_kernel, wide_linear_tiles),
        *(linear, linear_epilogue, linear_kernel, linear_tiles, unfused),
    )
    # By hand, from a trial of twelve products (benchmarks/NOTES.md): tensor cores decide, and
    # whether tiles fill rounds; what 8 warps cost is in the share of the peak.
    constants = Constants(
        l2=3.0, tensor=0.84, tail=1.0, program=1.5e-6, parts=2.5e-6, part=0.7e-6, many_warps=0.0,
        few_warps=0.0, accumulator=0.0,
    )  # fmt: skip

    def serves(self, node: Node, target: Target) -> bool:
        """Also the target has the descriptors, and rows lie as these want them."""
        return self.takes(node) and takes_wide(problem_of(node), target)

    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """As for few tokens, but that they are the fewest: no decode step is of these problems."""
        facts = super().facts(node, sizes)
        return tuple(("from_tokens" if n == "tokens" else n, value) for n, value in facts)

    def cuts(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Tiles, warps and stages; strips; how tiles are handed out."""
        p, default = problem_of(node), self.default_cut(node, sizes, target)
        tokens = evaluate(p.tokens, sizes)
        return Space(
            tuple(_parameter(name, values) for name, values in SPACE.items()),
            (
                Constraint(
                    "what a block's shared memory and registers hold",
                    lambda c: takes_tiles(p, tiles_of(c), target),
                ),
                sensible(default, "64 sums a thread at least", lambda c: _sums(p, c) >= 64),
                sensible(
                    default,
                    "steps are shared in few rounds, of which the last is not full",
                    lambda c: not c["shared"] or _is_shared_well(p, c, tokens, target),
                ),
            ),
        )

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """What a Program has untuned: the kernel's default for a gated product, else the
        library's.
        """
        p = problem_of(node)
        tiles = default_tiles(p, target, evaluate(p.tokens, sizes))
        if tiles is None:
            return library_config(self.space(node, sizes, target))
        return of_ours(config_of(tiles).as_dict())

    def default_cut(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """``default_wide``."""
        return config_of(default_wide(problem_of(node)))

    def kernel(self, problem: Problem, config: Config, target: Target) -> KernelSource | None:
        """The kernel of a cut."""
        return wide_source(problem, target, tiles_of(config))

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Operands and result once from memory, tiles of operands from the L2, and what shared
        tiles leave and gather.
        """
        p = problem_of(node)
        cut = default_wide(p) if is_library(config) else tiles_of(config)
        size, tokens, rows = p.linear.dtype.bytes, evaluate(p.tokens, sizes), p.n * p.parts
        tiles, tile_rows = _count(p, cut, tokens), cut.block_n * p.parts
        moved = float(tiles * (cut.block_m + tile_rows) * p.k * size)
        left = 8.0 * target.sms * cut.block_m * tile_rows if cut.shared else 0.0
        return Work(
            dram_bytes=float(size * (rows * p.k + tokens * (p.k + p.n))),
            l2_bytes=moved + left,
            flops=2.0 * tiles * cut.block_m * tile_rows * p.k,
            dtype=str(p.linear.dtype.torch).removeprefix("torch."),
            # Shared, they are as many as fill their rounds.
            programs=-(-tiles // target.sms) * target.sms if cut.shared else tiles,
            blocks_per_sm=1,
            bytes_in_flight=float((cut.num_stages - 1) * cut.block_k * tile_rows * size),
            steps=-(-p.k // cut.block_k),
            stages=cut.num_stages,
            splits=2 if cut.shared else 1,
            warps=cut.num_warps,
        )

    def prior(self, node: Node, config: Config, sizes: Sizes, target: Target) -> float:
        """By its work, and by what decides between cuts of the same work: tiles that begin while
        others are stored, and the groups that a trial had.
        """
        seconds = super().prior(node, config, sizes, target)
        if is_library(config):
            return seconds
        p, cut = problem_of(node), tiles_of(config)
        rounds = -(-_count(p, cut, evaluate(p.tokens, sizes)) // target.sms)
        waits = 0.0 if cut.flat else _WAIT * (rounds - 1)
        return (seconds + waits) * (1.0 if cut.group == _GROUP else _OTHER_GROUP)

    def numerics(self, config: Config) -> str:
        """Products add up step by step; parts begin where tiles and steps say."""
        if is_library(config):
            return LIBRARY
        if not config["shared"]:
            return "whole"
        return " ".join(f"{name}={config[name]}" for name in ("block_m", "block_n", "block_k"))


def config_of(tiles: WideTiles) -> Config:
    """A cut by its fields."""
    return Config(tuple(asdict(tiles).items()))


def tiles_of(config: Config | Mapping[str, Value]) -> WideTiles:
    """The cut of a config of ours."""
    return WideTiles(**{field.name: config[field.name] for field in fields(WideTiles)})  # type: ignore[arg-type]


def _parameter(name: str, values: tuple[int, ...]) -> Parameter:
    return Boolean(name) if values == (False, True) else Choice(name, values)


def _count(problem: Problem, cut: WideTiles, tokens: int) -> int:
    """Tiles of the result."""
    return -(-tokens // cut.block_m) * -(-problem.n // cut.block_n)


def _sums(problem: Problem, values: Mapping[str, Value]) -> float:
    cut = tiles_of(values)
    return cut.block_m * cut.block_n * problem.parts / (32 * cut.num_warps)


def _is_shared_well(
    problem: Problem, values: Mapping[str, Value], tokens: int, target: Target
) -> bool:
    """Whether to share steps may pay: there are few rounds, and some steps for each program. No
    loop of tiles is flat with them, whose pieces have an order that no compiler knows.
    """
    cut = tiles_of(values)
    tiles = _count(problem, cut, tokens)
    some = tiles * problem.k >= _STEPS * cut.block_k * target.sms
    return some and not cut.flat and tiles % target.sms != 0 and tiles < _ROUNDS * target.sms
