"""A server under many connections for minutes: errors, latencies, and whether its memory grows.

    python benchmarks/soak.py MODEL.gguf                        # 1000 connections, 10 minutes
    python benchmarks/soak.py MODEL.gguf --connections 100 --seconds 60 --json soak.json
    python benchmarks/soak.py MODEL.gguf -- --max-requests 64   # what follows is for `serve`

Starts ``tilewright serve MODEL`` on a port of this machine, and connects to nothing else. Each
connection asks one thing after the other: answers whole and streamed, answers that it gives up on
half way, and requests that are wrong. A 429 is a legitimate answer, and counted apart. Exits with 1
if any request had another end than it should, or if the server's memory grew by over 2%: the median
of the last tenth of the time against that of the first tenth after the warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import h11
import numpy as np

TEXT, CHAT, OLLAMA = "/v1/completions", "/v1/chat/completions", "/api/chat"
QUESTIONS = (
    "What is the capital of France?",
    "Name a fox.",
    "Count to ten.",
    "Why is the sky blue? Answer in a word.",
)
KINDS = {"whole": 30, "stream": 40, "ollama": 5, "given up": 15, "wrong": 10}  # of 100
TEXTS = 0.7  # of the rest: texts, which are shorter than conversations, whose template says more
WRONG: tuple[tuple[str, bytes, int], ...] = (
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
    (CHAT, b'{"messages": [{"role": "nobody", "content": "x"}]}', 400),
    (CHAT, b'{"messages": [' + b"[" * 2000, 400),
    (TEXT, b'{"prompt": "\xff"}', 400),
    (TEXT, json.dumps({"prompt": "x", "stop": "x" * 100_000}).encode(), 400),
    (TEXT, json.dumps({"prompt": [None] * 1000}).encode(), 400),
    (TEXT, b'{"prompt": "x", "model": "another"}', 404),
    ("/v1/nothing", b"{}", 404),
)
WAIT = 600.0  # seconds that one answer may take
GROWTH = 2.0  # percent
GRACE = 10.0  # seconds for what is under way at the end
# A cache for thousands of tokens would hide what grows; eager shares pages, and mixes prompts with
# what decodes, as GPUs do.
DEFAULTS = {"--max-model-len": "512", "--backend": "eager"}


@dataclass
class Tally:
    """What came of it; times in seconds."""

    ends: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # when, and bytes


class Connection:
    """HTTP/1.1 to the server, opened anew when it has ended."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def ask(self, path: str, body: bytes | None) -> tuple[int, AsyncIterator[bytes]]:
        """The status, and the body as it comes."""
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
            self._http = h11.Connection(h11.CLIENT)
        headers = [("Host", "soak"), ("Content-Type", "application/json")]
        headers.append(("Content-Length", str(len(body or b""))))
        request = h11.Request(method="POST" if body else "GET", target=path, headers=headers)
        parts = (request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage())
        self._writer.write(b"".join(self._http.send(part) or b"" for part in parts))
        await self._writer.drain()
        answer = await self._event()
        assert isinstance(answer, h11.Response), answer
        return answer.status_code, self._body()

    async def _body(self) -> AsyncIterator[bytes]:
        while not isinstance(event := await self._event(), h11.EndOfMessage):
            assert isinstance(event, h11.Data), event
            yield bytes(event.data)
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()

    async def _event(self) -> h11.Event:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            assert self._reader is not None
            data = await asyncio.wait_for(self._reader.read(65536), WAIT)
            if not data and self._http.their_state is not h11.SEND_BODY:
                raise ConnectionResetError("it was closed before the answer")
            self._http.receive_data(data)
        return event

    def close(self) -> None:
        """Hangs up, whatever is under way."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None


class Client:
    """One connection's user, who asks until the end."""

    def __init__(
        self, connection: Connection, model: str, tally: Tally, seed: int, tokens: int
    ) -> None:
        self.connection, self.model, self.tally, self.tokens = connection, model, tally, tokens
        self.random = random.Random(seed)

    async def run(self, end: float) -> None:
        """One request after the other until the end, in seconds of the monotonic clock."""
        kinds, weights = zip(*KINDS.items(), strict=True)
        while time.monotonic() < end:
            [kind] = self.random.choices(kinds, weights)
            found = "under way at the end"
            try:
                found = await self._wrong() if kind == "wrong" else await self._asked(kind)
            except (OSError, h11.ProtocolError, AssertionError, TimeoutError) as error:
                self.tally.errors[f"{kind}: {type(error).__name__}: {error}"] += 1
                self.connection.close()
                found = "error"
            finally:
                self.tally.ends[found] += 1
            if found == "429":
                await asyncio.sleep(1)  # as Retry-After has it
        self.connection.close()

    async def _wrong(self) -> str:
        path, body, expected = self.random.choice(WRONG)
        status, parts = await self.connection.ask(path, body)
        data = b"".join([part async for part in parts])
        assert status == expected, f"{status} for {body[:60]!r}: {data[:100]!r}"
        assert b"error" in data
        return "refused as it should be"

    async def _asked(self, kind: str) -> str:
        question, tokens = self.random.choice(QUESTIONS), self.random.randint(1, self.tokens)
        said = [{"role": "user", "content": question}]
        path, prompt = (CHAT, {"messages": said})
        if self.random.random() < TEXTS:
            path, prompt = (TEXT, {"prompt": question})
        body: dict[str, object] = {**prompt, "max_tokens": tokens, "temperature": 0.7}
        if kind == "ollama":
            path = OLLAMA
            body = {"model": self.model, "messages": said, "options": {"num_predict": tokens}}
        elif kind != "whole":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        began = time.monotonic()
        status, parts = await self.connection.ask(path, json.dumps(body).encode())
        data = b""
        async for part in parts:
            if not data and status == 200 and kind != "whole":
                self.tally.first.append(time.monotonic() - began)
            data += part
            if kind == "given up" and status == 200 and self.random.random() < 0.5:
                self.connection.close()
                return "given up"
        took = time.monotonic() - began
        if status == 429:
            self.tally.refused.append(took)
            return "429"
        assert status == 200, f"status {status}: {data[:200]!r}"
        self._counted(kind, data)
        self.tally.whole.append(took)
        return "answered"

    def _counted(self, kind: str, data: bytes) -> None:
        if kind == "ollama":
            last = json.loads(data.splitlines()[-1])
            assert last.get("done"), last
            self.tally.tokens += last["eval_count"]
        elif kind == "whole":
            self.tally.tokens += json.loads(data)["usage"]["completion_tokens"]
        else:
            *_, usage, done = data.decode().strip().split("\n\n")
            assert done == "data: [DONE]", data[-200:]
            self.tally.tokens += json.loads(usage.removeprefix("data: "))["usage"][
                "completion_tokens"
            ]


