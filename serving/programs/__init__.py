"""Programs: Python that talks with a model, in which some texts are left for the model to fill.

    import tilewright as tw

    @tw.program
    def essay(s, topic):
        s += tw.system("You are a terse critic.")
        s += tw.user(f"Name three sides of {topic}.")
        s += tw.assistant(tw.gen("sides", max_new_tokens=60, stop="\\n\\n"))
        branches = s.fork(3)
        for i, b in enumerate(branches, 1):
            b += tw.user(f"Expand on side {i}.")
            b += tw.assistant(tw.gen("text", max_new_tokens=80))
        s.join(branches)
        s += tw.user("Which of these is best?\\n" + "\\n".join(s["text"]))
        s += tw.assistant("Number", tw.select("best", [" 1", " 2", " 3"]))

    result = essay.run(engine, topic="rain")          # or "http://localhost:8000/v1"
    result["sides"], result["text"], result["best"]   # a text, three texts, one of the options
    result.messages(), result.text(), result.usage

    essay.run("http://localhost:8000/v1", topic="rain", api_key=key, timeout=60)
    essay.run_batch(engine, [{"topic": "rain"}, {"topic": "snow"}])
    for piece in essay.stream(engine, topic="rain"):
        print(piece.text, end="")

*Writing never waits.* `s += …` notes what is said; a `gen` or `select` in it begins as soon as what
stands before it is known, on its own. So the branches of a fork, and the runs of a batch, are
computed together. *Reading waits*: `s["sides"]`, `s.text()`. A run ends when all of it is filled.

*A name is set once.* Branches read what was set before the fork. After `s.join(branches)`, `s` has
for each name that they have set a list in their order, with None for a branch that did not set it.
What is said in a branch stays there: `s` goes on from where it was.

*Turns are the chat template's*: what the model reads is what the same messages give in
`/v1/chat/completions`, or, where the program says plain strings, what the same text gives in
`/v1/completions`. Most tokens begin with their space, so words before a `gen` should not end with
one. A template that rewrites earlier turns is followed; the radix tree then shares what comes
before the first difference. A fork computes what the branches have in common once, and they begin
there, in full pages: `usage.cached_tokens` counts it. Answers are read back as text; where that
gives other tokens than were sampled, they are computed again.

*select* takes, on an engine, the option with the highest mean log-probability of its tokens, from
the first token on that depends on the option, and has `outcomes["best"].scores`. Servers give no
logprobs of prompts: there it is a greedy answer that is held to the options, token by token, which
may be another one. Forms other than a JSON schema, and an answer that begins with the program's own
words (`assistant("Number", gen(…))`) are sent in vLLM's fields `structured_outputs` and
`continue_final_message`, which `tilewright serve` understands. An answer that is none of the
choices, or no JSON, is an error: another server may pass over these fields. One that has too much
to do is asked again, five times.

*What fails ends the run*: its other requests are given up, their memory is freed, and the error
names the variable and the branch. So do Ctrl-C, a `timeout`, and the end of a stream's loop. An
output that `max_new_tokens` cuts short of its form is an error. A program blocks the thread that
runs it: in a coroutine, `await asyncio.to_thread(essay.run, engine, topic="rain")`.
"""

from __future__ import annotations

from .calling import Program, Result, Stream, program
from .exchange import ServerError
from .expressions import Gen, Select, Turn, assistant, gen, select, system, user
from .prompts import Outcome
from .running import Piece, ProgramTimeout
from .state import State

__all__ = [
    "Gen",
    "Outcome",
    "Piece",
    "Program",
    "ProgramTimeout",
    "Result",
    "Select",
    "ServerError",
    "State",
    "Stream",
    "Turn",
    "assistant",
    "gen",
    "program",
    "select",
    "system",
    "user",
]
