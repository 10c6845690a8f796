"""Generated kernels for the tuner: those that run along rows, norms above all, and elementwise
ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import lru_cache

from ....autotune.key import token_bucket
from ....autotune.prior import Constants, Work
from ....autotune.space import Config, Space, Value
from ....ir.dims import evaluate
from ....ir.dtypes import DType
from ....ir.node import Node
from ....ir.types import TensorType
from ....targets import Target
from .. import (
    functions,
    generate,
    generate_codes,
    generate_index,
    generate_ops,
    generate_reads,
    generate_rows,
    generate_space,
    generate_steps,
    generate_text,
)
from ..generate import Walk, walk_source
from ..generate_index import CHUNK, MAX_THREADS, Cut
from ..source import KernelSource
from .problem import bases_of, layouts_of
from .template import Facts, Sizes, Template, int_, power_range, sensible, with_default

TOKENS = 2048
"""Tokens that generated kernels of the general Program are timed with."""

_FLOATS = frozenset({DType.F32, DType.F16, DType.BF16})
_MOST_WARPS = MAX_THREADS // 32
_THREADS_PER_SM = 2048


class _Walk(Template):
    """What both kinds have in common: rows and columns of a tile, and warps.

    Bodies over anything but floats are left alone: what an index picks decides there. So are those
    whose sizes hang on more than one symbol, for no number of tokens says how large they are.
    """

    modules = (
        functions,
        generate,
        generate_codes,
        generate_index,
        generate_ops,
        generate_reads,
        generate_rows,
        generate_space,
        generate_steps,
        generate_text,
    )
    reduces: bool
    # Set by hand, until a space is measured: memory decides, and programs are short.
    constants = Constants(tail=0.1, program=0.1e-6, overlap=8.0, many_warps=0.0, few_warps=0.0)

    def takes(self, node: Node) -> bool:
        """A ``fused`` node of the kind, over floats, whose rows are a number of tokens."""
        if node.op != "fused" or not all(t.dtype in _FLOATS for t in _types(node)):
            return False
        walk = _walk(node) if len(_symbols(node)) <= 1 else None
        if walk is None or walk.reduces != self.reduces:
            return False
        return isinstance(walk.space.width, int) and walk.space.width > 0 and walk.space.rows != 0

    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """The ops in order, what they read and write in a row, and how many rows there are."""
        walk = walk_of(node)
        rows = evaluate(walk.space.rows, sizes)
        return (
            ("dtype", str(node.types[0].dtype)),
            ("ops", " ".join(member.op for member in walk.members)),
            ("operands", len(node.operands)),
            ("results", len(node.types)),
            ("moved", math.ceil(_bytes(node, sizes) / rows)),
            ("width", int(str(walk.space.width))),
            ("rows", rows),
        )

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """The cut of ``Walk.default``."""
        return config_of(walk_of(node).default)

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel of a cut."""
        return walk_source(walk_of(node), cut_of(config), target)

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Operands and results once; operands once more where a row is walked in steps."""
        walk, cut = walk_of(node), cut_of(config)
        rows, width = evaluate(walk.space.rows, sizes), int(str(walk.space.width))
        moved = _bytes(node, sizes)
        steps = math.ceil(width / cut.columns) if self.reduces else 1
        beside = 1 if self.reduces else math.ceil(width / cut.columns)
        a_tile = moved / (rows * width) * cut.rows * min(cut.columns, width)
        blocks = _THREADS_PER_SM // (32 * cut.num_warps)
        held = 2 * _elements(cut) + 32  # registers of a thread
        return Work(
            dram_bytes=moved,
            l2_bytes=moved * (2 if steps > 1 else 1),
            flops=0.0,
            dtype=str(node.types[0].dtype.torch).removeprefix("torch."),
            programs=math.ceil(rows / cut.rows) * beside,
            blocks_per_sm=max(1, min(blocks, int(65536 // (32 * cut.num_warps * held)), 32)),
            bytes_in_flight=a_tile,
            steps=steps,
            stages=2,
            warps=cut.num_warps,
        )


class Rows(_Walk):
    """Kernels that run along rows: norms, softmax, sums, and what is fused with them."""

    name = "rows"
    reduces = True

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Rows of a program, columns of a step (all of them, or some), warps."""
        walk, default = walk_of(node), self.default(node, sizes, target)
        whole = 1 << (int(str(walk.space.width)) - 1).bit_length()
        columns = {whole, min(whole, CHUNK), min(whole, CHUNK // 2)}
        return Space(
            (
                power_range("rows", 1, 4, int_(default, "rows")),
                with_default("columns", sorted(columns), int_(default, "columns")),
                power_range("num_warps", 1, _MOST_WARPS, int_(default, "num_warps")),
            ),
            (sensible(default, "4 to 32 elements a thread", _some),),
        )

    def numerics(self, config: Config) -> str:
        """Threads add up what they hold first, steps what they find: all of the cut decides."""
        return " ".join(f"{name}={value}" for name, value in config.values)


class Elementwise(_Walk):
    """Kernels in which each element is by itself: activations, gates, residual sums."""

    name = "elementwise"
    reduces = False

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Columns and rows of a tile, warps."""
        default = self.default(node, sizes, target)
        columns = int_(default, "columns")  # of which masks come: only its parts are tried
        return Space(
            (
                power_range("rows", 1, 4, int_(default, "rows")),
                power_range("columns", max(1, columns // 4), columns, columns),
                power_range("num_warps", 1, 8, int_(default, "num_warps")),
            ),
            (sensible(default, "4 to 32 elements a thread", _some),),
        )

    def numerics(self, config: Config) -> str:
        """Nothing is added up."""
        return "elementwise"


def row_sizes(node: Node, max_sequences: int | None) -> Sizes:
    """The symbol's value of a call that the templates take: the bucket that holds all rows of a
    decode step, 2048 in the general Program (None).
    """
    tokens = TOKENS if max_sequences is None else token_bucket(max_sequences)
    return dict.fromkeys(_symbols(node), tokens)


def walk_of(node: Node) -> Walk:
    """The walk of a call that the templates take."""
    found = _walk(node)
    assert found is not None, "asked of a call that the template takes"
    return found


@lru_cache(maxsize=64)  # the layers of a model have the same few
def _walk(node: Node) -> Walk | None:
    return Walk.of(node, layouts_of(node))


def config_of(cut: Cut) -> Config:
    """A cut as the tuner has it."""
    return Config(tuple(asdict(cut).items()))


def cut_of(config: Config | Mapping[str, Value]) -> Cut:
    """The cut of a config."""
    return Cut(*(int_(config, field.name) for field in fields(Cut)))


def _some(values: Mapping[str, Value]) -> bool:
    return 4 <= _elements(cut_of(values)) <= 32


def _elements(cut: Cut) -> float:
    """That a thread has of a tile."""
    return cut.rows * cut.columns / (32 * cut.num_warps)


def _symbols(node: Node) -> frozenset[str]:
    """Of operands, results, and the buffers that operands lie in."""
    bases = [base.type for base in bases_of(node) if base is not None]
    return frozenset().union(*(type_.symbols for type_ in (*bases, *_types(node))))


def _types(node: Node) -> tuple[TensorType, ...]:
    """Of operands and results."""
    return (*(operand.type for operand in node.operands), *node.types)


def _bytes(node: Node, sizes: Sizes) -> float:
    """Of all operands and results."""
    return float(sum(evaluate(type_.nbytes, sizes) for type_ in _types(node)))
