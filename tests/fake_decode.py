"""The tiny model of `fake_executor` as two Programs, of which the second samples, and a device that
does nothing before somebody waits for it.
"""

from __future__ import annotations

import torch

from fake_executor import VOCAB, logits_of, seen
from tilewright.codegen.program import Program
from tilewright.ir.parser import parse_type_text
from tilewright.runtime import SamplingParams
from tilewright.runtime.decode_graphs import DecodeGraphs, EagerDecode
from tilewright.runtime.executor import PagedExecutor
from tilewright.runtime.filters import draw
from tilewright.runtime.runner import ProgramRunner
from tilewright.runtime.sampling import filtered_logits
from tilewright.runtime.step_buffer import FIELDS, GROUPS, SAMPLING

CACHE = "k_cache_0"
_ONE_TOKEN = [name for name in FIELDS if name not in ("query_start", "logits_indices")]


class _Runner(ProgramRunner):
    """K are token ids. `broken` says after which tokens the logits are NaN."""

    def __init__(self, inputs, outputs):
        types = {CACHE: parse_type_text("i64[N, P]")}
        pairs = tuple((name, name) for name in outputs)
        super().__init__(Program("fake", types, (*inputs, CACHE), {}, pairs, ()), {}, None)
        self.broken = lambda tokens: False
        self.runs = 0
        self.slides = None

    def logits(self, inputs, b, length, position):
        memory = inputs[CACHE]
        tokens = memory[inputs["block_tables"][b].long()].reshape(-1)[:length].tolist()
        tokens = seen(tokens, position + 1, self.slides)
        written = tokens if len(tokens) == position + 1 else tokens[:-1]
        assert all(0 <= token < VOCAB for token in written), "a place that was never written"
        return logits_of(tokens) * (torch.nan if self.broken(tokens) else 1.0)


class GeneralRunner(_Runner):
    """Any step, to logits."""

    def __init__(self):
        super().__init__(FIELDS, ("logits",))

    def run(self, inputs, fresh=False, shared=False):
        self.runs += 1
        inputs[CACHE].view(-1)[inputs["slot_mapping"]] = inputs["token_ids"]
        rows = []
        for row in inputs["logits_indices"].tolist():
            b = int(torch.searchsorted(inputs["query_start"][1:], row, right=True))
            behind = int(inputs["query_start"][b + 1]) - 1 - row
            length = int(inputs["seq_lens"][b]) - behind
            rows.append(self.logits(inputs, b, length, int(inputs["positions"][row])))
        return {"logits": torch.stack(rows) if rows else torch.empty(0, VOCAB)}


class DecodeRunner(_Runner):
    """One token a sequence, to logits and tokens; rows of padding give NaN and -1. What it is told
    of shared pages has to hold.
    """

    def __init__(self):
        super().__init__([*_ONE_TOKEN, *SAMPLING, *GROUPS], ("logits", "tokens"))
        self.shared_runs = 0

    def run(self, inputs, fresh=False, shared=False):
        self.runs += 1
        ids, lens = inputs["token_ids"].tolist(), inputs["seq_lens"].tolist()
        assert all(0 <= token < VOCAB for token in ids), "an id outside of the embedding"
        if shared:
            self.shared_runs += 1
            _check_groups(inputs)
        inputs[CACHE].view(-1)[inputs["slot_mapping"]] = inputs["token_ids"]
        logits = torch.full((len(ids), VOCAB), torch.nan)
        tokens = torch.full((len(ids),), -1)
        for row, length in enumerate(lens):
            if length == 0:
                assert not inputs["slot_mapping"][row] and not inputs["block_tables"][row].any()
                continue
            position = int(inputs["positions"][row])
            assert position == length - 1 or (self.slides and position >= length)
            logits[row] = self.logits(inputs, row, length, position)
            tokens[row] = _sampled(logits[row], {name: inputs[name][row] for name in SAMPLING})
        return {"logits": logits, "tokens": tokens}


