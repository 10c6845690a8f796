"""What an engine is measured beside: the uncompiled model, the same under torch.compile, vLLM."""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...errors import UsageError
from .reference import ReferenceModel

NAMES = ("torch.compile", "eager", "vllm")
PACKAGES = {"vllm": "vllm"}
"""What has to be installed beside torch and transformers."""
FIRST_STEPS = 4  # of torch.compile: it compiles, warms up and captures in the first three
CACHE_MULTIPLE = 64  # tokens; attention kernels want masks of an aligned length
PREFILL_TOKENS = 8192  # at once, of all prompts together: what is more costs memory, not time

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


@dataclass(frozen=True, slots=True)
class Batch:
    """One generation of several prompts.

    Attributes:
        submitted: when all prompts were there, as ``time.perf_counter`` has it.
        token_ids: of each sequence.
        stamps: when they came, by the same clock.
    """

    submitted: float
    token_ids: Sequence[Sequence[int]]
    stamps: Sequence[Sequence[float]]


class Contender(ABC):
    """A way to run a model greedily.

    Attributes:
        label: for reading.
        first_steps: seconds of the first decode steps, where they take longer than the others;
            set by ``prepare``.
        starts_together: whether all prompts of a batch get their first tokens in one step.
    """

    label: str
    first_steps: tuple[float, ...] = ()
    starts_together = False

    def prepare(self, prompts: Sequence[list[int]]) -> None:
        """Does what the first steps do once; not needed before ``run``."""
        return

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        """Decodes past any end of sequence; each token is brought to the host, and timed there."""
        found = self.run_batch([prompt], new_tokens)
        stamps = found.stamps[0]
        return Run(
            [*found.token_ids[0]], stamps[0] - found.submitted, [b - a for a, b in pairwise(stamps)]
        )

    @abstractmethod
    def run_batch(self, prompts: Sequence[list[int]], new_tokens: int) -> Batch:
        """The same for prompts of one length, all at once."""

    def close(self) -> None:
        """Gives back the memory of one batch size; it does not run at that size again."""
        return


class TorchContender(Contender):
    """One that runs the Hugging Face model step by step."""

    mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode
    starts_together = True

    def __init__(self, reference: ReferenceModel) -> None:
        self.model, self.device = reference.model, reference.device

    def run_batch(self, prompts: Sequence[list[int]], new_tokens: int) -> Batch:
        """As ``Contender`` has it; long prompts are computed in pieces."""
        tokens: list[list[int]] = []
        times: list[float] = []
        with self.mode():
            self.begin()
            synchronize(self.device)
            submitted = time.perf_counter()
            ids = torch.tensor(prompts, device=self.device)
            *pieces, ids = ids.split(max(1, PREFILL_TOKENS // len(prompts)), dim=1)
            for piece in pieces:
                self.logits(piece)
            while len(tokens) < new_tokens:
                ids = self.logits(ids).argmax(-1, keepdim=True)
                tokens.append(ids[:, 0].tolist())  # waits for the device
                times.append(time.perf_counter())
        return Batch(submitted, [*zip(*tokens, strict=True)], [times] * len(prompts))

    @abstractmethod
    def begin(self) -> None:
        """Empties the KV cache."""

    @abstractmethod
    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B, V] after these further tokens i64[B, S]; only the last row is computed."""


class Eager(TorchContender):
    """The model as it is, with the cache that transformers takes by itself."""

    label = "Hugging Face eager"

    def begin(self) -> None:
        self._cache: object = None

    def close(self) -> None:
        self.begin()

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


class Compiled(TorchContender):
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

    def prepare(self, prompts: Sequence[list[int]]) -> None:
        stamps = self.run_batch(prompts, FIRST_STEPS + 1).stamps[0]
        self.first_steps = tuple(b - a for a, b in pairwise(stamps))

    def close(self) -> None:
        del self.cache
        torch.compiler.reset()  # its graphs hold memory

    def begin(self) -> None:
        self.cache.reset()  # in place: captured graphs know its addresses
        self._past = 0

    def logits(self, ids: Tensor) -> Tensor:
        positions = torch.arange(self._past, self._past + ids.shape[1], device=self.device)
        decodes = self._past > 0 and ids.shape[1] == 1
        forward = self.step if decodes else self.model
        if decodes and self.device.type == "cuda":
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


def make_contender(
    name: str, reference: ReferenceModel, length: int, sequences: int = 1
) -> Contender:
    """The contender of a name in ``NAMES``, for sequences up to a length in tokens.

    Args:
        name: of one that is not ``absent``.
        reference: the model.
        length: in tokens, prompt and new ones together.
        sequences: the most at once.
    """
    if name == "vllm":
        from .vllm_contender import VLLM

        return VLLM(reference, length, sequences)
    return Eager(reference) if name == "eager" else Compiled(reference, length)


def absent(name: str) -> bool:
    """Whether a contender cannot run because its package is not installed."""
    return name in PACKAGES and find_spec(PACKAGES[name]) is None


def parse_names(text: str, names: Sequence[str] = NAMES) -> tuple[str, ...]:
    """Contenders from a comma list, each once.

    Raises:
        UsageError: a name that is none of ``names``.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in found:
        if name not in names:
            raise UsageError(
                "option --compare",
                expected=f"a comma list of {', '.join(names)}",
                found=repr(name),
                remedy=f"Write --compare {','.join(names)}, one of them, or leave it out.",
            )
    return found


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
