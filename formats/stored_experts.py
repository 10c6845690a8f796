"""The codes of a table of experts, found again in the stack of weights that it is."""

from __future__ import annotations

from .stored_codes import FLOATS, StoredCodes, codes_of
from .weights import Apply, Weight, apply_weight


def experts_in_codes(table: object) -> StoredCodes | None:
    """The parts of a table [E, N, K], as codes [E * N, K]: one expert's rows behind another's.

    None where an expert is not in codes, or not in the same ones as the others.
    """
    if not isinstance(table, Weight) or len(table.shape) != 3:
        return None
    experts = [_expert(table, index) for index in range(table.shape[0])]
    found = tuple(expert for expert in experts if expert is not None)
    if len(found) < len(experts) or not found:
        return None
    return codes_of(apply_weight("concat", found, dim=0))


def _expert(table: object, index: int) -> Weight | None:
    """The weight [N, K] of one expert, from stacks, and stacks side by side (gate and up)."""
    if not isinstance(table, Apply):
        return None
    if table.op == "cast":
        return _expert(table.args[0], index) if table.dtype in FLOATS else None
    if table.op == "reshape":
        inner = table.args[0]
        lifted = isinstance(inner, Weight) and (1, *inner.shape) == tuple(table.shape)
        return inner if lifted and isinstance(inner, Weight) else None
    if table.op != "concat" or any(not isinstance(part, Weight) for part in table.args):
        return None
    parts = [part for part in table.args if isinstance(part, Weight)]
    dim = dict(table.attrs)["dim"]
    if dim == 1:
        halves = tuple(half for part in parts if (half := _expert(part, index)) is not None)
        return apply_weight("concat", halves, dim=0) if len(halves) == len(parts) else None
    if dim != 0:
        return None
    for part in parts:
        if index < part.shape[0]:
            return _expert(part, index)
        index -= part.shape[0]
    return None
