"""Traces of requests and steps in Chrome's JSON format, which Perfetto reads.

There are two processes: the engine, whose track of steps says what each computed, beside counters
of sequences and pages; and the requests, a track for each completion, on which it is queued, its
prompt is computed in chunks, it decodes, and perhaps is preempted in between. Times are those of
`Timings`, from the start of the trace, in microseconds.

Events are written as they end, to a file that takes its name when the trace is closed. A step costs
the host some microseconds for each request that has not ended, queued ones too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..formats.atomic import atomic_file
from .counters import decodes
from .loop import GenerationLoop
from .plan import Chunk
from .request import Request
from .request import Sequence as RunningSequence

ENGINE, REQUESTS = 1, 2  # process ids
STEPS = 1  # the engine's thread


@contextmanager
def tracing(loop: GenerationLoop, path: str | Path) -> Iterator[Tracer]:
    """Traces a loop while the block runs. The file is written whatever ends the block.

    Raises:
        OSError: the file cannot be written.
    """
    raised: BaseException | None = None
    with atomic_file(path) as file:
        with loop.lock:
            tracer = Tracer(loop, file)
            loop.observers.append(tracer)
        try:
            yield tracer
        except BaseException as error:  # goes on below, when the file has its name
            raised = error
        with loop.lock:
            loop.observers.remove(tracer)
            tracer.close()
    if raised is not None:
        raise raised


class _Track:
    """Where a completion stands, and since when.

    Attributes:
        phase: "queued", "prefill", "decode" or "preempted".
        since: when it began.
        last: when the last token came, as of the step before.
        num_tokens: tokens that there were when the phase began, the prompt's too.
    """

    __slots__ = ("last", "num_tokens", "phase", "preemptions", "seq", "since", "thread")

    def __init__(self, seq: RunningSequence, thread: int, now: float) -> None:
        timings = seq.timings
        self.seq, self.thread = seq, thread
        self.preemptions, self.last = timings.preemptions, timings.last
        if timings.scheduled is None:
            self.begin("queued", timings.submitted)
        else:  # it was there before the trace
            self.begin("prefill" if timings.last is None else "decode", now)

    def begin(self, phase: str, now: float) -> None:
        """Enters a phase."""
        self.phase, self.since, self.num_tokens = phase, now, len(self.seq.tokens)


class Tracer:
    """Writes what it observes; `tracing` makes one.

    Args:
        loop: that it observes.
        file: to write to.
    """

    def __init__(self, loop: GenerationLoop, file: BinaryIO) -> None:
        self._loop, self._file, self._origin = loop, file, loop.clock()
        self._tracks: dict[int, _Track] = {}
        self._threads = 0
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        file.write(_json({"ph": "M", "name": "process_name", "pid": ENGINE, **_named("engine")}))
        self._write("M", "process_name", REQUESTS, 0, **_named("requests"))
        self._write("M", "thread_name", ENGINE, STEPS, **_named("steps"))
        for seq in (*loop.scheduler.running, *loop.scheduler.waiting):
            self._follow(seq)

    def added(self, request: Request) -> None:
        """A request was queued."""
        for seq in request.sequences:
            self._follow(seq)

    def stepped(self, chunks: Sequence[Chunk], started: float, ended: float) -> None:
        """A step was computed."""
        self._step(chunks, started, ended)
        for track in self._tracks.values():
            preemptions = track.seq.timings.preemptions
            if preemptions > track.preemptions:
                self._end_phase(track, started)
                track.begin("preempted", started)
                track.preemptions = preemptions
        for chunk in chunks:
            if chunk.seq.id in self._tracks:
                self._computed(self._tracks[chunk.seq.id], chunk, started, ended)
        for track in [*self._tracks.values()]:
            timings = track.seq.timings
            if track.phase == "queued" and timings.last is not None:
                self._forked(track, timings.last)
            track.last = timings.last
            if track.seq.finish_reason is not None or track.seq.request.abandoned:
                self._finish(track, ended)

    def close(self) -> None:
        """Ends what is open at this moment, and the JSON."""
        now = self._loop.clock()
        for track in [*self._tracks.values()]:
            self._finish(track, now)
        self._file.write(b"\n]}\n")

    def _follow(self, seq: RunningSequence) -> None:
        self._threads += 1
        track, request = _Track(seq, self._threads, self._origin), seq.request
        label = f"request {seq.id}"
        if request.params.n > 1:
            label = f"request {request.sequences[0].id}, {seq.index + 1} of {request.params.n}"
        self._write("M", "thread_name", REQUESTS, track.thread, **_named(label))
        args = {"prompt_tokens": len(request.prompt), "max_tokens": request.max_tokens}
        self._event("B", "request", seq.timings.submitted, track, args)
        self._tracks[seq.id] = track

    def _step(self, chunks: Sequence[Chunk], started: float, ended: float) -> None:
        scheduler, pool = self._loop.scheduler, self._loop.pool
        tokens = sum(len(chunk.slots) for chunk in chunks)
        prefill = tokens - sum(map(decodes, chunks))
        kind = "decode" if not prefill else "prefill" if prefill == tokens else "mixed"
        args = {"tokens": tokens, "prefill_tokens": prefill, "sequences": len(chunks)}
        self._span(kind, started, ended, None, args)
        sequences = {"running": len(scheduler.running), "waiting": len(scheduler.waiting)}
        self._event("C", "sequences", ended, None, sequences)
        self._event("C", "pages", ended, None, {"free": pool.num_available})

    def _computed(self, track: _Track, chunk: Chunk, started: float, ended: float) -> None:
        timings = track.seq.timings
        if track.phase == "queued" and timings.scheduled is not None:
            self._end_phase(track, timings.scheduled)
        elif track.phase == "preempted":
            self._end_phase(track, started)
        more = track.phase == "decode" and chunk.start >= len(track.seq.request.prompt)
        if more or decodes(chunk):  # several tokens of one that decodes are no prompt
            if track.phase != "decode":
                track.begin("decode", started)
            return
        if track.phase == "decode":  # a fork that found no place begins anew
            self._end_phase(track, track.since if track.last is None else track.last)
        came = timings.last is not None and timings.last != track.last
        until = timings.last if came and timings.last is not None else ended
        args = {"start": chunk.start, "tokens": len(chunk.slots)}
        self._span("prefill", started, until, track, args)
        track.begin("decode" if came else "prefill", until)

    def _forked(self, track: _Track, now: float) -> None:
        """Its first token came at `now`, from a prompt that another one computed."""
        scheduled = track.seq.timings.scheduled
        if scheduled is not None:
            self._end_phase(track, scheduled)
            self._span("prefill", scheduled, now, track, {"shared": True})
        track.begin("decode", now)

    def _finish(self, track: _Track, now: float) -> None:
        seq = track.seq
        reason = seq.finish_reason or ("abort" if seq.request.abandoned else "unfinished")
        if seq.finish_reason is not None and track.phase == "decode":
            now = max(track.since, seq.timings.last or track.since)
        self._end_phase(track, now)
        args = {
            "finish_reason": reason,
            "completion_tokens": len(seq.tokens) - len(seq.request.prompt),
            "cached_tokens": seq.num_cached,
            "preemptions": seq.timings.preemptions,
        }
        self._event("i", "finished", now, track, args)
        self._event("E", "request", now, track, {})
        del self._tracks[seq.id]

    def _end_phase(self, track: _Track, now: float) -> None:
        """Writes the phase that ends at `now`; those of prompts are written chunk by chunk."""
        if track.phase != "prefill":
            tokens = len(track.seq.tokens) - track.num_tokens
            args = {"tokens": tokens} if track.phase == "decode" else {}
            self._span(track.phase, track.since, now, track, args)

    def _span(
        self, name: str, start: float, stop: float, track: _Track | None, args: Mapping[str, object]
    ) -> None:
        if stop > start:
            begin = self._microseconds(start)
            dur = round(self._microseconds(stop) - begin, 3)
            self._event("X", name, start, track, args, dur=dur)

    def _event(
        self,
        kind: str,
        name: str,
        at: float,
        track: _Track | None,
        args: Mapping[str, object],
        **more: object,
    ) -> None:
        """Writes an event on a completion's track, or on that of steps."""
        if kind == "i":
            more["s"] = "t"  # of one thread
        process, thread = (ENGINE, STEPS) if track is None else (REQUESTS, track.thread)
        self._write(kind, name, process, thread, ts=self._microseconds(at), args=args, **more)

    def _write(self, kind: str, name: str, process: int, thread: int, **more: object) -> None:
        event = {"ph": kind, "name": name, "pid": process, "tid": thread, **more}
        # With the comma in one call, which no Ctrl-C divides.
        self._file.write(b",\n" + _json(event))

    def _microseconds(self, at: float) -> float:
        return max(0.0, round((at - self._origin) * 1e6, 3))


def _named(name: str) -> dict[str, object]:
    return {"args": {"name": name}}


def _json(event: Mapping[str, object]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()
