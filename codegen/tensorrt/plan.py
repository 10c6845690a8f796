"""What an engine file of TensorRT for RTX says of itself, read without a GPU: the kernels that it
launches, and the caches that it writes in place.

The file holds each profile's kernels as text, ``function={ name=_gemv_mha_v1 … }``, and the names
of the memory that comes in and goes out, one name where both are one. That text is not documented:
of another flavor or version nothing may be found. TensorRT's own inspector needs a GPU.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_KERNEL = re.compile(rb"function=\{ name=(\w+)")
_BINDINGS = re.compile(rb'\s(inputs|outputs)=\{ ((?:"[^"\n]*" )*)\}')
_SUFFIX = re.compile(r"( \[profile \d+\])?\.\d+$")


@dataclass(frozen=True, slots=True)
class Plan:
    """An engine's own account.

    Attributes:
        kernels: how often each is launched, in all profiles together.
        in_place: the inputs and outputs that are one memory, by the output's name.
    """

    kernels: Mapping[str, int]
    in_place: frozenset[str]

    @property
    def attention_kernels(self) -> Mapping[str, int]:
        """Those of fused attention."""
        return {name: count for name, count in self.kernels.items() if "_mha_" in name}


def read_plan(path: Path) -> Plan:
    """Reads an engine file; nothing of it is loaded.

    Raises:
        OSError: there is no such file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        kernels = Counter(match[1].decode() for match in _KERNEL.finditer(plan))
        found: dict[str, set[str]] = {"inputs": set(), "outputs": set()}
        for match in _BINDINGS.finditer(plan):
            names = match[2].decode(errors="replace").split('"')[1::2]
            found[match[1].decode()].update(_SUFFIX.sub("", name) for name in names)
    return Plan(dict(kernels.most_common()), frozenset(found["inputs"] & found["outputs"]))