def _check_groups(inputs):
    """Members of a group stand together, and hold the same pages, written before this step."""
    tables, pages = inputs["block_tables"], inputs["shared_pages"]
    size, count = inputs[CACHE].shape[1], int((inputs["seq_lens"] > 0).sum())
    rows, ids = inputs["group_rows"][:count], inputs["group_ids"][:count]
    assert sorted(rows.tolist()) == list(range(count)) and not inputs["group_ids"][count:].any()
    last = int(ids.max())
    inside = [rows[ids == group].long() for group in range(1, last + 1)]
    known = torch.cat(inside)
    assert last and known.tolist() == rows[: len(known)].tolist() == rows[ids > 0].tolist()
    assert not pages[rows[ids == 0].long()].any() and not pages[count:].any()
    for members in inside:
        shared = int(pages[members[0]])
        assert len(members) > 1 and shared and (pages[members] == shared).all()
        assert (tables[members, :shared] == tables[members[0], :shared]).all()
        assert (inputs["positions"][members] >= shared * size).all()
        assert not (inputs["slot_mapping"][:, None] // size == tables[members[0], :shared]).any()


def _sampled(row, given):
    if row.isnan().any():
        return -1
    if given["temperature"] == 0:
        return int(row.argmax())
    names = ("temperature", "top_k", "top_p", "min_p")
    params = SamplingParams(**{name: given[name].item() for name in names})
    return int(draw(filtered_logits(row[None], [params]), given["uniform"].double()[None, None]))


class LazyQueue:
    """Does nothing before an event is waited for, and then only what was queued before it.

    `fail_at` raises KeyboardInterrupt at that call, before or after the work is queued.
    """

    def __init__(self):
        self.work, self.done, self.calls = [], 0, 0
        self.fail_at, self.fail_late = None, False
        self.copies = []
        self.ahead = 0  # steps that were queued while another one was not done

    def join(self):
        pass

    def copy(self, destination, source, noted=None):
        self.copies.append(source.numel() * source.element_size())
        self._queue(lambda: destination.copy_(source))

    def gather(self, destination, source, rows):
        self._queue(lambda: destination.copy_(source[rows].clamp(min=0)))

    def replay(self, graph):
        self.ahead += self.done < len(self.work) - 2
        self._queue(graph.replay)

    def run(self, work):
        self._queue(work)

    def record(self, event):
        self._queue(lambda: None)
        return _Until(self, len(self.work))

    def flush(self, stop=None):
        stop = len(self.work) if stop is None else stop
        while self.done < stop:
            work, self.work[self.done] = self.work[self.done], None
            self.done += 1
            work()

    def _queue(self, work):
        self.calls += 1
        fails = self.calls == self.fail_at
        if fails and not self.fail_late:
            raise KeyboardInterrupt
        self.work.append(work)
        if fails:
            raise KeyboardInterrupt


class _Until:
    def __init__(self, queue, stop):
        self.queue, self.stop = queue, stop

    def synchronize(self):
        self.queue.flush(self.stop)


class _LazyDecode(EagerDecode):
    """As on a GPU: buckets, graphs that hold their memory's addresses, and nothing done at once."""

    _shape = DecodeGraphs._shape

    def _queue(self):
        return LazyQueue()

    def _graph(self, shape, *, shared=False):
        known = self.shared if shared else self.captured
        if shape.sequences not in known:
            known[shape.sequences] = super()._graph(shape, shared=shared)
        return known[shape.sequences]

    def run(self, step):
        found = super().run(step)
        self.queue.flush()  # the caller looks at the logits
        if found is None:
            return None
        bucket = self._shape(*step.block_tables.shape).sequences
        return self.captured[bucket].logits[: len(step.seq_lens)]


class LazyExecutor(PagedExecutor):
    """A paged executor whose decode steps sample on the device that waits to be waited for. Steps
    are told of shared pages wherever there are any.
    """

    def __init__(self, max_sequences=8, max_model_len=48, slides=None):
        self.general, self.decoding = GeneralRunner(), DecodeRunner()
        self.general.slides = self.decoding.slides = slides
        super().__init__(self.general, max_sequences, max_model_len, decode=self.decoding)

    def allocate(self, num_pages, page_size, host_pages=0):
        super().allocate(num_pages, page_size, host_pages)
        self.caches.tensors[CACHE].random_(-10_000, -1)  # nothing is clean, nor is it cleaned

    def _graphs(self, runner, pages):
        return _LazyDecode(runner, self.caches.tensors, self.max_sequences, pages)

    def _join(self):
        self.graphs.queue.flush()

    def _shared_tokens(self):
        return -(1 << 40)
