"""Tokens chosen on the device from logits other than a decode step's own: of a step of any kind,
and of rows whose form leaves tokens out. Nothing waits for the device.

A Program that samples ends with one call from logits and parameters to tokens: that call is made
again, with the logits that are given, so that its tokens are those of the Program. Where it cannot
be told apart torch's functions choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codegen.base import Kernel
from ..codegen.program import Call, Program
from ..ir.dims import name_of
from ..ir.schema import schema
from .filters import apply_temperature, draw
from .grammar import left_out
from .params import SamplingParams
from .runner import ProgramRunner
from .step_buffer import SAMPLING

TOKENS = "tokens"  # the output of a Program that samples
Masks: TypeAlias = Sequence[NDArray[np.int32] | None]
"""Of each row what may come next (`Matcher.words`), None for any."""
Kind: TypeAlias = Literal["greedy", "random", "cut"]
"""The largest logit, a draw, or a draw after top-k, top-p or min-p, which sorts the vocabulary."""


class TokenChooser:
    """Chooses tokens as a Program does.

    Args:
        runner: of a Program that samples.
    """

    def __init__(self, runner: ProgramRunner) -> None:
        self._runner = runner
        self._own = _own_call(runner)

    def choose(
        self, logits: Tensor, fields: Mapping[str, Tensor], params: Sequence[SamplingParams]
    ) -> Tensor:
        """Tokens i64[R], -1 where no largest logit is finite; to be called in the runner's mode.

        Args:
            logits: [R, V] of floats, dense.
            fields: how each row is sampled, [R] each (`step_buffer.SAMPLING`).
            params: of each row, which `fields` are made of.
        """
        if self._own is None or not self.captures(logits):
            return _by_torch(logits.float(), fields, kind_of(params))
        return self._own(logits, fields)

    def captures(self, logits: Tensor) -> bool:
        """Whether a graph can hold the choice from logits like these, whatever the parameters are:
        it is the Program's own.
        """
        own = self._own
        return own is not None and logits.dtype is own.dtype and logits.is_contiguous()

    def choose_masked(
        self,
        logits: Tensor,
        tokens: Tensor,
        words: Tensor,
        fields: Mapping[str, Tensor],
        params: Sequence[SamplingParams],
    ) -> None:
        """Writes the tokens of rows with masks.

        Args:
            logits: [R, V] of floats.
            tokens: i64[R]; -1 is written where no logit that may come is finite.
            words: i32[R, W], the masks as `fill_masks` has them, on the device of the logits.
            fields: as `choose` has them, [R] each.
            params: of each row that may have a mask.
        """
        banned = left_out(words, logits.shape[-1])
        found = self.choose(logits.masked_fill(banned, -torch.inf), fields, params)
        torch.where((words != -1).any(-1), found, tokens, out=tokens)


class _OwnCall:
    """The call by which a Program samples, for logits that are given."""

    def __init__(self, program: Program, call: Call, kernel: Kernel, logits: str) -> None:
        type_ = program.buffers[logits]
        self.dtype = type_.dtype.torch
        self._rows, self._kernel = name_of(type_.shape[0]), kernel
        self._names = [name for name in call.operands if name != logits]

    def __call__(self, logits: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        sizes = {} if self._rows is None else {self._rows: len(logits)}
        operands = [logits, *(None if name is None else fields[name] for name in self._names)]
        (tokens,) = self._kernel(operands, sizes)
        return tokens


def _own_call(runner: ProgramRunner) -> _OwnCall | None:
    program = runner.program
    outputs = dict(program.outputs)
    if TOKENS not in outputs:
        return None
    logits, makers = (
        outputs["logits"],
        [(call, kernel) for call, kernel in runner.steps if outputs[TOKENS] in call.results],
    )
    if len(makers) != 1:
        return None
    call, kernel = makers[0]
    plain = len(call.results) == 1 and not call.guard and not call.constants
    told = {name for name in call.operands[1:] if name is not None} <= set(SAMPLING)
    whole = not any(logits in one.results and one.aliases for one in program.calls)
    if not (plain and told and whole and call.operands[0] == logits):
        return None
    return _OwnCall(program, call, kernel, logits)


def kind_of(params: Sequence[SamplingParams]) -> Kind:
    """What rows with these parameters need."""
    if all(one.is_greedy for one in params):
        return "greedy"
    cuts = any(one.top_k or one.top_p < 1 or one.min_p for one in params)
    return "cut" if cuts else "random"


def _by_torch(scores: Tensor, fields: Mapping[str, Tensor], kind: Kind) -> Tensor:
    if kind == "cut":
        found = schema("sample").reference(scores, *(fields[name] for name in SAMPLING))
        assert isinstance(found, Tensor)
        return found
    best, tokens = scores.max(-1)
    if kind == "random":
        temperature = fields["temperature"]
        scaled = apply_temperature(scores, temperature[:, None])
        drawn = draw(scaled, fields["uniform"].double()[:, None])
        tokens = torch.where(temperature > 0, drawn, tokens)
    return torch.where(best.isfinite(), tokens, -1)
