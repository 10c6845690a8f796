"""Decoders with a static KV cache, known by their names, as causal LMs over whole sequences."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .model import Input, Model
from .module import Steps
from .values import Counting, Filled, Value, tensor_of

_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_WRITES = ("TensorScatter", "GroupQueryAttention")  # into a cache, at the tokens' places
_LOGITS = "logits"
_FROM_SEQUENCE = ("position_ids", "logits_indices")


def is_decoder(model: Model) -> bool:
    """Whether a graph has the inputs and outputs of a decoder: ``input_ids`` i64 [batch, length],
    maybe ``position_ids`` and ``logits_indices``, caches ``past_key_values.N.key`` and ``.value``
    [batch, G, length, D] of open length, and ``logits``; and that its caches are written into. One
    that grows its caches has the same names, and would attend to what stands in for them here.
    """
    inputs = {given.name: given for given in model.inputs}
    ids = inputs.get("input_ids")
    if ids is None or _LOGITS not in model.outputs or not _is_open(ids, 2, 1):
        return False
    rest = [given for name, given in inputs.items() if name != "input_ids"]
    pasts = {name for name in inputs if _PAST.fullmatch(name)}
    if any(pasts.intersection(step.inputs) and step.op not in _WRITES for step in model.steps):
        return False
    return ids.dtype is torch.int64 and all(
        _is_open(given, 4, 2) and isinstance(given.dims[1], int) and isinstance(given.dims[3], int)
        if _PAST.fullmatch(given.name)
        else given.name in _FROM_SEQUENCE and _is_open(given, 2, 1)
        for given in rest
    )


def _is_open(given: Input, rank: int, axis: int) -> bool:
    batch = given.dims[0] if given.dims else 0
    open_length = len(given.dims) == rank and isinstance(given.dims[axis], str)
    return open_length and (isinstance(batch, str) or batch == 1)


class OnnxDecoder(Steps):
    """``module(input_ids i64[1, S])`` gives logits [1, S, V]: the file, run over one sequence."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, (_LOGITS,))
        self.inputs = model.inputs

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every token."""
        values = {given.name: self._value(given, input_ids) for given in self.inputs}
        return tensor_of(self.run(values)[_LOGITS])

    def _value(self, given: Input, input_ids: Tensor) -> Value:
        length = input_ids.shape[1]
        if given.name == "input_ids":
            return input_ids
        if given.name in _FROM_SEQUENCE:
            return Counting(0, length, 2, 1, given.dtype)
        heads, width = given.dims[1], given.dims[3]
        assert isinstance(heads, int) and isinstance(width, int)
        return Filled(0.0, (1, heads, length, width), given.dtype)


def facts_of(folder: Mapping[str, object]) -> tuple[tuple[int, ...], int | None]:
    """End tokens and longest sequence that a generation.json beside the file tells."""
    ends, longest = folder.get("eos_token_ids"), folder.get("max_length")
    listed = ends if isinstance(ends, list) else []
    return (
        tuple(int(token) for token in listed if isinstance(token, int)),
        longest if isinstance(longest, int) and longest > 0 else None,
    )
