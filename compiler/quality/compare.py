"""A model against another, token by token of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch

from ...errors import UsageError, VerificationError
from ...ir.graph import Graph, Weight, param_name
from ...ir.interpreter import interpret

Logits: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [S] -> logits [S, V]."""

LENGTH = 512
"""Tokens of a window. Each begins with the last one of the window before, to predict
the next."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a model predicts a text, and how another one does.

    Attributes:
        tokens: that were predicted.
        length, stride: of the windows. Each window predicts the tokens that are new in it, with
            what lies before them in the window as their context.
        perplexity: exp of the mean negative log-likelihood, of the model.
        base_perplexity: of the model it is compared with.
        kl: the mean of KL(base || model) over tokens, in nats.
        top1: the share of tokens where both find the same token the likeliest.
    """

    tokens: int
    length: int
    stride: int
    perplexity: float
    base_perplexity: float
    kl: float
    top1: float

    @property
    def change(self) -> float:
        """Of the perplexity, relative."""
        return self.perplexity / self.base_perplexity - 1

    def to_json(self) -> dict[str, float]:
        """As plain data, with the change."""
        return {**asdict(self), "change": self.change}


def windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first new) of windows over ``count`` tokens; the first token of all is given,
    each other one is new in one window.
    """
    done = 1
    for start in range(0, count, stride):
        stop = min(start + length, count)
        if stop > done:
            yield start, stop, done
        done = max(done, stop)
        if stop == count:
            return


def compare(
    base: Logits,
    model: Logits,
    ids: Sequence[int],
    length: int = LENGTH,
    stride: int = LENGTH - 1,
    advance: Callable[[float], None] = lambda share: None,
) -> Comparison:
    """Runs both models over windows of a text.

    Raises:
        UsageError: a stride that is not from 1 to the length, or fewer than two tokens.
        VerificationError: logits that are NaN or infinite.
    """
    _check(ids, length, stride)
    totals = torch.zeros(4, dtype=torch.float64)
    for start, stop, new in windows(len(ids), length, stride):
        part = torch.tensor(ids[start:stop])
        targets = part[new - start :]
        kept = slice(new - start - 1, -1)
        wanted, found = (run(part)[kept].float().log_softmax(-1) for run in (base, model))
        pick = targets[:, None]
        totals += torch.stack(
            [
                -wanted.gather(1, pick).double().sum(),
                -found.gather(1, pick).double().sum(),
                (wanted.exp() * (wanted - found)).double().sum(),
                (wanted.argmax(-1) == found.argmax(-1)).double().sum(),
            ]
        )
        advance(stop / len(ids))
    count = len(ids) - 1
    _check_finite(totals)
    of_base, of_model, divergence, same = (totals / count).tolist()
    return Comparison(
        count, length, stride, math.exp(of_model), math.exp(of_base), max(divergence, 0.0), same
    )


def _check_finite(totals: torch.Tensor) -> None:
    finite = torch.isfinite(totals).tolist()
    if not all(finite):
        raise VerificationError(
            "the logits of the original model" if not finite[0] else "the quantized logits",
            expected="finite numbers",
            found="NaN or an infinity",
            remedy="Compile with verify='full', which names the op that they come from.",
        )


def _check(ids: Sequence[int], length: int, stride: int) -> None:
    if not 1 <= stride < length:
        raise UsageError(
            "option stride",
            expected=f"1 to {length - 1}, below the length of the windows",
            found=str(stride),
            remedy="Correct it.",
        )
    if len(ids) < 2:
        raise UsageError(
            "text",
            expected="two tokens or more, to predict the second",
            found=str(len(ids)),
            remedy="Give a longer text.",
        )


def graph_logits(graph: Graph) -> Logits:
    """A graph of a causal LM, ids [1, S] to logits [1, S, V], with its weights loaded once."""
    names = [param_name(node) for node in graph.params]
    known: dict[Weight, torch.Tensor] = {}
    for name in names:
        weight = graph.weights[name]
        if weight not in known:
            known[weight] = weight.load()
    loaded = {name: known[graph.weights[name]] for name in names}

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return interpret(graph, (ids[None],), loaded)[0][0]

    return run
