"""Experts for the tuner: few tokens a pair at a time, and many in order of their experts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from types import ModuleType

import torch

from ....autotune.prior import Constants, Work, predict
from ....autotune.space import Choice, Config, Constraint, Integer, Parameter, Space, Value
from ....ir.dims import Dim, evaluate
from ....ir.node import Node
from ....targets import Target
from ..kernels import experts, experts_kernel, experts_tiles, linear_kernel
from ..kernels.experts import experts_source
from ..kernels.experts_tiles import (
    PRODUCTS,
    GroupTiles,
    Problem,
    Product,
    RowTiles,
    buckets,
    default_groups,
    default_rows,
    most_row_tokens,
    shared_bytes,
)
from ..source import KernelSource
from .problem import bases_of, layouts_of
from .template import Contents, Facts, Sizes, Template, int_, power_range, sensible, with_default

TOKENS = 4096
"""Those that the tiles for any number of tokens are timed on."""

_THREADS_PER_SM = 2048
_SUMS = 128  # float32 sums that a thread may hold


class _Experts(Template):
    """What both kernels have in common. A config names the fields of each product's tiles."""

    modules: tuple[ModuleType, ...] = (experts, experts_kernel, experts_tiles, linear_kernel)

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
            constraints += list(_rows_worth_trying(p, product, default))
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
        size, rows = p.dtype.bytes, tiles.block_n * _parts(product)
        weights = float(pairs * outputs * _parts(product) * length * size)
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
    constants = Constants(dram=0.85, tensor=0.8)  # by hand, until a space is measured

    def serves(self, node: Node, target: Target) -> bool:
        """Also tiles fit the target."""
        return self.takes(node) and self._tiles(node, BLOCK, target) is not None

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Tiles, warps and stages of each product; the tiles of pairs are the bucket's."""
        p, default = problem_of(node), self.default(node, sizes, target)
        parameters: list[Parameter] = [Choice("block_m", (default["block_m"],))]
        constraints = []
        for product in PRODUCTS:
            n, k, w, s, g = (
                f"{product}_{name}"
                for name in ("block_n", "block_k", "num_warps", "num_stages", "group")
            )
            stages = int_(default, s)
            parameters += [
                with_default(n, (64, 128), int_(default, n)),
                with_default(k, (64, 128), int_(default, k)),
                power_range(w, 4, 8, int_(default, w)),
                Integer(s, max(2, stages - 1), max(2, stages) + 1),
                Choice(g, (default[g],)),
            ]
            constraints += list(_groups_that_fit(p, product, default, target))
        return Space(tuple(parameters), tuple(constraints))

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """``default_groups`` of the bucket."""
        tiles = self._tiles(node, bucket(problem_of(node), sizes), target)
        assert tiles is not None, "what the template takes has a default"
        return groups_config(tiles)

    def _tiles(
        self, node: Node, block_m: int, target: Target
    ) -> tuple[GroupTiles, GroupTiles] | None:
        first, second = (
            default_groups(problem_of(node), product, target, block_m) for product in PRODUCTS
        )
        return None if first is None or second is None else (first, second)

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel with this one cut."""
        return experts_source(problem_of(node), target, None, [(groups_of(config), None)])

    def product_work(
        self, node: Node, product: Product, config: Config, sizes: Sizes, target: Target
    ) -> Work:
        """The weights of each expert that is chosen once; rows of x by every block of columns."""
        p, tiles = problem_of(node), groups_of(config)[PRODUCTS.index(product)]
        outputs, length = p.sizes(product)
        tokens = evaluate(p.tokens, sizes)
        used = p.experts * (1 - (1 - p.slots / p.experts) ** tokens)
        each = tokens * p.slots / used
        count = math.ceil(used * math.ceil(each / tiles.block_m))
        blocks, rows = -(-outputs // tiles.block_n), tiles.block_n * _parts(product)
        size = p.dtype.bytes
        expert = outputs * _parts(product) * length * size
        moved = count * blocks * (rows + tiles.block_m) * length * size
        shared = shared_bytes(p, product, tiles) + 1024
        resident = min(
            target.shared_memory_per_sm // shared, _THREADS_PER_SM // (32 * tiles.num_warps)
        )
        return Work(
            dram_bytes=float(used * expert),
            l2_bytes=float(moved),
            flops=2.0 * count * blocks * rows * tiles.block_m * length,
            dtype=str(p.dtype.torch).removeprefix("torch."),
            programs=count * blocks,
            blocks_per_sm=max(1, resident),
            bytes_in_flight=float((tiles.num_stages - 1) * tiles.block_k * rows * size),
            steps=-(-length // tiles.block_k),
            stages=tiles.num_stages,
            warps=tiles.num_warps,
            accumulators=rows * tiles.block_m / (32 * tiles.num_warps),
        )

    def numerics(self, config: Config) -> str:
        """Products add up column by column, whatever the tiles."""
        return "one order"


BLOCK = 16
"""Pairs of the smallest tile: where it does not fit, none does."""


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


def rows_config(tiles: tuple[RowTiles, RowTiles]) -> Config:
    """Cuts of both products by their fields."""
    named = (
        (f"{product}_{name}", value)
        for product, each in zip(PRODUCTS, tiles, strict=True)
        for name, value in asdict(each).items()
    )
    return Config(tuple(named))


def groups_config(tiles: tuple[GroupTiles, GroupTiles]) -> Config:
    """Cuts of both products by their fields, the tile of pairs once."""
    named = [("block_m", tiles[0].block_m)]
    for product, each in zip(PRODUCTS, tiles, strict=True):
        values = asdict(each)
        del values["block_m"]
        named += [(f"{product}_{name}", value) for name, value in values.items()]
    return Config(tuple(named))


def rows_of(config: Config | Mapping[str, Value]) -> tuple[RowTiles, RowTiles]:
    """The cuts of a config of `ExpertRows`."""
    first, second = (
        RowTiles(*(int_(config, f"{product}_{field.name}") for field in fields(RowTiles)))
        for product in PRODUCTS
    )
    return first, second


def groups_of(config: Config | Mapping[str, Value]) -> tuple[GroupTiles, GroupTiles]:
    """The cuts of a config of `ExpertGroups`."""
    names = [field.name for field in fields(GroupTiles) if field.name != "block_m"]
    first, second = (
        GroupTiles(int_(config, "block_m"), *(int_(config, f"{product}_{n}") for n in names))
        for product in PRODUCTS
    )
    return first, second


def _sizes(node: Node, tokens: int) -> Sizes:
    symbol = problem_of(node).tokens
    return {str(symbol): tokens} if isinstance(symbol, Dim) else {}


def _buffers(node: Node) -> list[Node]:
    found = [base for base in bases_of(node)[1:5] if base is not None]
    assert len(found) == 4, "operands that every call has"
    return found


def _parts(product: Product) -> int:
    return 2 if product == "gate_up" else 1


def _rows_worth_trying(p: Problem, product: Product, default: Config) -> Iterator[Constraint]:
    place = PRODUCTS.index(product)
    length = p.sizes(product)[1]

    def vectors(values: Mapping[str, Value]) -> float:
        tiles = rows_of(values)[place]
        tile = tiles.block_n * _parts(product) * tiles.block_k
        return tile * p.dtype.bytes / 16 / (32 * tiles.num_warps)

    yield sensible(
        default,
        f"{product}: no wider than the row",
        lambda c: rows_of(c)[place].block_k < 2 * length,
    )
    yield sensible(
        default,
        f"{product}: 2 to 16 vectors of 16 bytes a thread, and 16 bytes of each row",
        lambda c: (
            2 <= vectors(c) <= 16
            and rows_of(c)[place].block_k * p.dtype.bytes >= 512 * rows_of(c)[place].num_warps
        ),
    )


def _groups_that_fit(
    p: Problem, product: Product, default: Config, target: Target
) -> Iterator[Constraint]:
    place = PRODUCTS.index(product)

    def sums(values: Mapping[str, Value]) -> float:
        tiles = groups_of(values)[place]
        held = tiles.block_n * tiles.block_m * _parts(product)
        return held / (32 * tiles.num_warps)

    yield Constraint(
        f"{product}: what the block's shared memory holds",
        lambda c: shared_bytes(p, product, groups_of(c)[place]) <= target.shared_memory_per_block,
    )
    yield sensible(default, f"{product}: sums that registers hold", lambda c: 4 <= sums(c) <= _SUMS)
