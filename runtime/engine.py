"""Engines of causal LMs, and from an image to a running engine: what `tw.load` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from ..errors import KernelError, UsageError
from ..formats.tokenizer import Tokenizer
from .base_engine import Engine, RunningEngine
from .beam_search import BeamSearcher
from .beams import BeamCompletion, BeamSearchParams
from .bucketing import Batching, check_batching, length_buckets
from .counters import Counters
from .executor import PagedExecutor, SlotExecutor
from .folder import load_image
from .grammar import Grammars
from .image import EngineImage, LMConfig
from .loop import GenerationLoop
from .memory import check_swap_space, pool_pages, prefill_tokens
from .metrics import Metrics
from .module_engine import ModuleEngine
from .output import Completion, Delta
from .params import SamplingParams
from .pool import KVPool, PagedPool
from .refit import refit, refit_refused
from .runner import ProgramRunner
from .sampling import Sampler
from .scheduler import ROWS, Scheduler
from .sliding import ENDLESS
from .sliding_pool import SlidingPool
from .slot_pool import SlotPool
from .step import Step, StepExecutor
from .trace import Tracer, tracing

Prompts: TypeAlias = "str | Sequence[str] | Sequence[Sequence[int]]"


class CausalLMEngine(RunningEngine):
    """A compiled causal LM: continuous generation over a KV cache."""

    def __init__(self, image: EngineImage) -> None:
        super().__init__(image)
        assert image.lm is not None
        self.config: LMConfig = image.lm
        tokens = prefill_tokens(self.runner.program, self.config, self.runner.device)
        most = tokens + -(-self.config.max_batch_size // ROWS) * ROWS  # decodes beside prompts
        self.executor, self.pool = _memory(self.config, self.runner, self.decode_runner, most)
        scheduler = Scheduler(
            self.pool,
            self.executor.capabilities,
            max_prefill_tokens=tokens,
            max_num_seqs=self.config.max_batch_size,
            buckets=length_buckets(self.config),
        )
        eos, vocab = self.config.eos_token_ids, self.config.vocab_size
        longest = self.config.max_model_len if self.config.window is None else ENDLESS
        grammars = Grammars(image.tokenizer, eos, vocab) if image.tokenizer else None
        self.loop = GenerationLoop(
            self.executor,
            self.pool,
            scheduler,
            Sampler(),
            image.tokenizer,
            eos,
            longest,
            vocab,
            grammars,
        )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None when it came without one."""
        return self.image.tokenizer

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes, so that the next prompt is computed whole."""
        with self.loop.lock:
            self.pool.clear_cache()

    def warm_up(self) -> None:
        """Captures the graphs of all decode steps and sets libraries up, so that no request waits
        for that; what a GPU has no part in needs none.

        Raises:
            CapacityError: the device lacks memory for it.
        """
        with self.loop.lock:
            self.loop.settle()
            if isinstance(self.executor, PagedExecutor):
                grammars = self.loop.grammars
                self.executor.warm_up(None if grammars is None else grammars.words)

    @property
    def counters(self) -> Counters:
        """Tokens computed and steps run so far."""
        return self.loop.counters

    @cached_property
    def metrics(self) -> Metrics:
        """How long requests take, and what for (`prometheus.py` exports it). Counts requests from
        when it is first asked for.
        """
        return Metrics(self.loop, self.image.name)

    def trace(self, path: str | Path) -> AbstractContextManager[Tracer]:
        """Within `with engine.trace(path):` requests and steps are traced to a file, for
        ui.perfetto.dev or chrome://tracing. It appears at the end, whole, after Ctrl-C too.
        """
        return tracing(self.loop, path)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits f32[B, S, V] for token ids i64[B, S], or f32[S, V] for i64[S].

        Raises:
            UsageError: ids of another type, out of the vocabulary, or longer than the context,
                unless they slide through a window.
            CapacityError: requests that are running leave no room in the KV memory.
        """
        rows = _rows(token_ids)
        if (
            rows.shape[1] > self.loop.max_model_len
            or not 0 <= int(rows.min()) <= int(rows.max()) < self.config.vocab_size
        ):
            raise UsageError(
                "token_ids",
                expected=f"at most {self.config.max_model_len} ids "
                f"from 0 to {self.config.vocab_size - 1}",
                found=f"{rows.shape[1]} ids from {int(rows.min())} to {int(rows.max())}",
                remedy="Shorten the sequence, or compile with a larger max_model_len.",
            )
        with self.loop.lock:
            self.loop.settle()
            logits = torch.stack([score(self.executor, self.pool, row.long()) for row in rows])
        return logits[0] if token_ids.dim() == 1 else logits

    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completions of the prompts, ``n`` of them a prompt, in order.

        Args:
            prompts: a str, several, or lists of token ids.
            params: for all prompts, or one each.

        Raises:
            UsageError: an empty prompt, one that is longer than the context, or text without a
                tokenizer.
            CapacityError: a prompt that can never fit the KV memory.
        """
        found = self.loop.generate([self._encode(prompt) for prompt in _listed(prompts)], params)
        return [completion for completions in found for completion in completions]

    def beam_search(
        self,
        prompts: Prompts,
        *,
        beam_width: int = 4,
        max_new_tokens: int = 256,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> list[list[BeamCompletion]]:
        """The ``beam_width`` likeliest completions of each prompt, best first, by the rules of
        Hugging Face's ``generate(num_beams=…)``. Their steps alternate with those of other
        requests.

        Args:
            prompts: a str, several, or lists of token ids.
            beam_width, max_new_tokens, length_penalty, early_stopping: see ``BeamSearchParams``.

        Raises:
            UsageError: as ``generate``, or more beams than max_batch_size.
            CapacityError: the beams outgrow the KV memory.
        """
        params = BeamSearchParams(beam_width, max_new_tokens, length_penalty, early_stopping)
        searcher = BeamSearcher(self.loop, self.config.eos_token_ids, self.tokenizer)
        return searcher.search([self._encode(prompt) for prompt in _listed(prompts)], params)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """The completion of one prompt as it comes; closing the iterator frees its memory."""
        return self.loop.stream(self._encode(prompt), params)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]], **variables: object) -> list[int]:
        """Token ids of a conversation in the model's chat template, which also reads `variables`.

        Raises:
            UsageError: the model has no tokenizer or no chat template, or messages of another
                form.
        """
        tokenizer = self._needs_tokenizer()
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise UsageError(
                    "messages",
                    expected="a list of {'role': …, 'content': …}",
                    found=repr(message)[:60],
                    remedy="Give each message its role (user, assistant, system) and its content.",
                )
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **variables)
        return tokenizer.encode(text, add_special_tokens=False)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._needs_tokenizer().encode(prompt)
        if isinstance(prompt, Sequence):
            return [*prompt]
        raise _no_prompt(prompt)

    def _needs_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(
                f"model {self.image.name}",
                expected="a tokenizer, for text",
                found="none",
                remedy="Pass token ids, or compile from files that include a tokenizer.",
            )
        return self.tokenizer


def score(executor: StepExecutor, pool: KVPool, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits f32[S, V] of every position of one sequence i64[S], computed in as few steps as the
    pool takes.
    """
    found: list[torch.Tensor] = []
    pool.add(_SCORED)
    try:
        for start in range(0, len(token_ids), pool.max_append):
            ids = token_ids[start : start + pool.max_append]
            slots, copies = pool.append(_SCORED, len(ids))
            if copies:
                executor.copy_pages(*zip(*copies, strict=True))
            rows = torch.arange(len(ids))
            lens = torch.tensor([start + len(ids) - pool.gap(_SCORED)], dtype=torch.int32)
            starts = torch.tensor([0, len(ids)], dtype=torch.int32)
            tables = pool.block_tables([_SCORED])
            step = Step(ids, start + rows, starts, lens, torch.as_tensor(slots), tables, rows)
            # A copy: an executor may write the next step's logits to the same memory.
            found.append(executor.run(step).to("cpu", copy=True))
    finally:
        pool.free(_SCORED)
    return found[0] if len(found) == 1 else torch.cat(found)


