"""Nested arguments and results as plain data: what pytree specs are to torch, without code in
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch

from ..errors import EngineError

Constant: TypeAlias = int | float | bool | str | None
Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of a nested structure: its place in the flat list."""

    index: int


@dataclass(frozen=True, slots=True)
class Branch:
    """A container of a nested structure.

    Attributes:
        kind: how to rebuild it; a Hugging Face ModelOutput and a dataclass become "dict".
        keys: the keys of a dict, empty otherwise.
        items: the parts, in order.
    """

    kind: Literal["tuple", "list", "dict"]
    keys: tuple[str, ...]
    items: tuple[Structure, ...]


@dataclass(frozen=True, slots=True)
class Fixed:
    """A value that was specialised: an argument must equal it, a result is it."""

    value: Constant


Structure: TypeAlias = "Leaf | Branch | Fixed"


def rebuild(structure: Structure, flat: Sequence[object]) -> object:
    """The nested value whose leaves stand in ``flat``."""
    if isinstance(structure, Leaf):
        return flat[structure.index]
    if isinstance(structure, Fixed):
        return structure.value
    items = [rebuild(item, flat) for item in structure.items]
    if structure.kind == "dict":
        return dict(zip(structure.keys, items, strict=True))
    return tuple(items) if structure.kind == "tuple" else items


def flatten(structure: Structure, value: object, path: str = "") -> dict[int, torch.Tensor]:
    """The tensors of a nested value by their place in the flat list.

    Raises:
        ValueError: the value does not have this structure; the message says where and how.
    """
    if isinstance(structure, Leaf):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path or 'argument'}: a tensor, not {type(value).__name__}")
        return {structure.index: value}
    if isinstance(structure, Fixed):
        if value != structure.value:
            raise ValueError(f"{path}: {structure.value!r} as at compile time, not {value!r}")
        return {}
    found: dict[int, torch.Tensor] = {}
    for key, item, part in _parts(structure, value, path):
        found |= flatten(item, part, f"{path}[{key!r}]")
    return found


def to_json(structure: Structure) -> Json:
    """A structure as plain data."""
    if isinstance(structure, Leaf):
        return {"leaf": structure.index}
    if isinstance(structure, Fixed):
        return {"fixed": structure.value}
    items: list[Json] = [to_json(item) for item in structure.items]
    return {"kind": structure.kind, "keys": list(structure.keys), "items": items}


def from_json(data: Json) -> Structure:
    """Reads a structure back; EngineError for anything that ``to_json`` did not write."""
    match data:
        case {"leaf": int() as index}:
            return Leaf(index)
        case {"fixed": (None | bool() | int() | float() | str()) as value}:
            return Fixed(value)
        case {
            "kind": "tuple" | "list" | "dict" as kind,
            "keys": list() as keys,
            "items": list() as items,
        }:
            named = cast(Literal["tuple", "list", "dict"], kind)
            return Branch(named, tuple(map(str, keys)), tuple(map(from_json, items)))
    raise EngineError(
        "structure in the manifest",
        expected="a leaf, a fixed value or a container",
        found=repr(data)[:80],
        remedy="Compile the model again.",
    )


def _parts(structure: Branch, value: object, path: str) -> list[tuple[object, Structure, object]]:
    if structure.kind == "dict":
        if not isinstance(value, Mapping) or set(value) != set(structure.keys):
            found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise ValueError(f"{path or 'arguments'}: names {list(structure.keys)}, not {found}")
        pairs = zip(structure.keys, structure.items, strict=True)
        return [(key, item, value[key]) for key, item in pairs]
    if not isinstance(value, tuple | list) or len(value) != len(structure.items):
        found = f"{len(value)}" if isinstance(value, tuple | list) else type(value).__name__
        raise ValueError(f"{path or 'arguments'}: {len(structure.items)} values, not {found}")
    return [(i, item, value[i]) for i, item in enumerate(structure.items)]
