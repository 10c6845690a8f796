"""One run of a program: its requests as tasks of an event loop, which a thread of its own runs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ...errors import TilewrightError, UsageError
from ...runtime.output import Usage
from .expressions import Gen, Select
from .prompts import Outcome, Prompt, Saying, check_whole, prompt_of, total

T = TypeVar("T")

_THREADS = 64  # that encode prompts, compile forms and wait for servers


class ProgramTimeout(TilewrightError):
    """A program that took longer than it may."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What the model has just written.

    Attributes:
        text: of it.
        name: of the variable that it belongs to.
        branch: `State.path` of where that is.
    """

    text: str
    name: str
    branch: tuple[int, ...]


class Model(Protocol):
    """What fills the holes: an engine or a server. Opened and used on one event loop."""

    async def __aenter__(self) -> object:
        """Starts what it needs."""
        ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends it, when what was cancelled has ended."""
        ...

    async def generate(self, prompt: Prompt, ask: Gen, heard: Callable[[str], None]) -> Outcome:
        """Writes a text, and tells `heard` of it as it comes."""
        ...

    async def select(self, prompt: Prompt, ask: Select) -> Outcome:
        """Chooses an option."""
        ...

    async def warm(self, prompt: Prompt) -> Usage | None:
        """Computes what several prompts are about to have in common; None if that is of no use."""
        ...


class Background:
    """A model, and the thread whose event loop it is used on.

    Args:
        model: not opened yet.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._opened: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._main, name="tilewright-program", daemon=True)
        self._over = asyncio.Event()

    def open(self) -> None:
        """Starts the thread, and returns when the model is open; raises why it cannot be."""
        self._thread.start()
        self._opened.result()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begins work on the event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._opened.result())

    def close(self) -> None:
        """Ends the thread, when the model has ended what it does."""
        self._opened.result().call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _main(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:
            if self._opened.done():
                raise
            self._opened.set_exception(error)

    async def _live(self) -> None:
        events = asyncio.get_running_loop()
        events.set_default_executor(ThreadPoolExecutor(_THREADS, "tilewright-program"))
        async with self.model:
            self._opened.set_result(events)
            await self._over.wait()


class Run:
    """The requests of one call of a program.

    Args:
        timeout: seconds that the program may take from its start; None for any.
        heard: told of each piece of text that the model writes, on any thread; None for nobody.
    """

    def __init__(
        self, timeout: float | None = None, heard: Callable[[Piece], None] | None = None
    ) -> None:
        self._timeout, self._heard = timeout, heard
        self._began = time.monotonic()
        self._begun: list[Future[Any]] = []
        self._ended = False

    def start(self, background: Background) -> None:
        """Lets its time begin.

        Args:
            background: where its requests run.
        """
        self._background, self._began = background, time.monotonic()

    def fill(
        self,
        path: tuple[int, ...],
        ask: Gen | Select,
        before: Saying,
        after: Future[Usage | None] | None,
    ) -> Future[Outcome]:
        """Begins to fill a hole.

        Args:
            path: of the branch that it is in.
            ask: what to fill it with.
            before: what is said before it, the turn that it is in at the end.
            after: what has to be done before; None for nothing.
        """
        return self._begin(self._fill(path, ask, before, after))

    def warm(self, saying: Saying) -> Future[Usage | None]:
        """Begins to compute what branches have in common."""
        return self._begin(self._warm(saying))

    def wait(self, future: Future[T]) -> T:
        """What it comes to.

        Raises:
            ProgramTimeout: the program has no time left.
            TilewrightError: why it failed.
        """
        try:
            return future.result(self._left())
        except TimeoutError:
            if future.done():  # its own
                raise
            raise self._late() from None

    def finish(self) -> None:
        """Waits for all that was begun; raises what the first of it that failed failed with."""
        for future in self._begun:
            self.wait(future)

    def end(self) -> None:
        """Gives up what is not done; nothing can be begun any more."""
        self._ended = True
        for future in list(self._begun):
            future.cancel()

    @property
    def usage(self) -> Usage:
        """The sum of what was finished, and of what was computed for forks."""
        done = [future.result() for future in self._begun if future.done()]
        found = [one.usage if isinstance(one, Outcome) else one for one in done]
        return total([one for one in found if one is not None])

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._ended or self._left() == 0:
            work.close()
            raise self._over() if self._ended else self._late()
        future = self._background.start(work)
        self._begun.append(future)
        return future

    async def _fill(
        self,
        path: tuple[int, ...],
        ask: Gen | Select,
        before: Saying,
        after: Future[Usage | None] | None,
    ) -> Outcome:
        if after is not None:
            await asyncio.shield(asyncio.wrap_future(after))
        prompt = await prompt_of(before, answering=True)
        where = f"{'gen' if isinstance(ask, Gen) else 'select'} {ask.name!r}"
        if path:
            where += f" in branch {'.'.join(map(str, path))}"
        model = self._background.model
        with named(where):
            if isinstance(ask, Select):
                outcome = await model.select(prompt, ask)
                self._hear(path, ask.name, outcome.text)
                return outcome
            outcome = await model.generate(prompt, ask, partial(self._hear, path, ask.name))
            check_whole(ask, outcome)
            return outcome

    async def _warm(self, saying: Saying) -> Usage | None:
        prompt = await prompt_of(saying, answering=False)
        with named("the text before a fork"):
            return await self._background.model.warm(prompt)

    def _hear(self, path: tuple[int, ...], name: str, text: str) -> None:
        if text and self._heard is not None:
            self._heard(Piece(text, name, path))

    def _left(self) -> float | None:
        if self._timeout is None:
            return None
        return max(0.0, self._began + self._timeout - time.monotonic())

    def _late(self) -> ProgramTimeout:
        return ProgramTimeout(
            "the program",
            expected=f"an end within {self._timeout} s",
            found="that it takes longer",
            remedy="Pass a longer timeout, or ask for fewer tokens.",
        )

    def _over(self) -> UsageError:
        return UsageError(
            "the program",
            expected="a run that goes on",
            found="one that has ended, or was given up",
            remedy="Keep the state within the program, and read the result outside.",
        )


@contextmanager
def named(where: str) -> Iterator[None]:
    """Within it an error also says where it happened."""
    try:
        yield
    except TilewrightError as error:
        raise type(error)(
            f"{where}: {error.culprit}",
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error
    except Exception as error:
        error.add_note(f"in {where}")
        raise
