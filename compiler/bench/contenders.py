"""What an engine is measured beside: the uncompiled model, and the same under torch.compile."""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...errors import UsageError
from .reference import ReferenceModel

NAMES = ("torch.compile", "eager")
FIRST_STEPS = 4  # of torch.compile: it compiles, warms up and captures in the first three
CACHE_MULTIPLE = 64  # tokens; attention kernels want masks of an aligned length

Forward: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One generation.

    Attributes:
        token_ids: what came out.
        ttft: seconds from the prompt to the first token.
        itl: seconds of each token after it.
    """

    token_ids: list[int]
    ttft: float
    itl: list[float]


class Contender(ABC):
    """A way to run a Hugging Face model, batch 1, greedily.

    Attributes:
        label: for reading.
        first_steps: seconds of the first decode steps, where they take longer than the others;
            set by ``prepare``.
    """

    label: str
    mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode

    def __init__(self, reference: ReferenceModel) -> None:
        self.model, self.device = reference.model, reference.device
        self.first_steps: tuple[float, ...] = ()

    def prepare(self, prompt: list[int]) -> None:
        """Does what the first steps do once; not needed before ``run``."""
        return

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        """Decodes past any end of sequence; each token is brought to the host, and timed there."""
        tokens: list[int] = []
        times: list[float] = []
        with self.mode():
            self.begin()
            synchronize(self.device)
            last = time.perf_counter()
            ids = torch.tensor([prompt], device=self.device)
            while len(tokens) < new_tokens:
                ids = self.logits(ids).argmax(-1, keepdim=True)
                tokens.append(int(ids))  # waits for the device
                now = time.perf_counter()
                times.append(now - last)
                last = now
        return Run(tokens, times[0], times[1:])

    @abstractmethod
    def begin(self) -> None:
        """Empties the KV cache."""

    @abstractmethod
    def logits(self, ids: Tensor) -> Tensor:
        """Logits [1, V] after these further tokens i64[1, S]; only the last row is computed."""


class Eager(Contender):
    """The model as it is, with the cache that transformers takes by itself."""

    label = "Hugging Face eager"

    def begin(self) -> None:
        self._cache: object = None

    def logits(self, ids: Tensor) -> Tensor:
        found = self.model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = found.past_key_values
        logits: Tensor = found.logits[:, -1]
        return logits


def torch_compile(forward: Forward) -> Forward:
    """``torch.compile`` at its best for decoding: one graph, replayed as a CUDA graph."""
    compiled: Forward = torch.compile(
        forward, mode="reduce-overhead", fullgraph=True, dynamic=False
    )
    return compiled


class Compiled(Contender):
    """A compiled decode step over a static cache; the prompt runs eagerly, as ``generate`` does it.

    Args:
        reference: the model; left as it is.
        length: of the cache: prompt and new tokens together.
        compiler: makes the step of the model's forward.
    """

    label = "torch.compile reduce-overhead"
    mode = torch.no_grad  # inference tensors cannot be the static addresses of a captured graph

    def __init__(
        self,
        reference: ReferenceModel,
        length: int,
        compiler: Callable[[Forward], Forward] = torch_compile,
    ) -> None:
        from transformers import StaticCache

        super().__init__(reference)
        # The first steps may be more than the new tokens that are measured.
        rounded = -(-(length + FIRST_STEPS) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        self.cache = StaticCache(config=self.model.config, max_cache_len=rounded)
        self.step = compiler(self.model.forward)
        # Later releases of transformers read the position off the cache itself.
        self._named = "cache_position" in inspect.signature(self.model.forward).parameters
        self._past = 0

    def prepare(self, prompt: list[int]) -> None:
        self.first_steps = tuple(self.run(prompt, FIRST_STEPS + 1).itl)

    def begin(self) -> None:
        self.cache.reset()  # in place: captured graphs know its addresses
        self._past = 0

    def logits(self, ids: Tensor) -> Tensor:
        positions = torch.arange(self._past, self._past + ids.shape[1], device=self.device)
        forward = self.step if self._past else self.model
        if self._past and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # the step before is not looked at again
        found = forward(
            input_ids=ids,
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **({"cache_position": positions} if self._named else {}),
        )
        self._past += ids.shape[1]
        logits: Tensor = found.logits[:, -1]
        return logits


def make_contender(name: str, reference: ReferenceModel, length: int) -> Contender:
    """The contender of a name in ``NAMES``, for sequences up to a length in tokens."""
    return Eager(reference) if name == "eager" else Compiled(reference, length)


def parse_names(text: str) -> tuple[str, ...]:
    """Contenders from a comma list, each once.

    Raises:
        UsageError: a name that is none of ``NAMES``.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in NAMES:
            raise UsageError(
                "option --compare",
                expected=f"a comma list of {', '.join(NAMES)}",
                found=repr(name),
                remedy=f"Write --compare {','.join(NAMES)}, one of them, or leave it out.",
            )
    return names


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