_SCORED = -1  # requests number their sequences from 0


def load(
    path: str | Path,
    checkpoint: str | Path | None = None,
    *,
    prefix_caching: bool | None = None,
    swap_space: float | None = None,
    batching: Batching = "auto",
) -> Engine:
    """An engine from its folder, every file's hash checked. Runs no code from the folder.

    Args:
        path: of the folder.
        checkpoint: where the checkpoint is that the engine refers to (``save(…,
            weights="reference")``), if it has been moved; its files' hashes are checked too.
        prefix_caching, swap_space: as in `KVCacheConfig`; None as it was compiled.
        batching: which prompts a slot cache (ONNX Runtime, or kv_cache="static") computes together:
            "bucketed", those of about one length, padded to the longest; "continuous", each alone,
            without padding; "auto" is "bucketed". `engine.counters.padding_share` says what it
            costs. A paged cache mixes prompts of all lengths without padding.

    Raises:
        EngineError: no engine, a damaged one, one made for another version or device, or a
            checkpoint that is missing or has changed.
        UsageError: a checkpoint for an engine that refers to none, or another batching.
        UnsupportedError: "bucketed" for a paged cache.
        CapacityError: the weights do not fit the device.
    """
    image = load_image(path, checkpoint)
    lm = image.lm
    if lm is not None and prefix_caching is not None:
        lm = replace(lm, prefix_caching=prefix_caching)
    if lm is not None and swap_space is not None:
        check_swap_space("swap_space", swap_space)
        lm = replace(lm, swap_space=float(swap_space))
    if lm is not None:
        lm = replace(lm, batching=check_batching(batching, lm.kv_cache))
    return start(replace(image, lm=lm))


