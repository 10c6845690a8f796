"""Cuts of experts as configs, and the spaces of those that are worth their time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields

from ....autotune.space import (
    Boolean,
    Choice,
    Config,
    Constraint,
    Integer,
    Parameter,
    Space,
    Value,
    When,
)
from ....targets import Target
from ..kernels.experts_tiles import (
    PRODUCTS,
    GroupTiles,
    Problem,
    Product,
    RowTiles,
    default_groups,
    shared_bytes,
)
from ..kernels.wide_experts_tiles import SPACE, WideTiles, default_wide, takes_tiles
from .template import int_, power_range, sensible, with_default

_OWN = ("block_n", "block_k", "num_warps", "num_stages")
_SUMS = 128  # float32 sums that a thread may hold
_WIDE, _POINTERS = When("wide", (True,)), When("wide", (False,))


def rows_config(tiles: tuple[RowTiles, RowTiles]) -> Config:
    """Cuts of both products by their fields."""
    named = (
        (f"{product}_{name}", value)
        for product, each in zip(PRODUCTS, tiles, strict=True)
        for name, value in asdict(each).items()
    )
    return Config(tuple(named))


def groups_config(tiles: tuple[GroupTiles, GroupTiles]) -> Config:
    """Cuts of both products by their fields, what both share once."""
    first, second = tiles
    wide = isinstance(first, WideTiles) and isinstance(second, WideTiles)
    named: list[tuple[str, Value]] = [
        ("wide", wide),
        ("block_m", first.block_m),
        ("group", first.group),
        ("down_shared", isinstance(second, WideTiles) and second.shared),
    ]
    for product, each in zip(PRODUCTS, tiles, strict=True):
        named += [(f"{product}_{name}", getattr(each, name)) for name in _OWN]
        named.append((f"{product}_flat", isinstance(each, WideTiles) and each.flat))
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
    first, second = (_tiles_of(config, product) for product in PRODUCTS)
    return first, second


def _tiles_of(config: Config | Mapping[str, Value], product: Product) -> GroupTiles:
    n, k, warps, stages = (int_(config, f"{product}_{name}") for name in _OWN)
    block_m, group = int_(config, "block_m"), int_(config, "group")
    if not config["wide"]:
        return GroupTiles(block_m, n, k, warps, stages, group)
    flat, shared = bool(config[f"{product}_flat"]), bool(config["down_shared"])
    return WideTiles(block_m, n, k, warps, stages, group, flat, shared and product == "down")


def rows_worth_trying(p: Problem, product: Product, default: Config) -> Iterator[Constraint]:
    """What cuts of `ExpertRows` are tried."""
    place = PRODUCTS.index(product)
    length = p.sizes(product)[1]

    def vectors(values: Mapping[str, Value]) -> float:
        tiles = rows_of(values)[place]
        tile = tiles.block_n * parts(product) * tiles.block_k
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


def group_space(p: Problem, default: Config, block_m: int, target: Target) -> Space:
    """Cuts of `ExpertGroups`: by pointers, in the bucket's tiles of pairs, and by descriptors where
    they are taken.

    Args:
        p: the experts.
        default: a config of the space.
        block_m: of the bucket.
        target: the device.
    """
    parameters: list[Parameter] = []
    constraints = []
    wide = [default_wide(p, product, target, block_m) for product in PRODUCTS]
    group = int_(default, "group")
    if None not in wide:
        parameters += [
            Boolean("wide"),
            Choice("block_m", SPACE["block_m"], when=_WIDE, otherwise=block_m),
            Choice("group", SPACE["group"], when=_WIDE, otherwise=group),
            Boolean("down_shared", when=_WIDE, otherwise=False),
        ]
    else:
        fixed = {"block_m": block_m, "group": group}
        parameters += [Choice("wide", (False,)), *(Choice(n, (v,)) for n, v in fixed.items())]
        parameters.append(Choice("down_shared", (False,)))
    for product, by_descriptors in zip(PRODUCTS, wide, strict=True):
        by_pointers = default_groups(p, product, target, block_m)
        assert by_pointers is not None, "what the template takes has a default"
        parameters += _group_parameters(product, by_pointers, by_descriptors)
        constraints += list(_groups_that_fit(p, product, default, target))
    constraints.append(
        Constraint(
            "tiles that are shared do not follow each other flat",
            lambda c: not (c["down_shared"] and c["down_flat"]),
        )
    )
    return Space(tuple(parameters), tuple(constraints))


def group_defaults(p: Problem, block_m: int, target: Target) -> list[Config]:
    """Those of both forms, as far as they are taken, in a bucket."""
    found = []
    for default in (default_groups, default_wide):
        first, second = (default(p, product, target, block_m) for product in PRODUCTS)
        if first is not None and second is not None:
            found.append(groups_config((first, second)))
    return found


def _group_parameters(
    product: Product, by_pointers: GroupTiles, by_descriptors: GroupTiles | None
) -> list[Parameter]:
    n, k, w, s = (f"{product}_{name}" for name in _OWN)
    stages = range(max(2, by_pointers.num_stages - 1), max(2, by_pointers.num_stages) + 2)
    if by_descriptors is None:
        return [
            with_default(n, (64, 128), by_pointers.block_n),
            with_default(k, (64, 128), by_pointers.block_k),
            power_range(w, 4, 8, by_pointers.num_warps),
            Integer(s, stages[0], stages[-1]),
            Choice(f"{product}_flat", (False,)),
        ]
    columns = {64, 128, by_pointers.block_n, by_descriptors.block_n, *SPACE["block_n"]}
    return [
        Choice(n, tuple(sorted(columns))),
        Choice(
            k,
            tuple(sorted({64, 128, by_pointers.block_k})),
            when=_POINTERS,
            otherwise=by_descriptors.block_k,
        ),
        power_range(w, 4, 8, by_pointers.num_warps),
        Integer(s, min(stages[0], 2), max(stages[-1], *SPACE["num_stages"])),
        Boolean(f"{product}_flat", when=_WIDE, otherwise=False),
    ]


def _groups_that_fit(
    p: Problem, product: Product, default: Config, target: Target
) -> Iterator[Constraint]:
    place = PRODUCTS.index(product)

    def fits(values: Mapping[str, Value]) -> bool:
        tiles = groups_of(values)[place]
        if isinstance(tiles, WideTiles):
            return takes_tiles(p, product, tiles, target)
        return shared_bytes(p, product, tiles) <= target.shared_memory_per_block

    def sums(values: Mapping[str, Value]) -> float:
        tiles = groups_of(values)[place]
        held = tiles.block_n * tiles.block_m * parts(product)
        return held / (32 * tiles.num_warps)

    yield Constraint(f"{product}: what a block's shared memory and registers hold", fits)
    yield sensible(
        default,
        f"{product}: sums that registers hold, and by descriptors 64 of a thread at least",
        lambda c: (64 if c["wide"] else 4) <= sums(c) <= _SUMS,
    )


def parts(product: Product) -> int:
    """Rows of weights for each output."""
    return 2 if product == "gate_up" else 1
