"""What a kernel's machine code consists of, as series: memory accesses by width, tensor-core
instructions, and what tells at a glance that something was lost.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...codegen.triton.sass import code_listing, instruction_counts, loop_instructions
from ...formats.atomic import write_atomic
from ...settings import current
from ...targets import available_cores

Number = int | float
_READER = 2  # counts up when what is read of a listing is read otherwise
IN_LOOPS = "in loops"  # beside the names of instructions, which are in capitals
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?=\.|$)")
_MATRICES = re.compile(r"\.M(?:T)?\d+(?:\.(2|4))?(?=\.|$)")
_WORD = 32
_ACCESSES: Mapping[str, str] = {
    "LDG": "global loads",
    "LD": "global loads",  # generic, which in our kernels is global
    "STG": "global stores",
    "ST": "global stores",
    "LDS": "shared loads",
    "LDSM": "shared loads",
    "STS": "shared stores",
    "STSM": "shared stores",
    "LDGSTS": "async copies",
}
_COUNTED: Mapping[str, str] = {
    "LDL": "local loads",
    "STL": "local stores",
    "UTMALDG": "TMA",
    "UTMASTG": "TMA",
    "UTMAREDG": "TMA",
    "UBLKCP": "TMA",
    "UBLKRED": "TMA",
    "ATOM": "atomics",
    "ATOMG": "atomics",
    "RED": "atomics",
    "REDG": "atomics",
    "BAR": "barriers",
    "MUFU": "MUFU",
}
_MMA = re.compile(r"(UTC)?[A-Z](G)?MMA")  # UTCHMMA: tcgen05, HGMMA: wgmma, HMMA: mma.sync


def read_instructions(cubins: Iterable[bytes]) -> Mapping[str, Mapping[str, int]]:
    """Instructions by name of each cubin, and how many are ``IN_LOOPS``, by the cubin's sha256;
    read once, then from the cache.
    """
    by_hash = {cubin_hash(cubin): cubin for cubin in cubins}
    folder = current().cache / "sass"
    with ThreadPoolExecutor(available_cores()) as pool:
        found = pool.map(lambda item: _read(folder, *item), by_hash.items())
        return dict(zip(by_hash, found, strict=True))


def cubin_hash(cubin: bytes) -> str:
    """sha256 of a cubin, in hexadecimal."""
    return hashlib.sha256(cubin).hexdigest()


def instruction_series(counts: Mapping[str, int]) -> dict[str, Number]:
    """The series of one binary. Counts of nothing are left out; what is derived is always there.

    Args:
        counts: by instruction name with modifiers, as `read_instructions` gives them.
    """
    counts = dict(counts)
    in_loops = counts.pop(IN_LOOPS, 0)
    series: Counter[str] = Counter()
    generation = 0
    for name, count in counts.items():
        base = name.split(".", 1)[0]
        if kind := _ACCESSES.get(base):
            series[f"{kind} {access_bits(name)}-bit"] += count
        elif kind := _COUNTED.get(base):
            series[kind] += count
        elif mma := _MMA.fullmatch(base):
            series[base] += count
            generation = max(generation, 3 if mma[1] else 2 if mma[2] else 1)
    derived: dict[str, Number] = {"instructions": sum(counts.values())}
    derived["loop instructions"] = in_loops
    # A load through LDGSTS is one too: pipelined kernels have no other.
    for kind, prefixes in (
        ("load", ("global loads ", "async copies ")),
        ("store", ("global stores ",)),
    ):
        width = _mean_width(series, prefixes)
        if width is not None:
            derived[f"bits per global {kind}"] = width
    copies = any(name.startswith("async copies") for name in series)
    derived["async loads"] = 2 if "TMA" in series else int(copies)
    derived["tensor cores"] = generation
    return {**derived, **dict(sorted(series.items()))}


def access_bits(name: str) -> int:
    """Bits that a memory instruction moves for each thread, by its modifiers: ``LDG.E.128``."""
    if matrices := _MATRICES.search(name):  # LDSM: a word a thread for each matrix
        return _WORD * int(matrices[1] or 1)
    widths = _WIDTH.findall(name)
    return int(widths[-1]) if widths else _WORD


def _mean_width(series: Mapping[str, int], prefixes: tuple[str, ...]) -> float | None:
    """Through how wide an instruction the mean bit moves. As bits are counted, not instructions,
    wide ones that are no longer needed change it little; narrow ones in their place do.
    """
    found = [
        (int(name.rsplit(" ", 1)[1].removesuffix("-bit")), count)
        for name, count in series.items()
        if name.startswith(prefixes)
    ]
    bits = sum(width * count for width, count in found)
    return round(sum(width**2 * count for width, count in found) / bits, 3) if bits else None


def _read(folder: Path, hash: str, cubin: bytes) -> Mapping[str, int]:
    path = folder / f"{hash}.{_READER}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): int(count) for name, count in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # absent or damaged: read anew
        listing = code_listing(cubin)
        counts = {**instruction_counts(listing), IN_LOOPS: loop_instructions(listing)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(dict(counts)))
    except OSError:  # a cache that cannot be written is no error
        pass
    return counts