def start(image: EngineImage) -> Engine:
    """Loads weights and kernels of an image; EngineError when this machine cannot run it.

    Kernels for another GPU, and those that the driver does not take, are compiled here, with a
    warning, where Triton is installed.
    """
    image = refit(image)
    kind = CausalLMEngine if image.kind == "causal_lm" else ModuleEngine
    try:
        return kind(image)
    except KernelError as error:
        refused = error.with_traceback(None)  # whose frames hold the weights just loaded
    return kind(refit_refused(image, refused))


def _memory(
    config: LMConfig, runner: ProgramRunner, decode: ProgramRunner | None, tokens: int
) -> tuple[PagedExecutor | SlotExecutor, KVPool]:
    if config.kv_cache == "slot":
        slots = SlotPool(config.max_batch_size, config.max_model_len)
        return SlotExecutor(runner, config.max_batch_size), slots
    sizes = (config.max_batch_size, config.most_pages * config.page_size, tokens)
    executor = PagedExecutor(runner, *sizes, decode=decode)
    programs = tuple(one.program for one in (runner, decode) if one is not None)
    page_bytes = executor.bytes_per_token * config.page_size
    pages = pool_pages(config, page_bytes, programs, runner.device, tokens)
    prefix_caching, host = config.prefix_caching, int(config.swap_space * 2**30 / page_bytes)
    if config.sliding is not None:
        pool: PagedPool = SlidingPool(
            pages, config.sliding, prefix_caching=prefix_caching, host_pages=host
        )
    else:
        pool = PagedPool(pages, config.page_size, prefix_caching=prefix_caching, host_pages=host)
    return executor, pool


def _listed(prompts: Prompts) -> list[str | Sequence[int]]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise _no_prompt(prompts)
    return list(prompts)


def _no_prompt(found: object) -> UsageError:
    return UsageError(
        "the prompt",
        expected="text, or a list of token ids for each prompt",
        found=repr(found)[:60],
        remedy="For one prompt of token ids write generate([[1, 2, 3]]).",
    )


def _rows(token_ids: object) -> torch.Tensor:
    """Token ids as [B, S]; UsageError for all but integer tensors of one or two axes."""
    if isinstance(token_ids, torch.Tensor):
        rows = token_ids[None] if token_ids.dim() == 1 else token_ids
        if rows.dim() == 2 and rows.dtype in (torch.int64, torch.int32) and rows.numel():
            return rows
        found = f"{token_ids.dtype} {list(token_ids.shape)}"
    else:
        found = repr(token_ids)[:60]
    raise UsageError(
        "token_ids",
        expected="a tensor of integers [B, S] or [S], at least one token",
        found=found,
        remedy="Pass the ids that the tokenizer gives, as a tensor.",
    )
