"""Nested inputs and outputs as plain data instead of torch's pytree specs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch.utils._pytree import TreeSpec

from ..runtime.structure import Branch, Fixed, Leaf, Structure

Flat = Leaf | Fixed


def structure_of(spec: TreeSpec, flat: Sequence[Flat]) -> Structure:
    """The structure of a pytree spec over its leaves in order.

    Args:
        flat: per leaf its place among the tensors, or its value.
    """
    return _walk(spec, iter(flat))


def _walk(spec: TreeSpec, leaves: Iterator[Flat]) -> Structure:
    if spec.is_leaf():
        return next(leaves)
    items = tuple(_walk(child, leaves) for child in spec.children())
    keys = _keys(spec)
    if keys or spec.type is dict:
        return Branch("dict", keys, items)
    return Branch("list" if spec.type is list else "tuple", (), items)


def _keys(spec: TreeSpec) -> tuple[str, ...]:
    kind, context = spec.type, spec.context
    if not isinstance(kind, type):
        return ()
    if dataclasses.is_dataclass(kind) or issubclass(kind, dict):
        # pytree contexts: the list of keys, or a list (dataclasses: of lists) that starts with it
        names = context[0] if context and isinstance(context[0], list | tuple) else context
        return tuple(str(name) for name in (names or ()))[: len(spec.children())]
    return ()
