"""Which buffers of a Program share memory: results written in place, and views."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..ir.dims import evaluate
from ..ir.interpreter import resolve_attr
from ..ir.schema import schema
from ..ir.types import TensorType
from .program import Call, Program

VIEWS = frozenset({"slice", "expand", "permute", "reshape"})


def storage_of(
    program: Program, sizes: Mapping[str, int]
) -> tuple[dict[str, str], tuple[int, ...]]:
    """The storage of every buffer, named after the one that it is made for, and the free calls.

    A free call only views its operand: slices, expansions, permutations, and such reshapes as need
    no copy. Buffers that are no views are dense.
    """
    layouts = _Layouts(program.buffers, sizes)
    given = (*program.inputs, *program.weights, *(buffer for _, buffer in program.outputs))
    storage = {name: name for name in given}
    free: list[int] = []
    for index, call in enumerate(program.calls):
        in_place = dict(call.aliases)
        viewed = layouts.viewed(call)
        if viewed is not None:
            free.append(index)
        for position, result in enumerate(call.results):
            operand = viewed
            if position in in_place:
                operand = call.operands[in_place[position]]
            storage[result] = result if operand is None else storage[operand]
    return storage, tuple(free)


class _Layouts:
    """Strides of the buffers, on meta tensors: what torch itself would view or copy."""

    def __init__(self, buffers: Mapping[str, TensorType], sizes: Mapping[str, int]) -> None:
        self.buffers, self.sizes = buffers, sizes
        self.views: dict[str, torch.Tensor] = {}

    def viewed(self, call: Call) -> str | None:
        """The operand of which the call's result is a view, None when it is a value of its own."""
        op = call.kernel.split("/", 1)[1]
        source = call.operands[0] if call.operands else None
        if call.loader != "eager" or op not in VIEWS or source is None:
            return None
        x = self._tensor(source)
        attrs = {name: resolve_attr(value, self.sizes) for name, value in call.attrs.items()}
        result = schema(op).reference(x, **attrs)
        assert isinstance(result, torch.Tensor)
        if result.untyped_storage()._cdata != x.untyped_storage()._cdata:
            return None
        self.views[call.results[0]] = result
        return source

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.views:
            type_ = self.buffers[name]
            shape = [evaluate(size, self.sizes) for size in type_.shape]
            self.views[name] = torch.empty(shape, dtype=type_.dtype.torch, device="meta")
        return self.views[name]
