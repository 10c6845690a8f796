"""What a store knows of a template's problems, asked for by their facts: no model is needed.

Some of a key cannot be told from facts: the hash of the space needs the call itself. It is taken
from the record that the question comes nearest to; the hash of the template is that of the code
that asks, so that a record of older code is a miss that says so.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..errors import UsageError
from .key import Conditions, Key
from .lookup import Found, lookup
from .record import Record
from .store import Store

Facts = Mapping[str, str]
"""Names of facts and their values as text: what `parse_facts` gives."""


def parse_facts(text: str) -> Facts:
    """The facts of a text such as ``k=4096 n=6144, behind="silu mul"``.

    Raises:
        UsageError: a part without "=", or a name twice.
    """
    found: dict[str, str] = {}
    try:
        parts = shlex.split(text.replace(",", " "))
    except ValueError as error:
        raise _misuse(text, "quotes that are closed", str(error)) from error
    for part in parts:
        name, separator, value = part.partition("=")
        if not separator or not name:
            raise _misuse(text, "facts as name=value, with spaces between them", repr(part))
        if name in found:
            raise _misuse(text, "each fact once", f"{name} twice")
        found[name] = value
    return found


def ask(
    store: Store,
    template: str,
    facts: Facts,
    *,
    template_hash: str,
    device: tuple[str, int] | None,
    conditions: Conditions,
) -> list[Found]:
    """What the store has for each of its problems that has these facts.

    Where none has, one lookup: of the problem that comes nearest, with these facts in place of its
    own.

    Args:
        store: the records.
        template: its name.
        facts: some of the problem's, all others are free.
        template_hash: of the template's code as it is now.
        device: the target, as keys have it, and its architecture; None: each record's own.
        conditions: of this process.

    Returns:
        in the order of device and problem; nothing where the store has no record of the template.

    Raises:
        UsageError: a fact that no problem of this template has, or a size that is no number.
    """
    records = [r for r in _records(store) if r.key.template == template]
    if not records:
        return []
    _check(template, facts, [record.key for record in records])
    matching = [r for r in records if _misses(r.key, facts) == (0, 0.0)]
    if not matching:
        nearest = min(records, key=lambda r: (*_misses(r.key, facts), -r.when.timestamp()))
        problem = {**dict(nearest.key.problem), **_typed(facts, nearest.key)}
        matching = [replace(nearest, key=replace(nearest.key, problem=tuple(problem.items())))]
    keys: dict[tuple[str, object], Key] = {}
    # The first of a problem is asked about: of this code and device before others, then the newest.
    for record in sorted(matching, key=lambda r: _preference(r, template_hash, device)):
        name, arch = device or (record.key.device, record.key.arch)
        key = replace(record.key, template_hash=template_hash, device=name, arch=arch)
        keys.setdefault((name, key.problem), key)
    ordered = sorted(keys.values(), key=lambda key: (key.device, _sortable(key)))
    return [lookup(store, key, conditions) for key in ordered]


def _records(store: Store) -> Iterator[Record]:
    yield from store.records()
    for _, records in store.shipped():
        yield from records


def _preference(
    record: Record, template_hash: str, device: tuple[str, int] | None
) -> tuple[object, ...]:
    other_device = device is not None and record.key.device != device[0]
    return record.key.template_hash != template_hash, other_device, -record.when.timestamp()


def _check(template: str, facts: Facts, keys: Sequence[Key]) -> None:
    known = {name: value for key in keys for name, value in key.problem}
    for name, value in facts.items():
        if name not in known:
            raise UsageError(
                f"fact {name} of {template}",
                expected=f"some of {', '.join(sorted(known))}",
                found=repr(name),
                remedy="Name facts of the problem, such as "
                f"{' '.join(f'{n}={v}' for n, v in list(known.items())[-3:])}.",
            )
        if isinstance(known[name], int) and not value.isdecimal():
            raise _misuse(f"{name}={value}", "a whole number from 0", repr(value))


def _misses(key: Key, facts: Facts) -> tuple[int, float]:
    """How many of the facts are others here, texts first, and how far the sizes are away."""
    mine, far, others = dict(key.problem), 0.0, 0
    for name, value in facts.items():
        own = mine.get(name)
        if isinstance(own, int):
            far += abs(math.log2(max(1, own)) - math.log2(max(1, int(value))))
            far += 1e-9 * (str(own) != value)  # 0 and 1 are alike, and yet not the same
        else:
            others += own != value
    return others, far


def _typed(facts: Facts, key: Key) -> dict[str, str | int]:
    mine = dict(key.problem)
    return {n: int(v) if isinstance(mine.get(n), int) else v for n, v in facts.items()}


def _sortable(key: Key) -> list[tuple[str, int, str]]:
    return [
        (name, value, "") if isinstance(value, int) else (name, -1, value)
        for name, value in key.problem
    ]


def _misuse(culprit: str, expected: str, found: str) -> UsageError:
    remedy = 'Write facts as "k=4096 n=6144 tokens=16", any of them.'
    return UsageError(f"shape {culprit!r}", expected=expected, found=found, remedy=remedy)
