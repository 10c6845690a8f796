"""Programs as they are called: once, many at a time, or with their text as it comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from inspect import signature
from queue import SimpleQueue
from typing import Any

from ...errors import UsageError
from ...runtime.engine import CausalLMEngine
from ...runtime.output import Usage
from .opening import opened
from .running import Background, Piece, Run, named
from .state import State

_RESERVED = ("api_key", "model", "timeout")
_AT_ONCE = 64  # runs of a batch


@dataclass(frozen=True, slots=True)
class Result:
    """What a run has come to.

    Attributes:
        variables: by name a text, or a list behind a join.
        outcomes: by name how it ended and what it took, in lists likewise.
        value: what the program's function returned.
        usage: tokens of all requests, and of what was computed once for a fork.
    """

    variables: Mapping[str, Any]
    outcomes: Mapping[str, Any]
    value: Any
    usage: Usage
    _messages: list[dict[str, str]]
    _text: str

    def __getitem__(self, name: str) -> Any:
        """The text of a variable, or a list of them. UsageError where none is called so."""
        if name in self.variables:
            return self.variables[name]
        raise UsageError(
            f"variable {name!r}",
            expected=f"one that the program has set: {', '.join(self.variables) or 'none'}",
            found="no such name",
            remedy="Name it in a gen or select, and join the branches that set it.",
        )

    def messages(self) -> list[dict[str, str]]:
        """The turns as {"role": …, "content": …}; none of a plain text."""
        return self._messages

    def text(self) -> str:
        """All that was said, turns set apart by an empty line."""
        return self._text


class Stream:
    """A run whose text comes piece by piece; of branches mixed, as it comes.

    Leaving the loop over it, or `close`, gives the run up.

    Args:
        call: runs the program, on a thread of its own.

    Attributes:
        result: of the run, once the loop has ended.
    """

    def __init__(self, call: Callable[[Run], Result], timeout: float | None) -> None:
        self.result: Result | None = None
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._run = Run(timeout, self._pieces.put)
        self._found: Future[Result] = Future()
        self._thread = threading.Thread(target=self._work, args=(call,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Piece]:
        """The pieces; at the end raises what the run failed with."""
        try:
            while (piece := self._pieces.get()) is not None:
                yield piece
            self.result = self._found.result()
        finally:
            self._pieces.put(None)  # for whoever loops over it again
            self.close()

    def close(self) -> None:
        """Gives up what is not done, and waits for the program to notice."""
        self._run.end()
        self._thread.join()

    def _work(self, call: Callable[[Run], Result]) -> None:
        try:
            self._found.set_result(call(self._run))
        except BaseException as error:
            self._found.set_exception(error)
        finally:
            self._pieces.put(None)


class Program:
    """A function that says things to a state, its first argument. `program` makes it.

    Where it runs is an engine, or the URL of a server that speaks OpenAI's API. Its functions take,
    beside the program's own arguments:

        api_key: for a server.
        model: its name there; None for the one that the server has.
        timeout: seconds that a run may take; None for any. It is looked at where the program says
            something or waits.

    Raises:
        UsageError: an argument of one of these names.
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body
        self.__name__, self.__doc__ = getattr(body, "__name__", "program"), body.__doc__
        taken = [name for name in signature(body).parameters if name in _RESERVED]
        if taken:
            raise UsageError(
                f"program {self.__name__}",
                expected=f"arguments of other names than {', '.join(_RESERVED)}",
                found=", ".join(taken),
                remedy="Rename them: `run` has these itself.",
            )

    def __call__(self, state: State, /, **arguments: Any) -> Any:
        """As a part of another program: says it all to that one's state."""
        return self.body(state, **arguments)

    def run(
        self,
        on: CausalLMEngine | str,
        /,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float | None = None,
        **arguments: Any,
    ) -> Result:
        """Runs it once, and waits.

        Raises:
            UsageError: no engine or server; what the program does against the rules.
            ProgramTimeout: it takes too long.
            TilewrightError: why a variable cannot be filled, with its name and branch.
        """
        with opened(on, api_key, model) as background:
            return self._call(background, Run(timeout), arguments)

    def run_batch(
        self,
        on: CausalLMEngine | str,
        many: Sequence[Mapping[str, Any]],
        /,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float | None = None,
        at_once: int = _AT_ONCE,
    ) -> list[Result]:
        """Runs it once for each set of arguments, up to `at_once` of them together.

        Raises:
            as `run`; the first that fails ends the others, and the error says which it was.
        """
        if not many:
            return []
        runs = [Run(timeout) for _ in many]

        def call(place: int) -> Result:
            with named(f"run {place}"):
                return self._call(background, runs[place], many[place])

        with (
            opened(on, api_key, model) as background,
            ThreadPoolExecutor(max(1, min(at_once, len(many))), "tilewright-batch") as pool,
        ):
            futures = [pool.submit(call, place) for place in range(len(many))]
            try:
                ended = wait(futures, return_when=FIRST_EXCEPTION).done
                for future in futures:
                    if future in ended:
                        future.result()  # raises the first failure
                return [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for run in runs:
                    run.end()

    def stream(
        self,
        on: CausalLMEngine | str,
        /,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float | None = None,
        **arguments: Any,
    ) -> Stream:
        """Runs it once; what the model writes can be read as it comes.

        Raises:
            as `run`, in the loop over it.
        """

        def call(run: Run) -> Result:
            with opened(on, api_key, model) as background:
                return self._call(background, run, arguments)

        return Stream(call, timeout)

    def _call(self, background: Background, run: Run, arguments: Mapping[str, Any]) -> Result:
        run.start(background)
        try:
            state = State(run)
            value = self.body(state, **arguments)
            run.finish()
            variables = {name: state[name] for name in state.names}
            outcomes = {name: state.outcome(name) for name in state.names}
            said = (state.messages(), state.text())
            return Result(variables, outcomes, value, run.usage, *said)
        finally:
            run.end()


def program(body: Callable[..., Any]) -> Program:
    """Makes a function a program: `@program` above `def essay(s, topic): …`.

    Raises:
        UsageError: arguments of names that `run` has itself.
    """
    return Program(body)
