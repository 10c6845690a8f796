"""Which record serves a key, and why, or why none does.

In this order, and never an error:

    exact      the key and the conditions, measured on this machine
    shipped    the key and the conditions, from a shipped table
    stale      the key under other conditions: a seed that must be checked again
    bucket     the nearest problem on this device
    neighbour  the nearest problem and device of this architecture
    miss       nothing: the prior and the default are left
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import Config
from .distance import comparable, distance
from .key import Conditions, Key, reason_of
from .record import Record
from .store import Store

How = Literal["exact", "shipped", "stale", "bucket", "neighbour", "miss"]
_ORDER: tuple[How, ...] = ("exact", "shipped", "stale", "bucket", "neighbour", "miss")
_MEANS: dict[How, str] = {
    "exact": "measured for this key under these conditions",
    "shipped": "a shipped table has this key under these conditions",
    "stale": "measured for this key under other conditions; to be checked again",
    "bucket": "the nearest problem that was measured on this device: tuning starts from it, a "
    "compile takes the default",
    "neighbour": "the nearest that was measured on another device of this architecture: tuning "
    "starts from it, a compile takes the default",
    "miss": "no record serves",
}
_HASH_SHOWN = 12
_SHOWN = 3  # of what was rejected


@dataclass(frozen=True, slots=True)
class Found:
    """What a lookup came to.

    Attributes:
        record: the one to use; None on a miss.
        how: by which rule.
        differs: where `nearest` differs from what was asked, as `Key.differences` and
            `Conditions.differences` name it.
        nearest: the record; on a miss the one that comes nearest, None if there are none at all.
        key, conditions: what was asked.
        source: the file of `nearest`.
        shipped: whether that is a shipped table.
        distance: of the sizes and the device of `nearest`, in factors of two (distance.py).
    """

    record: Record | None
    how: How
    differs: tuple[str, ...]
    nearest: Record | None
    key: Key
    conditions: Conditions
    source: Path | None = None
    shipped: bool = False
    distance: float = 0.0

    @property
    def warning(self) -> str | None:
        """What the user should know of a stale record; None for all others."""
        if self.how != "stale":
            return None
        return (
            f"{self.key}: tuned under other conditions ({', '.join(_compared(self))}). "
            "The config is checked again before it is used; tune again to measure it."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json` writes; on a miss `record` is null and `nearest` may be too."""
        return {
            "key": self.key.to_json(),
            "conditions": self.conditions.to_json(),
            "how": self.how,
            "differs": list(self.differs),
            "record": self.record and self.record.to_json(),
            "nearest": self.nearest and self.nearest.to_json(),
            "source": self.source and str(self.source),
            "shipped": self.shipped,
            "distance": self.distance,
        }


def lookup(store: Store, key: Key, conditions: Conditions) -> Found:
    """The record of a store that serves best.

    It depends on the records that the store uses, and not on their order. Between records that
    serve by one rule: first the nearest, then fewer differences in conditions, then this machine's
    own, then the newest.
    """
    every = [_judged(*entry, key, conditions) for entry in _entries(store)]
    if not every:
        return Found(None, "miss", (), None, key, conditions)
    ranked = [(_rank(found), found) for found in every]
    best = min(rank for rank, _ in ranked)
    return min((found for rank, found in ranked if rank == best), key=_text)


def neighbours(store: Store, key: Key, limit: int = 3) -> tuple[Config, ...]:
    """Configs to try first: those of the nearest records that are comparable, nearest first.

    A record of the key itself, stale or not, is the nearest there is. Each config comes once.
    """
    unknown = Conditions("", None, "")
    judged = (_judged(*entry, key, unknown) for entry in _entries(store))
    near = sorted((f for f in judged if f.record), key=lambda f: (f.distance, _rank(f), _text(f)))
    configs = dict.fromkeys(found.record.config for found in near if found.record)
    return tuple(configs)[:limit]


def explain(found: Found) -> str:
    """A lookup in words, for `tilewright tune explain`: hit or miss, and which field differed."""
    hit = "miss" if found.record is None else f"hit ({found.how})"
    lines = [f"{found.key}: {hit}, {_MEANS[found.how]}"]
    record = found.nearest
    if record is None:
        return "\n".join([*lines, "  the store holds no records"])
    if found.record is None:
        lines.append(f"  nearest: {record.key}")
    if found.differs:
        lines.append("  it differs in")
        reasons = (reason_of(name) for name in found.differs)
        pairs = zip(_compared(found), reasons, strict=True)
        lines += [f"    {compared} ({reason})" for compared, reason in pairs]
    gain = record.default_seconds / record.seconds
    lines += [
        f"  config: {record.config}",
        f"  {record.seconds * 1e6:.2f} us, the default {record.default_seconds * 1e6:.2f} us "
        f"({gain:.2f} times as long)",
        f"  made {record.made}, {record.trials} trials, budget {record.budget}, seed {record.seed}",
        f"  from {found.source}",
    ]
    shown = [f"  rejected: {config}: {reason}" for config, reason in record.failed[:_SHOWN]]
    more = len(record.failed) - len(shown)
    return "\n".join([*lines, *shown, *([f"  and {more} more"] if more else [])])


def _entries(store: Store) -> Iterator[tuple[Record, Path, bool]]:
    yield from ((record, store.path, False) for record in store.records())
    for path, records in store.shipped():
        yield from ((record, path, True) for record in records)


def _judged(record: Record, source: Path, shipped: bool, key: Key, conditions: Conditions) -> Found:
    in_key = key.differences(record.key)
    in_conditions = conditions.differences(record.conditions)
    how: How = "miss"
    if not in_key:
        how = "stale" if in_conditions else ("shipped" if shipped else "exact")
    elif comparable(key, record.key):
        how = "neighbour" if "device" in in_key else "bucket"
    differs, far = (*in_key, *in_conditions), distance(key, record.key)
    used = None if how == "miss" else record
    return Found(used, how, differs, record, key, conditions, source, shipped, far)


def _rank(found: Found) -> tuple[object, ...]:
    record = found.nearest
    assert record is not None
    # Where nothing serves, the nearest is the one that differs least: in the template last of all.
    unlike = (0, 0)
    if found.how == "miss":
        in_key = found.key.differences(record.key)
        unlike = (int("template" in in_key), len(in_key))
    other_conditions = len(found.conditions.differences(record.conditions))
    age = -record.when.timestamp()
    order = _ORDER.index(found.how)
    return (order, *unlike, found.distance, other_conditions, found.shipped, age)


def _text(found: Found) -> str:
    """What tells records apart that are otherwise alike, the same in every process."""
    return found.nearest.line if found.nearest else ""


def _compared(found: Found) -> list[str]:
    """Each difference with what was asked and what the record has."""
    assert found.nearest is not None
    here = _flat(found.key, found.conditions)
    there = _flat(found.nearest.key, found.nearest.conditions)
    return [
        f"{name}: asked {here.get(name, 'none')}, recorded {there.get(name, 'none')}"
        for name in found.differs
    ]


def _flat(key: Key, conditions: Conditions) -> dict[str, str]:
    plain = {**key.to_json(), **conditions.to_json()}
    plain |= {f"problem.{name}": value for name, value in plain.pop("problem").items()}
    shorter = {name: str(plain[name])[:_HASH_SHOWN] for name in ("template_hash", "space_hash")}
    return {name: str(value) for name, value in (plain | shorter).items()}
