"""Which config a kernel gets when a model is compiled: what a store knows, else the default."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ....autotune.key import Conditions
from ....autotune.lookup import Found, lookup
from ....autotune.space import Config
from ....autotune.store import Store
from ....ir.node import Node
from ....targets import Target
from ..generate_index import Cut
from ..kernels import experts_tiles, paged_attention_tiles, paged_decode_tiles
from ..kernels.linear_tiles import GemmTiles, GemvTiles
from ..kernels.prefill_steps import Steps
from ..kernels.wide_linear_tiles import WideTiles
from . import attention, decode, expert_spaces, experts, wide_linear
from .beside_library import is_library
from .linear import gemm_of, gemv_of
from .problems import (
    ATTENTION,
    EXPERT_GROUPS,
    EXPERT_ROWS,
    GEMM,
    GEMV,
    QUANT_GEMM,
    QUANT_GEMV,
    WALKS,
    WIDE,
    decode_of,
    prefill_of,
    token_sizes,
)
from .template import Sizes, Template
from .tunable import KernelTunable
from .walks import cut_of, row_sizes


@dataclass
class Choices:
    """Looks problems up in a store. What is asked twice is looked up once.

    Only records of the very problem and device are taken: one of another size or device may lose
    to the default, and only measuring could tell; the tuner starts from those. A record of other
    conditions (Triton, driver, version of ours) is taken on trial: whoever compiles the kernels
    drops all of these (`without_trials`) where one does not compile any more, or spills.

    Attributes:
        store: the records.
        target: the device.
        conditions: of this process.
        max_sequences: of a decode graph, most of them in a step; None for the general graph.
        max_model_len: tokens of the longest sequence; None: not known.
        tries: whether records of other conditions are taken.
        found: what came of each lookup, by the digest of its key.
        on_trial: digests of those that are of other conditions, and taken.
    """

    store: Store
    target: Target
    conditions: Conditions
    max_sequences: int | None = None
    max_model_len: int | None = None
    tries: bool = True
    found: dict[str, Found] = field(default_factory=dict)
    on_trial: set[str] = field(default_factory=set)
    _configs: dict[str, Config | None] = field(default_factory=dict)

    def without_trials(self) -> Choices:
        """The same, which leaves the default where only a record of other conditions is there."""
        return Choices(
            self.store,
            self.target,
            self.conditions,
            self.max_sequences,
            self.max_model_len,
            tries=False,
        )

    def config(self, template: Template, node: Node, sizes: Sizes) -> Config | None:
        """The config of a call, None for the default."""
        tunable = KernelTunable.of(template, node, sizes, self.target)
        digest = tunable.key.digest
        if digest not in self._configs:
            self._configs[digest] = self._looked_up(tunable, digest)
        return self._configs[digest]

    def library(self, node: Node, tokens: int) -> bool:
        """Whether a product is the library's, for one token or for up to ``tokens``."""
        config = self.config(GEMV if tokens == 1 else GEMM, node, token_sizes(node, tokens))
        return config is not None and is_library(config)

    def attention(self, node: Node) -> str | None:
        """The library of dense attention; None leaves it to torch."""
        if not ATTENTION.takes(node):
            return None
        config = self.config(ATTENTION, node, {})
        return None if config is None else str(config["backend"])

    def gemv(self, node: Node) -> GemvTiles | None:
        """The cut of a product for one token."""
        template = QUANT_GEMV if QUANT_GEMV.takes(node) else GEMV
        config = self._cut(template, node, token_sizes(node, 1))
        return None if config is None else gemv_of(config)

    def gemm(self, node: Node, block_m: int) -> GemmTiles | None:
        """The cut of a product for up to ``block_m`` tokens."""
        template = QUANT_GEMM if QUANT_GEMM.takes(node) else GEMM
        config = self._cut(template, node, token_sizes(node, block_m))
        return None if config is None else gemm_of(config)

    def decode(self, node: Node, sequences: int) -> paged_decode_tiles.Tiles | None:
        """The cut of decode attention over up to ``sequences`` of them."""
        sizes = decode.mixed_sizes(node, sequences, self.max_model_len)
        config = self.config(decode_of(node), node, sizes)
        return None if config is None else decode.tiles_of(config)

    def prefill(self, node: Node, steps: Steps) -> paged_attention_tiles.Tiles | None:
        """The cut of attention over more tokens than sequences, in some kind of steps."""
        config = self.config(prefill_of(node), node, attention.step_sizes(node, steps))
        return None if config is None else attention.tiles_of(config)

    def expert_rows(self, node: Node) -> experts_tiles.Rows | None:
        """The cut of experts for few tokens."""
        config = self.config(EXPERT_ROWS, node, experts.row_sizes(node))
        return None if config is None else expert_spaces.rows_of(config)

    def expert_groups(self, node: Node, block_m: int) -> experts_tiles.Groups | None:
        """The cut of experts for as many tokens as tiles of ``block_m`` pairs are taken for."""
        sizes = dict(experts.group_sizes(node, self.max_sequences))[block_m]
        config = self.config(EXPERT_GROUPS, node, sizes)
        return None if config is None else expert_spaces.groups_of(config)

    def walk(self, node: Node) -> Cut | None:
        """The cut of a generated kernel."""
        template = next((one for one in WALKS if one.takes(node)), None)
        if template is None:
            return None
        config = self.config(template, node, row_sizes(node, self.max_sequences))
        return None if config is None else cut_of(config)

    def wide(self, node: Node, tokens: int, default: WideTiles | None) -> WideTiles | None:
        """The cut of a product of ``tokens`` at least, None for the library."""
        config = self.config(WIDE, node, token_sizes(node, tokens))
        if config is None:
            return default
        return None if is_library(config) else wide_linear.tiles_of(config)

    def _cut(self, template: Template, node: Node, sizes: Sizes) -> Config | None:
        """The fastest config of ours, None for the default: where the library is the fastest of
        all, the first of the runners-up, which not every product may leave to it (hand_on.py).
        """
        config = self.config(template, node, sizes)
        if config is None or not is_library(config):
            return config
        tunable = KernelTunable.of(template, node, sizes, self.target)
        found = self.found[tunable.key.digest]
        if found.record is None or found.how == "stale":  # only the choice was checked again
            return None
        cuts = (c for c, _ in found.record.runners_up if not is_library(c))
        best = next(cuts, tunable.default)
        return best if best != tunable.default and tunable.space.contains(best) else None

    def lines(self) -> bytes:
        """What came of each lookup, one JSON object a line, for the engine's folder: the key, by
        which rule a record was found (lookup.py), its config, and whether the kernel has that cut
        instead of the default.
        """
        return "".join(f"{json.dumps(line)}\n" for line in map(self._line, self.found)).encode()

    def _line(self, digest: str) -> dict[str, object]:
        found = self.found[digest]
        return {
            "used": self._configs[digest] is not None,
            "how": found.how,
            "differs": list(found.differs),
            "key": found.key.to_json(),
            "config": None if found.record is None else found.record.config.to_json(),
            "table": None if found.source is None else found.source.name,
        }

    def _looked_up(self, tunable: KernelTunable, digest: str) -> Config | None:
        found = self.found[digest] = lookup(self.store, tunable.key, self.conditions)
        record = found.record
        if record is None or found.how not in ("exact", "shipped", "stale"):
            return None
        config = record.config
        if config == tunable.default or not tunable.space.contains(config):
            return None
        if found.how == "stale":
            if not self.tries:
                return None
            self.on_trial.add(digest)
        return config
