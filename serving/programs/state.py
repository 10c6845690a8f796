"""What a program writes to, and its branches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Self, TypeAlias

from ...errors import UsageError
from ...runtime.output import Usage
from .expressions import Gen, Part, Role, Select, Turn
from .prompts import Hole, Outcome, Said, Saying
from .running import Run

Variable: TypeAlias = "Hole | list[Variable] | None"
"""What a name stands for: after a join one for each branch, None where it did not set the name."""


class State:
    """What is said so far, and the variables in it. See the package for what the rules are.

    Attributes:
        path: which branch of which branch it is; () for what `run` begins with.
    """

    def __init__(
        self,
        run: Run,
        path: tuple[int, ...] = (),
        *,
        parent: State | None = None,
        after: Future[Usage | None] | None = None,
    ) -> None:
        self.path = path
        self._run, self._parent, self._after = run, parent, after
        self._said: Saying = () if parent is None else parent._said
        self._variables: dict[str, Variable] = {} if parent is None else dict(parent._variables)
        self._inherited = frozenset(self._variables)
        self._joined = False

    def __iadd__(self, what: Turn | Part) -> Self:
        """Says something; what the model has to fill begins, and is not waited for.

        Raises:
            UsageError: text outside of turns in a program that has turns, or turns in a plain text;
                a name that is set already; a branch that has been joined.
        """
        self._check_open()
        if isinstance(what, Turn):
            self._say(what.role, what.parts)
        elif isinstance(what, str | Gen | Select):
            self._say(None, (what,))
        else:
            raise UsageError(
                "what is said",
                expected="a text, gen, select, system, user or assistant",
                found=repr(what)[:80],
                remedy="Write other things as text, with an f-string.",
            )
        return self

    def __getitem__(self, name: str) -> Any:
        """The text that a variable was filled with, when it is; a list of them behind a join.

        Raises:
            UsageError: no such variable is set.
            TilewrightError: why it could not be filled.
        """
        return self._read(name, lambda outcome: outcome.text)

    def outcome(self, name: str) -> Any:
        """As `s[name]`, but for the text how it ended, and what it took."""
        return self._read(name, lambda outcome: outcome)

    def __contains__(self, name: object) -> bool:
        """Whether the variable is set, filled or not."""
        return name in self._variables

    @property
    def names(self) -> list[str]:
        """The variables that are set, in order."""
        return list(self._variables)

    def fork(self, count: int) -> list[State]:
        """So many branches that go on from here, each for itself. What they have in common is
        computed once.

        Raises:
            UsageError: fewer than one, or of a branch that has been joined.
        """
        self._check_open()
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UsageError(
                "fork",
                expected="a number of branches, 1 or more",
                found=repr(count)[:80],
                remedy="Fork into as many branches as there are things to say.",
            )
        after = self._run.warm(self._said) if count > 1 and self._said else self._after
        paths = [(*self.path, index) for index in range(count)]
        return [State(self._run, path, parent=self, after=after) for path in paths]

    def join(self, branches: Iterable[State]) -> None:
        """Takes the variables of branches, as lists, and ends the branches.

        Raises:
            UsageError: no branches of this state, joined already, or a name that is set here.
        """
        self._check_open()
        joined = list(branches)
        for branch in joined:
            if not isinstance(branch, State) or branch._parent is not self:
                raise UsageError(
                    "join",
                    expected="branches that this state was forked into",
                    found=f"branch {branch.path}" if isinstance(branch, State) else repr(branch),
                    remedy="Join each fork where it was made, the inner one first.",
                )
            branch._check_open()
        for branch in joined:
            branch._joined = True
        own = [name for branch in joined for name in branch.names if name not in branch._inherited]
        for name in dict.fromkeys(own):
            self._check_new(name)
            self._variables[name] = [branch._own(name) for branch in joined]

    def text(self) -> str:
        """All that is said, with what was filled in; turns are set apart by an empty line."""
        return "\n\n".join(said.text(self._wait_text) for said in self._said)

    def messages(self) -> list[dict[str, str]]:
        """The turns as {"role": …, "content": …}; none of a plain text."""
        return [
            {"role": said.role, "content": said.text(self._wait_text)}
            for said in self._said
            if said.role is not None
        ]

    def _say(self, role: Role | None, parts: Sequence[Part]) -> None:
        before, last = self._said, self._said[-1] if self._said else None
        if last is not None and (last.role is None) != (role is None):
            raise UsageError(
                "what is said",
                expected="turns alone, or text alone",
                found="text beside turns" if role is None else f"{role}(…) behind plain text",
                remedy="Put each text into system(…), user(…) or assistant(…), or none.",
            )
        said = Said(role, ())
        if role is None and last is not None:  # a plain text is one
            before, said = before[:-1], last
        for part in parts:
            filled = part if isinstance(part, str) else self._hole(part, (*before, said))
            said = Said(role, (*said.parts, filled))
        self._said = (*before, said)

    def _hole(self, ask: Gen | Select, before: Saying) -> Hole:
        self._check_new(ask.name)
        hole = Hole(ask.name, self._run.fill(self.path, ask, before, self._after))
        self._variables[ask.name] = hole
        return hole

    def _own(self, name: str) -> Variable:
        return None if name in self._inherited else self._variables.get(name)

    def _read(self, name: str, of: Callable[[Outcome], Any]) -> Any:
        if name not in self._variables:
            raise UsageError(
                f"variable {name!r}",
                expected=f"one that is set here: {', '.join(self._variables) or 'none is yet'}",
                found="no such name",
                remedy="Name it in a gen or select before, and join the branches that set it.",
            )
        return self._value(self._variables[name], of)

    def _value(self, variable: Variable, of: Callable[[Outcome], Any]) -> Any:
        if isinstance(variable, Hole):
            return of(self._run.wait(variable.filled))
        return variable and [self._value(one, of) for one in variable]

    def _wait_text(self, hole: Hole) -> str:
        return self._run.wait(hole.filled).text

    def _check_new(self, name: str) -> None:
        if name in self._variables:
            raise UsageError(
                f"variable {name!r}",
                expected="a name that is not set yet",
                found=f"set already: {', '.join(self._variables)}",
                remedy="Give each gen and select a name of its own.",
            )

    def _check_open(self) -> None:
        if self._joined:
            raise UsageError(
                f"branch {self.path}",
                expected="a branch that has not been joined",
                found="one that has",
                remedy="Say it before the join, or to the state that has joined it.",
            )
