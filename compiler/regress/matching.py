"""Which kernel of the new side is which of the old one, and how their texts differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import unified_diff

from .gates import bare, part_of
from .snapshot import KernelSnapshot, Number, Snapshot, plain_name

Pair = tuple[KernelSnapshot | None, KernelSnapshot | None]
Values = tuple[str, Number | None, Number | None]
_NEVER = ("spills",)  # a healthy kernel has none, not even a new one


def match_kernels(old: Snapshot, new: Snapshot) -> list[Pair]:
    """Pairs of old and new in the new side's order, what is gone behind; None for a lack.

    Within those of one plain name the same hash goes first, then the same fused body, then the
    order of first calls: one kernel more does not shift all the others.
    """
    found: dict[int, KernelSnapshot] = {}
    left, right = list(old.kernels), list(new.kernels)
    keys: Sequence[Callable[[KernelSnapshot], str]] = (
        lambda kernel: kernel.id,
        lambda kernel: kernel.id.rsplit("-", 1)[0],
        lambda kernel: plain_name(kernel.id),
    )
    for key in keys:
        for kernel in list(right):
            twin = next((k for k in left if key(k) == key(kernel)), None)
            if twin is not None:
                found[id(kernel)] = twin
                left.remove(twin)
                right.remove(kernel)
    pairs: list[Pair] = [(found.get(id(kernel)), kernel) for kernel in new.kernels]
    return pairs + [(kernel, None) for kernel in left]


def paired_series(old: KernelSnapshot | None, new: KernelSnapshot) -> Iterator[Values]:
    """(series, old value, new value) of a kernel, binary by binary.

    A count that a side leaves out is 0 there. Where one side has a single binary, that is the
    first of the other's. Of a binary that is new only what no kernel should have is compared,
    with 0.
    """
    before = _by_part(old) if old is not None else {}
    first = next(iter(new.cubins), None)
    for part, after in _by_part(new).items():
        known = before.get(part)
        if known is None and part == first and 1 in (len(before), len(new.cubins)):
            known = next(iter(before.values()), None)
        end = f" ({part})" if part else ""
        for name in dict.fromkeys((*(known or {}), *after)):
            if known is None and name not in _NEVER:
                continue
            missing = None if name.startswith("bits per") else 0
            yield f"{name}{end}", (known or {}).get(name, missing), after.get(name, missing)


def _by_part(kernel: KernelSnapshot) -> Mapping[str, Mapping[str, Number]]:
    found: dict[str, dict[str, Number]] = {part: {} for part in kernel.cubins}
    for series, value in kernel.series.items():
        found[part_of(series)][bare(series)] = value
    return found


def kernel_diff(old: KernelSnapshot, new: KernelSnapshot) -> str:
    """A unified diff of source and launches; empty where both are alike."""
    return "".join(
        _unified(a, b, f"{old.id} {what}", f"{new.id} {what}")
        for a, b, what in (
            (old.text, new.text, "source"),
            ("\n".join(old.launches) + "\n", "\n".join(new.launches) + "\n", "launches"),
        )
    )


def program_diff(old: Snapshot, new: Snapshot) -> str:
    """A unified diff of the Programs, kernels named without digests: those have rows of their own;
    empty where nothing else differs.
    """
    a, b = _without_digests(old), _without_digests(new)
    return _unified(a, b, "program", "program")


def first_pass(old: Snapshot, new: Snapshot) -> str:
    """Where the graphs part, in words; empty where they are the same after every pass."""
    if old.passes == new.passes:
        return ""
    for index, (a, b) in enumerate(zip(old.passes, new.passes, strict=False)):
        if a == b:
            continue
        if index == 0:
            return "the captured graph differs, before any pass"
        limit = f"TILEWRIGHT_PASS_LIMIT={index - 1} stops before it"
        if a[0] != b[0]:
            return f"pass {index} was {a[0]} and is {b[0]}: {limit}"
        return f"first differs after pass {b[0]}: {limit}"
    longer = max(old.passes, new.passes, key=len)
    shorter = min(len(old.passes), len(new.passes))
    side = "is gone" if longer is old.passes else "is new"
    limit = f"TILEWRIGHT_PASS_LIMIT={shorter - 1} stops before it"
    return f"pass {longer[shorter][0]} {side}: {limit}"


def _without_digests(snapshot: Snapshot) -> str:
    text = snapshot.program
    for kernel in snapshot.kernels:
        text = text.replace(f'/{kernel.id}"', f'/{kernel.id.rsplit("-", 1)[0]}"')
    return text


def _unified(old: str, new: str, old_name: str, new_name: str) -> str:
    lines = unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), old_name, new_name, n=3
    )
    return "".join(lines)
