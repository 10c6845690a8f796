"""What the readers of quantized checkpoints share: the tensors of one linear, checked."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..stored_codes import FLOATS, StoredCodes
from ..weight_quant import blocks
from ..weights import Stored, Weight, apply_weight


@dataclass(frozen=True, slots=True)
class Opened:
    """A quantized checkpoint while it is read.

    Attributes:
        checkpoint: its tensors.
        where: the folder, for messages.
        computes: the element types of codes that the device has products of.
        notes: what is done otherwise than the checkpoint says; each once.
        shared: expressions of small tensors by their values, so that those of several linears are
            one.
    """

    checkpoint: Checkpoint
    where: str
    computes: frozenset[torch.dtype]
    notes: dict[str, None] = field(default_factory=dict)
    shared: dict[object, Weight] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Keeps a note for the report."""
        self.notes.setdefault(text)

    def wrong(self, name: str, expected: str, found: str) -> CheckpointError:
        """The error of a tensor that is not what the layout says."""
        return CheckpointError(
            f"{self.where}: tensor {name!r}",
            expected=expected,
            found=found,
            remedy="Download the checkpoint again, or compile the original model with quantize=….",
        )


@dataclass(frozen=True, slots=True)
class Stem:
    """The tensors of one quantized linear: ``NAME.qweight``, ``NAME.scales``, …"""

    opened: Opened
    name: str
    suffixes: frozenset[str]

    def full(self, suffix: str) -> str:
        """The name of a tensor."""
        return f"{self.name}.{suffix}"

    def has(self, suffix: str) -> bool:
        """Whether the checkpoint has it."""
        return suffix in self.suffixes

    def part(
        self, suffix: str, dtypes: Iterable[torch.dtype], *shapes: tuple[int, ...], rank: int = 2
    ) -> Weight:
        """One tensor, of one of the dtypes and shapes; any shape of ``rank`` where none is given.

        Raises:
            CheckpointError: it is missing, or of another dtype or shape.
        """
        name, dtypes = self.full(suffix), tuple(dtypes)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        sizes = " or ".join(str(list(shape)) for shape in shapes) or f"of {rank} dimensions"
        if not self.has(suffix):
            raise self.opened.wrong(name, f"{kinds} {sizes}", "no tensor of that name")
        stored = Stored(self.opened.checkpoint, name)
        fits = stored.shape in shapes if shapes else len(stored.shape) == rank
        if stored.dtype not in dtypes or not fits or 0 in stored.shape:
            found = f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"
            raise self.opened.wrong(name, f"{kinds} {sizes}", found)
        return stored

    def scale(self, suffix: str, *shapes: tuple[int, ...]) -> Weight:
        """Floats that must be finite; that they are is checked when they are loaded."""
        kinds = [dtype for dtype in FLOATS if dtype != torch.float64]
        return apply_weight("finite", (self.part(suffix, kinds, *shapes),))

    def static_scale(self, suffix: str) -> Weight:
        """One positive number, float32 [1].

        Raises:
            CheckpointError: it is missing, of another shape, or no positive number.
        """
        stored = self.part(suffix, FLOATS, (1,), (), (1, 1))
        value = float(stored.load().float().reshape(()))
        if not 0 < value < float("inf"):
            raise self.opened.wrong(self.full(suffix), "a positive number", str(value))
        flat = apply_weight("reshape", (stored,), shape=(1,))
        whole = (
            flat
            if flat.dtype == torch.float32
            else apply_weight("cast", (flat,), dtype=torch.float32)
        )
        return self.opened.shared.setdefault((suffix, value), whole)

    def ordered(self, stored: StoredCodes, suffix: str) -> StoredCodes:
        """The codes in the order of their groups, where a tensor says each column's group.

        Raises:
            CheckpointError: groups that are not there.
        """
        width, count = stored.codes.shape[1], stored.scale.shape[1]
        index = self.part(suffix, (torch.int32, torch.int64), (width,))
        groups = index.load().long()
        if not bool(((groups >= 0) & (groups < count)).all()):
            found = f"{int(groups.min())} … {int(groups.max())}"
            raise self.opened.wrong(self.full(suffix), f"groups 0 … {count - 1}", found)
        size = stored.group or width
        regular = torch.arange(width) // size
        if torch.equal(groups, regular):
            return stored
        key = (suffix, groups.numpy().tobytes())
        if torch.equal(groups.sort().values, regular):
            order = apply_weight("argsort", (index,))
            order = self.opened.shared.setdefault(key, order)
            return replace(stored, codes=take(stored.codes, order), order=order)
        # Groups of unequal size: each column gets a scale of its own.
        wide = self.opened.shared.setdefault(key, apply_weight("cast", (index,), dtype=torch.int64))
        zero = None if stored.zero is None else take(stored.zero, wide)
        return replace(stored, scale=take(stored.scale, wide), zero=zero, group=1)


