"""Which kernel of the new side is which of the old one, and how their texts differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import unified_diff

from .gates import bare, part_of
from .snapshot import PROGRAM, KernelSnapshot, Number, Snapshot, plain_name

Pair = tuple[KernelSnapshot | None, KernelSnapshot | None]
Values = tuple[str, Number | None, Number | None]
_NEVER = ("spills",)  # a healthy kernel has none, not even a new one
_BY_PHASE = frozenset({"programs"})  # in brackets is a phase, not a binary
_ALWAYS = ("bits per ", "registers", "threads", "warps per SM", "instructions")  # never just 0


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


def one_sided(pairs: Iterable[Pair]) -> frozenset[str]:
    """Series of kernels that only one side counts at all: a binary that is the very same on both
    has it on one side alone, or no kernel of a side has it in any phase.
    """
    found: set[str] = set()
    by_phase: tuple[set[str], set[str]] = set(), set()
    for pair in pairs:
        for kernel, names in zip(pair, by_phase, strict=True):
            names |= {bare(series) for series in _of_phases(kernel)}
        old, new = pair
        if old is None or new is None:
            continue
        before, after = _by_binary(old), _by_binary(new)
        for label, cubin in new.cubins.items():
            if old.cubins.get(label) == cubin:
                found |= before[label].keys() ^ after[label].keys()
    return frozenset(found | (by_phase[0] ^ by_phase[1]))


def paired_series(
    old: KernelSnapshot | None, new: KernelSnapshot, unknown: Collection[str] = ()
) -> Iterator[Values]:
    """(series, old value, new value) of a kernel, binary by binary, then phase by phase.

    A count that a side leaves out is 0 there, unless that side does not know it. Where one side
    has a single binary, that is the first of the other's. Of a binary that is new only what no
    kernel should have is compared, with 0.

    Args:
        old, new: the kernel.
        unknown: `one_sided` series.
    """
    before = _by_binary(old) if old is not None else {}
    first = next(iter(new.cubins), None)
    for label, after in _by_binary(new).items():
        known = before.get(label)
        if known is None and label == first and 1 in (len(before), len(new.cubins)):
            known = next(iter(before.values()), None)
        end = f" ({label})" if label else ""
        for name in dict.fromkeys((*(known or {}), *after)):
            if known is None and name not in _NEVER:
                continue
            missing = None if name in unknown or name.startswith(_ALWAYS) else 0
            yield f"{name}{end}", (known or {}).get(name, missing), after.get(name, missing)
    if old is not None:
        for name in dict.fromkeys((*_of_phases(old), *_of_phases(new))):
            missing = None if bare(name) in unknown else 0
            yield name, old.series.get(name, missing), new.series.get(name, missing)


def _by_binary(kernel: KernelSnapshot) -> Mapping[str, Mapping[str, Number]]:
    found: dict[str, dict[str, Number]] = {label: {} for label in kernel.cubins}
    for series, value in kernel.series.items():
        if bare(series) not in _BY_PHASE:
            found.setdefault(part_of(series), {})[bare(series)] = value
    return found


def _of_phases(kernel: KernelSnapshot | None) -> list[str]:
    return [] if kernel is None else [name for name in kernel.series if bare(name) in _BY_PHASE]


def kernel_diff(old: KernelSnapshot, new: KernelSnapshot) -> str:
    """A unified diff of source and launches; empty where both are alike."""
    return "".join(
        _unified(a, b, f"{old.id} {what}", f"{new.id} {what}")
        for a, b, what in (
            (old.text, new.text, "source"),
            ("\n".join(old.launches) + "\n", "\n".join(new.launches) + "\n", "launches"),
        )
    )


def program_diff(old: Snapshot, new: Snapshot, subject: str = PROGRAM) -> str:
    """A unified diff of two Programs, kernels named without digests: those have rows of their own;
    empty where nothing else differs. A side without the Program has an empty text.
    """
    a, b = _without_digests(old, subject), _without_digests(new, subject)
    return _unified(a, b, subject, subject)


def _without_digests(snapshot: Snapshot, subject: str) -> str:
    text = snapshot.programs.get(subject, "")
    for kernel in snapshot.kernels:
        text = text.replace(f'/{kernel.id}"', f'/{kernel.id.rsplit("-", 1)[0]}"')
    return text


def _unified(old: str, new: str, old_name: str, new_name: str) -> str:
    lines = unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), old_name, new_name, n=3
    )
    return "".join(lines)
