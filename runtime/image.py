"""What an engine consists of: the same in memory and in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch

from ..codegen.program import Json, Program
from ..formats.tokenizer import Tokenizer
from .sliding import Sliding
from .structure import Structure

FORMAT_VERSION = 2
Kind = Literal["causal_lm", "module"]
Batching = Literal["auto", "bucketed", "continuous"]


class LoadableWeight(Protocol):
    """A weight that can be had as a tensor: an expression, or a tensor of the folder."""

    def load(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class LMConfig:
    """What running a causal LM needs to know beyond its Program.

    Attributes:
        vocab_size: token ids are below it.
        max_model_len: longest sequence, prompt and completion together, in tokens.
        max_batch_size: most sequences at once.
        page_size: tokens a page of the paged cache; a slot cache has whole sequences as pages.
        kv_cache: the form of the cache.
        eos_token_ids: tokens that end a completion.
        memory_fraction: of the device's memory that weights, cache and steps may take together.
        prefix_caching: whether pages of prompts outlive their requests; a slot cache keeps none.
        swap_space: GiB of the host's memory for cached pages that have to make room.
        batching: which prompts a slot cache computes together; not kept in the folder.
        window: the latest tokens that one sees, itself included; then a sequence has no end. None
            for all of `max_model_len`.
        sinks: first tokens that are seen beside a window.
    """

    vocab_size: int
    max_model_len: int
    max_batch_size: int
    page_size: int
    kv_cache: Literal["paged", "slot"]
    eos_token_ids: tuple[int, ...]
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    swap_space: float = 0.0
    batching: Batching = "auto"
    window: int | None = None
    sinks: int = 0

    @property
    def sliding(self) -> Sliding | None:
        """What a sequence keeps, where that is not all of it."""
        if self.window is None:
            return None
        return Sliding.of(self.page_size, self.window, self.sinks)

    @property
    def most_pages(self) -> int:
        """Pages that a sequence holds at most."""
        if self.sliding is not None:
            return self.sliding.most_pages
        return -(-self.max_model_len // self.page_size)


@dataclass(frozen=True, slots=True)
class Signature:
    """How a plain module is called.

    Attributes:
        call: structure of ``(args, kwargs)`` over the Program's inputs.
        arguments: names of forward()'s positional parameters.
        output: structure of the result over the Program's outputs.
        paths: how a user names each input, for messages.
        ranges: (symbol, least, greatest or None) of each dynamic size.
    """

    call: Structure
    arguments: tuple[str, ...]
    output: Structure
    paths: tuple[str, ...]
    ranges: tuple[tuple[str, int, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class DecodePart:
    """What runs steps in which every sequence brings one token.

    Attributes:
        program: over the same weights and caches as the general one.
        graphs: (pass name, graph text) from where it leaves the general graph, for reading.
    """

    program: Program
    graphs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineImage:
    """An engine, not yet running.

    Attributes:
        name: of the model.
        kind: a causal LM generates; a module is called.
        target: the device that it was compiled for, as text.
        backend: that it was compiled with.
        program: what runs: any mix of tokens.
        files: artifacts of the programs by path.
        weights: by the names that the Program uses.
        graphs: (pass name, graph text) in order, for reading.
        report: what compiling found, as plain data.
        lm: for causal LMs.
        signature: for modules.
        tokenizer: of a causal LM that has one.
        decode: for decode steps; None where the general program runs them too.
    """

    name: str
    kind: Kind
    target: str
    backend: str
    program: Program
    files: Mapping[str, bytes]
    weights: Mapping[str, LoadableWeight]
    graphs: tuple[tuple[str, str], ...] = ()
    report: Mapping[str, Json] = field(default_factory=dict)
    lm: LMConfig | None = None
    signature: Signature | None = None
    tokenizer: Tokenizer | None = None
    decode: DecodePart | None = None

    @property
    def decoding(self) -> EngineImage:
        """The image as decode steps see it: with the Program and graphs that run them."""
        if self.decode is None:
            return self
        return replace(self, program=self.decode.program, graphs=self.decode.graphs, decode=None)