@contextmanager
def served(model: str, options: list[str]) -> Iterator[tuple[str, int, str, int]]:
    """Host, port, the model's name there and the process of a server; SIGTERM ends it."""
    command = [sys.executable, "-m", "tilewright", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"serving (\S+) on http://127\.0\.0\.1:(\d+)/", line):
                break
        else:
            raise SystemExit(f"the server ended with {process.wait()}")
        yield "127.0.0.1", int(found[2]), found[1], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            print(f"the server ended with {code}", file=sys.stderr)


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def watch(connection: Connection, pid: int, tally: Tally, end: float) -> None:
    """Looks at the memory, and at the figures as Prometheus and the page do, every second."""
    while time.monotonic() < end:
        tally.memory.append((time.monotonic(), resident(pid)))
        for path in ("/metrics", "/stats", "/health"):
            began = time.monotonic()
            status, parts = await connection.ask(path, None)
            async for _ in parts:
                pass
            tally.looks.append(time.monotonic() - began)
            if status != 200:
                tally.errors[f"{path}: {status}"] += 1
        await asyncio.sleep(1)
    connection.close()


async def soak(host: str, port: int, name: str, pid: int, given: argparse.Namespace) -> Tally:
    """The load itself."""
    tally = Tally()
    end = time.monotonic() + given.seconds
    tasks = [asyncio.create_task(watch(Connection(host, port), pid, tally, end))]
    for seed in range(given.connections):
        client = Client(Connection(host, port), name, tally, seed, given.tokens)
        tasks.append(asyncio.create_task(client.run(end)))
        if seed % 50 == 49:
            await asyncio.sleep(0.05)  # a queue of connections is not what this is about
    for ended in (await asyncio.wait(tasks, timeout=end - time.monotonic() + GRACE))[0]:
        ended.result()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return tally


def report(tally: Tally, given: argparse.Namespace) -> dict[str, object]:
    """The figures."""
    begin, end = tally.memory[0][0], tally.memory[-1][0]
    steady = begin + min(given.warmup, (end - begin) / 2)
    sizes = [size for when, size in tally.memory if when >= steady]
    tenth = max(1, len(sizes) // 10)
    before, after = median(sizes[:tenth]), median(sizes[-tenth:])
    return {
        "connections": given.connections,
        "seconds": given.seconds,
        "ends": dict(tally.ends.most_common()),
        "errors": dict(tally.errors.most_common(20)),
        "tokens_per_second": round(tally.tokens / given.seconds, 1),
        "first_event_seconds": percentiles(tally.first),
        "answer_seconds": percentiles(tally.whole),
        "metrics_seconds": percentiles(tally.looks),
        "refusal_429_seconds": percentiles(tally.refused),
        "resident_mb": {"warm": round(before / 1e6, 1), "end": round(after / 1e6, 1)},
        "growth_percent": round(100 * (after / before - 1), 2),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Some of them, in seconds; none of none."""
    if not values:
        return {}
    return {f"p{p}": round(float(np.percentile(values, p)), 3) for p in (50, 90, 99, 100)}


def allow_connections(number: int) -> None:
    """Raises this process' limit of open files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < number + 100:
        raise SystemExit(f"{number} connections need more open files than {most}: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> int:
    """Runs it; 1 if there was an error, or memory grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--warmup", type=float, default=120, help="at most half of the time")
    parser.add_argument("--tokens", type=int, default=6, help="of an answer, at most")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.epilog = "Behind -- come options of `tilewright serve`."
    args, _, options = "\0".join(sys.argv[1:]).partition("\0--\0")
    given = parser.parse_args(args.split("\0"))
    given.serve = options.split("\0") if options else []
    allow_connections(given.connections)
    ours = [pair for pair in DEFAULTS.items() if pair[0] not in given.serve]
    with served(given.model, [*itertools.chain(*ours), *given.serve]) as (host, port, name, pid):
        tally = asyncio.run(soak(host, port, name, pid, given))
    found = report(tally, given)
    text = json.dumps(found, indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")
    return int(bool(tally.errors) or found["growth_percent"] > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
