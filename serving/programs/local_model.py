"""An engine of this process as what fills a program's holes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from types import TracebackType

from ...errors import UsageError
from ...runtime.engine import CausalLMEngine
from ...runtime.output import Completion, Usage
from ...runtime.params import SamplingParams
from ..worker import Worker
from .expressions import Gen, Select
from .prompts import Outcome, Prompt, total


class LocalModel:
    """An engine, whose steps a thread runs while it is open. Others may use it meanwhile.

    Args:
        engine: with a tokenizer.

    Raises:
        UsageError: it has none.
    """

    def __init__(self, engine: CausalLMEngine) -> None:
        if engine.tokenizer is None:
            raise UsageError(
                f"model {engine.image.name}",
                expected="a tokenizer: programs are made of text",
                found="none",
                remedy="Compile from files that include a tokenizer.",
            )
        self._tokenizer, self._loop = engine.tokenizer, engine.loop
        self._worker = Worker(engine.loop, most=sys.maxsize)

    async def __aenter__(self) -> LocalModel:
        """Starts the steps."""
        self._worker.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends them, when no request is left: those given up have freed their memory then."""
        await self._worker.close()

    async def generate(self, prompt: Prompt, ask: Gen, heard: Callable[[str], None]) -> Outcome:
        """Writes a text, and tells `heard` of it as it comes.

        Raises:
            UsageError, CapacityError: a prompt or parameters that the engine does not take.
        """
        ids = await asyncio.to_thread(self._encode, prompt)
        one = await self._complete(ids, ask.params, heard)
        return Outcome(one.text, one.finish_reason, one.usage)

    async def select(self, prompt: Prompt, ask: Select) -> Outcome:
        """The option with the highest mean log-probability of its tokens, the first of equals.

        A tokenizer may join the end of the prompt with the beginning of an option: what is scored
        begins at the first token that depends on the option, for all of them.

        Raises:
            UsageError, CapacityError: a prompt that the engine does not take, or none.
        """
        texts = ("", *ask.options)
        context, *continued = await asyncio.to_thread(
            lambda: [self._encode(prompt, text) for text in texts]
        )
        start = min(_equal(context, ids) for ids in continued)
        if start == 0 or min(map(len, continued)) == start:
            raise UsageError(
                "the options",
                expected="a token before them, and one that depends on each",
                found="an empty prompt" if start == 0 else "an option that adds no token",
                remedy="Say something before, or write the options out.",
            )
        usages = [await self._compute(context[:start])]
        scoring = SamplingParams(max_new_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start)
        tasks = [asyncio.ensure_future(self._complete(ids, scoring)) for ids in continued]
        try:
            scored = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        usages += [one.usage for one in scored]
        means = {text: _mean(one, start) for text, one in zip(ask.options, scored, strict=True)}
        usage = total([one for one in usages if one is not None])
        return Outcome(max(means, key=means.__getitem__), "stop", usage, means)

    async def warm(self, prompt: Prompt) -> Usage | None:
        """Computes it, for the prefix cache to have it; None where that keeps nothing of it."""
        return await self._compute(await asyncio.to_thread(self._encode, prompt))

    async def _compute(self, ids: list[int]) -> Usage | None:
        if not self._loop.scheduler.reuses or len(ids) < self._loop.pool.page_size:
            return None
        used = (await self._complete(ids, SamplingParams(max_new_tokens=1))).usage
        return Usage(used.prompt_tokens, 0, used.cached_tokens)  # nobody has asked for its token

    async def _complete(
        self,
        ids: list[int],
        params: SamplingParams,
        heard: Callable[[str], None] = lambda text: None,
    ) -> Completion:
        stream = await self._worker.submit(ids, params)
        try:
            async for deltas in stream:
                for delta in deltas:
                    heard(delta.text)
        finally:
            stream.cancel()
        (one,) = stream.completions
        return one

    def _encode(self, prompt: Prompt, more: str = "") -> list[int]:
        """Token ids, as the server has them of the same messages or text."""
        if prompt.turns is None:
            return self._tokenizer.encode((prompt.begun or "") + more)
        answering = prompt.begun is not None
        text = self._tokenizer.apply_chat_template(prompt.messages, answering)
        return self._tokenizer.encode(text + (prompt.begun or "") + more, add_special_tokens=False)


def _equal(left: Sequence[int], right: Sequence[int]) -> int:
    """How many of the first tokens are equal."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _mean(scored: Completion, start: int) -> float:
    found = [one.logprob for one in (scored.prompt_logprobs or ())[start:] if one is not None]
    return sum(found) / len(found)
