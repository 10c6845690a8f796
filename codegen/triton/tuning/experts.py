"""Experts for the tuner: few tokens a pair at a time, and many in order of their experts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from types import ModuleType

import torch

from ....autotune.prior import Constants, Work, predict
from ....autotune.space import Config, Parameter, Space
from ....ir.dims import Dim, evaluate
from ....ir.node import Node
from ....targets import Target
from ..kernels import (
    experts,
    experts_entries,
    experts_kernel,
    experts_order_kernel,
    experts_tiles,
    linear_kernel,
    wide_experts,
    wide_experts_kernel,
    wide_experts_tiles,
)
from ..kernels.experts import experts_source
from ..kernels.experts_tiles import (
    PRODUCTS,
    GroupTiles,
    Problem,
    Product,
    buckets,
    default_rows,
    most_row_tokens,
    shared_bytes,
)
from ..kernels.wide_experts_tiles import WideTiles, default_tiles, is_flat, resident
from ..source import KernelSource
from .expert_spaces import (
    group_defaults,
    group_space,
    groups_config,
    groups_of,
    parts,
    rows_config,
    rows_of,
    rows_worth_trying,
)
from .problem import bases_of, layouts_of
from .template import Contents, Facts, Sizes, Template, int_, power_range

TOKENS = 4096
"""Those that the tiles for any number of tokens are timed on."""

_THREADS_PER_SM = 2048
# By hand, from a trial of two layers: the L2 gives 7 to 8 TB/s, and between two tiles of a
# multiprocessor are some 4 us.
_WIDE = Constants(
    l2=2.5, tensor=0.84, tail=1.0, program=4.0e-6, many_warps=0.0, few_warps=0.0, accumulator=0.0
)
_GROUP, _OTHER = 16, 1.03


class _Experts(Template):
    """What both kernels have in common. A config names the fields of each product's tiles."""

    modules: tuple[ModuleType, ...] = (
        *(experts, experts_entries, experts_kernel, experts_order_kernel, experts_tiles),
        *(linear_kernel, wide_experts, wide_experts_kernel, wide_experts_tiles),
    )

    def takes(self, node: Node) -> bool:
        """A ``moe_experts`` that the kernels compute."""
        return node.op == "moe_experts" and Problem.of(node, layouts_of(node)) is not None

    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """Sizes, the element type, how weights lie, and what stands between the products."""
        p = problem_of(node)
        words = ["gpt_oss" if p.number("alpha") is not None else str(node.attr("activation"))]
        words += [
            name for index, name in ((5, "gate_up_bias"), (6, "down_bias")) if node.args[index]
        ]
        return (
            ("dtype", str(p.dtype)),
            ("with", " ".join([*words, *(["interleaved"] if p.interleaved else [])])),
            ("rows", "dense" if p.in_rows else "strided"),
            ("experts", p.experts),
            ("slots", p.slots),
            ("k", p.width),
            ("f", p.inner),
            ("tokens", evaluate(p.tokens, sizes)),
        )

    def prior(self, node: Node, config: Config, sizes: Sizes, target: Target) -> float:
        """Of one product and the other."""
        works = (self.product_work(node, product, config, sizes, target) for product in PRODUCTS)
        return sum(predict(work, target, self.constants) for work in works)

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Both products, as if ``down`` were cut as ``gate_up`` is."""
        first, second = (
            self.product_work(node, product, config, sizes, target) for product in PRODUCTS
        )
        return Work(
            **{
                **{field.name: getattr(first, field.name) for field in fields(Work)},
                "dram_bytes": first.dram_bytes + second.dram_bytes,
                "l2_bytes": first.l2_bytes + second.l2_bytes,
                "flops": first.flops + second.flops,
            }
        )

    @abstractmethod
    def product_work(
        self, node: Node, product: Product, config: Config, sizes: Sizes, target: Target
    ) -> Work:
        """What one product does."""

    def contents(self, node: Node, sizes: Sizes, generator: torch.Generator, seed: int) -> Contents:
        """Tokens that choose experts at random, with weights that add up to one; weights such that
        products are of the size of x.
        """
        p, device = problem_of(node), generator.device

        def chosen(shape: Sequence[int]) -> torch.Tensor:
            router = torch.rand(shape[0], p.experts, generator=generator, device=device)
            return router.topk(p.slots).indices

        def weighing(shape: Sequence[int]) -> torch.Tensor:
            return torch.rand(shape, generator=generator, device=device).add_(0.1).div_(p.slots)

        def scaled(length: int) -> Callable[[Sequence[int]], torch.Tensor]:
            def made(shape: Sequence[int]) -> torch.Tensor:
                value = torch.randn(shape, generator=generator, device=device)
                return value.mul_(length**-0.5)

            return made

        bases = dict(zip(("ids", "weights", "gate_up", "down"), _buffers(node), strict=True))
        return {
            bases["ids"]: chosen,
            bases["weights"]: weighing,
            bases["gate_up"]: scaled(p.width),
            bases["down"]: scaled(p.inner),
        }


class ExpertRows(_Experts):
    """The kernel for few tokens, timed at the most that it is for."""

    name = "expert_rows"

    def serves(self, node: Node, target: Target) -> bool:
        """Also weights lie in dense rows."""
        return self.takes(node) and problem_of(node).in_rows

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Outputs of a program, columns of a step, warps, of each product."""
        p, default = problem_of(node), self.default(node, sizes, target)
        parameters: list[Parameter] = []
        constraints = []
        for product in PRODUCTS:
            n, k, w = (f"{product}_{name}" for name in ("block_n", "block_k", "num_warps"))
            parameters += [
                power_range(n, 1, 4, int_(default, n)),
                power_range(k, 256, 2048, int_(default, k)),
                power_range(w, 1, 8, int_(default, w)),
            ]
            constraints += list(rows_worth_trying(p, product, default))
        return Space(tuple(parameters), tuple(constraints))

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """``default_rows`` of both products."""
        p = problem_of(node)
        return rows_config((default_rows(p, "gate_up"), default_rows(p, "down")))

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel for few tokens alone."""
        return experts_source(problem_of(node), target, rows_of(config), ())

    def product_work(
        self, node: Node, product: Product, config: Config, sizes: Sizes, target: Target
    ) -> Work:
        """The weights of each pair's expert once."""
        p, tiles = problem_of(node), rows_of(config)[PRODUCTS.index(product)]
        outputs, length = p.sizes(product)
        pairs = evaluate(p.tokens, sizes) * p.slots
        size, rows = p.dtype.bytes, tiles.block_n * parts(product)
        weights = float(pairs * outputs * parts(product) * length * size)
        programs = -(-outputs // tiles.block_n) * (pairs if product == "gate_up" else 1)
        slots = 1 if product == "gate_up" else p.slots
        registers = 2 * rows * tiles.block_k * size // 4 // (32 * tiles.num_warps) + 48
        blocks = min(
            _THREADS_PER_SM // (32 * tiles.num_warps),
            65536 // 32 // tiles.num_warps // max(registers, 1),
        )
        return Work(
            dram_bytes=weights,
            l2_bytes=weights + programs * slots * length * size,
            flops=0.0,
            dtype=str(p.dtype.torch).removeprefix("torch."),
            programs=programs,
            blocks_per_sm=max(1, blocks),
            bytes_in_flight=2.0 * rows * min(tiles.block_k, length) * size,
            steps=-(-length // tiles.block_k) * slots,
            stages=3,
        )

    def numerics(self, config: Config) -> str:
        """Threads sum what they hold first: the width of a step and the warps decide."""
        values = config.as_dict().items()
        return " ".join(f"{name}={value}" for name, value in values if "block_n" not in name)


class ExpertGroups(_Experts):
    """The kernel for many tokens; its cut is that of the bucket that holds them."""

    name = "expert_groups"
    constants = Constants(dram=0.85, tensor=0.85, program=5.0e-6, many_warps=0.0)  # by hand

    def serves(self, node: Node, target: Target) -> bool:
        """Also tiles fit the target."""
        return self.takes(node) and default_tiles(problem_of(node), target, BLOCK) is not None

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Which of the two forms; tiles, warps and stages of each product."""
        p = problem_of(node)
        return group_space(p, self.default(node, sizes, target), bucket(p, sizes), target)

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """``default_tiles`` of the bucket."""
        p = problem_of(node)
        tiles = default_tiles(p, target, bucket(p, sizes))
        assert tiles is not None, "what the template takes has a default"
        return groups_config(tiles)

    def pinned(self, node: Node, sizes: Sizes, target: Target) -> Sequence[Config]:
        """The defaults of both forms."""
        return group_defaults(problem_of(node), bucket(problem_of(node), sizes), target)

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel with this one cut."""
        p = problem_of(node)
        most = evaluate(p.tokens, sizes)
        return experts_source(p, target, None, [(groups_of(config), None)], most)

    def prior(self, node: Node, config: Config, sizes: Sizes, target: Target) -> float:
        """Of one product and the other; by descriptors, also of rows that are put in order."""
        if not config["wide"]:
            return super().prior(node, config, sizes, target)
        p = problem_of(node)
        copied = 2 * evaluate(p.pairs, sizes) * p.width * p.dtype.bytes
        seconds = copied / (target.dram_gb_per_s * 1e9 * _WIDE.dram)
        for product in PRODUCTS:
            work = self.product_work(node, product, config, sizes, target)
            as_wanted = bool(config[f"{product}_flat"]) is is_flat(p.sizes(product)[1])
            seconds += predict(work, target, _WIDE) * (1.0 if as_wanted else _OTHER)
        return seconds * (1.0 if config["group"] == _GROUP else _OTHER)

    def product_work(
        self, node: Node, product: Product, config: Config, sizes: Sizes, target: Target
    ) -> Work:
        """The weights of each expert that is chosen once; rows of x by every block of columns."""
        p, tiles = problem_of(node), groups_of(config)[PRODUCTS.index(product)]
        outputs, length = p.sizes(product)
        tokens = evaluate(p.tokens, sizes)
        used = p.experts * (1 - (1 - p.slots / p.experts) ** tokens)
        each = tokens * p.slots / used
        # Where an expert has several tiles, half of the last one is rest on average.
        count = math.ceil(used * max(1.0, each / tiles.block_m + 0.5))
        blocks, rows = -(-outputs // tiles.block_n), tiles.block_n * parts(product)
        size, programs, splits = p.dtype.bytes, count * blocks, 1
        resident = _resident(p, product, tiles, target)
        if product == "down" and isinstance(tiles, WideTiles) and tiles.shared:
            at_once = target.sms * resident
            programs, splits = -(-programs // at_once) * at_once, 2  # they fill their rounds
        expert = outputs * parts(product) * length * size
        moved = count * blocks * (rows + tiles.block_m) * length * size
        return Work(
            dram_bytes=float(used * expert),
            l2_bytes=float(moved),
            flops=2.0 * count * blocks * rows * tiles.block_m * length,
            dtype=str(p.dtype.torch).removeprefix("torch."),
            programs=programs,
            blocks_per_sm=resident,
            bytes_in_flight=float((tiles.num_stages - 1) * tiles.block_k * rows * size),
            steps=-(-length // tiles.block_k),
            stages=tiles.num_stages,
            splits=splits,
            warps=tiles.num_warps,
            accumulators=rows * tiles.block_m / (32 * tiles.num_warps),
        )

    def numerics(self, config: Config) -> str:
        """Products add up column by column, whatever the tiles; parts begin where these say."""
        if not config["down_shared"]:
            return "one order"
        names = ("block_m", "down_block_n", "down_block_k")
        return " ".join(f"{name}={config[name]}" for name in names)


BLOCK = 16
"""Pairs of the smallest tile: where it does not fit, none does."""


def _resident(problem: Problem, product: Product, tiles: GroupTiles, target: Target) -> int:
    """Programs of a product that a multiprocessor holds at once."""
    if isinstance(tiles, WideTiles):
        return resident(problem, product, tiles, target)
    shared = shared_bytes(problem, product, tiles) + 1024
    threads = 32 * tiles.num_warps
    return max(1, min(target.shared_memory_per_sm // shared, _THREADS_PER_SM // threads))


def row_sizes(node: Node) -> Sizes:
    """The symbols' values for the most tokens that ``ExpertRows`` is for."""
    return _sizes(node, most_row_tokens(problem_of(node)))


def group_sizes(node: Node, most: int | None) -> Iterator[tuple[int, Sizes]]:
    """(pairs of a tile, the symbols' values) of each bucket, for ``most`` tokens a step at most."""
    p, floor = problem_of(node), 0
    for block_m, limit in buckets(p, most):
        ends = TOKENS if most is None else max(most, floor + 1)
        yield block_m, _sizes(node, ends if limit is None else limit)
        floor = limit or floor


def bucket(problem: Problem, sizes: Sizes) -> int:
    """The pairs of a tile for so many tokens."""
    tokens = evaluate(problem.tokens, sizes)
    every = buckets(problem, None)
    return next(block_m for block_m, limit in every if limit is None or tokens <= limit)


def problem_of(node: Node) -> Problem:
    """The problem of a call that the templates take."""
    found = Problem.of(node, layouts_of(node))
    assert found is not None, "asked of a call that the template takes"
    return found


def _sizes(node: Node, tokens: int) -> Sizes:
    symbol = problem_of(node).tokens
    return {str(symbol): tokens} if isinstance(symbol, Dim) else {}


def _buffers(node: Node) -> list[Node]:
    found = [base for base in bases_of(node)[1:5] if base is not None]
    assert len(found) == 4, "operands that every call has"
    return found
