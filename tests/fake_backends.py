"""Backends whose engines do not exist: their times come from a table, their faults are real."""

from __future__ import annotations

from dataclasses import replace

import torch

from fake_backend_runner import FakeRunner
from tilewright.autotune.outcome import CandidateError
from tilewright.autotune.pool import Pool
from tilewright.codegen.program import Program
from tilewright.compiler.backend_tunable import Rivals
from tilewright.compiler.options import resolve_options
from tilewright.formats.weights import Held
from tilewright.ir.parser import parse_graph
from tilewright.runtime.image import EngineImage, LMConfig

TEXT = """def fake(token_ids: i64[1, S]):
    table: f32[8, 4] = param("table")
    embedding_0: f32[1, S, 4] = embedding(table, token_ids)
    linear_0: f32[1, S, 8] = linear(embedding_0, table)
    return {"logits": linear_0}
"""
LIMIT = 64


def graph(text=TEXT):
    weights = {"table": Held(torch.zeros(8, 4), "table")}
    return replace(parse_graph(text), weights=weights)


def options(**changes):
    given = {"backend": "auto", "kv_cache": "auto", "dtype": "auto", "max_model_len": None}
    given |= {"max_batch_size": 2, "verify": "off", "trust_remote_code": False, "target": "cpu"}
    return resolve_options(**{**given, **changes})


def fake_image(of):
    """An engine of nothing; backends differ in their files."""
    lm = LMConfig(8, LIMIT, of.max_batch_size, of.page_size, of.cache or "paged", ())
    files = {"which": of.backend.encode()}
    program = Program("fake", {}, (), {}, (), ())
    return EngineImage("fake", "causal_lm", "cpu", of.backend, program, files, {}, lm=lm)


class FakeRivals:
    """What compiles such engines, and which were."""

    def __init__(self, faults=None):
        self.made, self.faults = [], faults or {}

    def make(self, of):
        self.made.append(of.backend)
        if of.backend in self.faults:
            raise self.faults[of.backend]
        return fake_image(of)

    def rivals(self, of=None, **changes):
        return Rivals.of(graph(), of or options(**changes), LIMIT, self.make)


class InProcess:
    """What a worker does, without a process."""

    def __init__(self, build):
        self.build = build

    def open(self, spec):
        self.runner = self.build(spec.spec)

    def load(self, config):
        self.runner.prepare(config)

    def check(self, config):
        return self.runner.check(config)

    def time(self, config, rounds):
        try:
            return tuple(self.runner.time(config, rounds))
        except RuntimeError as error:
            raise CandidateError("failed", str(error), breaks=True) from error

    def facts(self):
        return self.runner.facts()

    def close(self):
        pass


def pool(seconds, faults=None):
    """Workers that time by a table."""
    made = FakeRunner({"seconds": seconds, "faults": faults or {}})
    return Pool(start=lambda: InProcess(lambda spec: made))