def take(weight: Weight, index: Weight) -> Weight:
    """Columns of a weight."""
    return apply_weight("take", (weight, index), dim=1)


def transposed(weight: Weight) -> Weight:
    """[A, B] -> [B, A]."""
    return apply_weight("permute", (weight,), dims=(1, 0))


def unpacked(weight: Weight, bits: int, dim: int, offset: int = 0) -> Weight:
    """int32 words -> uint8 codes along ``dim``."""
    return apply_weight("unpack_int32", (weight,), bits=bits, dim=dim, offset=offset)


def signed(codes: Weight) -> Weight:
    """uint8 -> int8, bit by bit."""
    return apply_weight("cast", (codes,), dtype=torch.int8)


def by_rows(scale: Weight, count: int) -> Weight:
    """A scale for all, [1], [] or [1, 1], or one a row, [N], as [N, 1]."""
    total = math.prod(scale.shape)
    column = apply_weight("reshape", (scale,), shape=(total, 1))
    if total == count:
        return column
    return apply_weight("expand", (column,), shape=(count, 1))


class Layout(ABC):
    """How one kind of checkpoint holds its linears.

    Args:
        settings: ``quantization_config`` of config.json.
        opened: the checkpoint.

    Attributes:
        parts: suffixes of the tensors that only quantized linears have.
    """

    parts: ClassVar[tuple[str, ...]]

    def __init__(self, settings: Mapping[str, object], opened: Opened) -> None:
        self.settings, self.opened = settings, opened

    def keeps(self, name: str) -> bool:
        """Whether the settings leave a linear as it is."""
        listed = names(self.opened, self.settings, "modules_to_not_convert")
        return any(f".{entry}." in f".{name}." for entry in listed)

    @abstractmethod
    def read(self, stem: Stem) -> StoredCodes:
        """The codes of one linear.

        Raises:
            CheckpointError: tensors that are missing or not of this layout.
        """


def one_of(opened: Opened, key: str, found: object, valid: tuple[object, ...]) -> object:
    """``found``, where it is one of ``valid``; else CheckpointError."""
    if found not in valid:
        raise _wrong_setting(opened, key, f"one of {', '.join(map(repr, valid))}", found)
    return found


def table(opened: Opened, settings: Mapping[str, object], key: str) -> Mapping[str, object]:
    """A setting that is a table, empty where there is none; else CheckpointError."""
    found = settings.get(key) or {}
    if not isinstance(found, dict):
        raise _wrong_setting(opened, key, "a table", found)
    return found


def names(opened: Opened, settings: Mapping[str, object], key: str) -> list[str]:
    """A setting that is a list of names, empty where there is none; else CheckpointError."""
    found = settings.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise _wrong_setting(opened, key, "a list of names", found)
    return found


def size_of(opened: Opened, key: str, found: object) -> int:
    """A setting that is a size, 0 for -1, which stands for all; else CheckpointError."""
    if type(found) is not int or (found < 1 and found != -1):
        raise _wrong_setting(opened, key, "a positive integer, or -1", found)
    return max(0, found)


def block_of(opened: Opened, key: str, found: object) -> tuple[int, int]:
    """A setting that is rows and columns; else CheckpointError."""
    if not isinstance(found, list | tuple) or len(found) != 2:
        raise _wrong_setting(opened, key, "two sizes", found)
    rows, columns = (size_of(opened, key, size) for size in found)
    return rows, columns


def _wrong_setting(opened: Opened, key: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"{opened.where}: quantization_config.{key}",
        expected=expected,
        found=repr(found),
        remedy="Compile the original model; quantize=… quantizes it while compiling.",
    )


def matches(patterns: Iterable[str], name: str, kind: str = "Linear") -> bool:
    """Whether a name is among names, classes and ``re:`` patterns, as compressed-tensors has
    them.
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif pattern in (name, kind):
            return True
    return False


def group_count(width: int, group: int) -> int:
    """How many groups a row has."""
    return blocks(width, group)
