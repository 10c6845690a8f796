"""Runs engines of several backends against each other, in a worker process of the tuner
(autotune/worker.py): loads them, holds their logits against a reference, and times requests.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..autotune.space import Config
from ..errors import EngineError
from ..ir.parser import parse_graph
from ..passes.driver import PASS_TOLERANCE, engine_tolerance
from ..runtime.engine import CausalLMEngine, start
from ..runtime.folder import load_image
from ..runtime.image import EngineImage
from ..runtime.params import SamplingParams
from ..runtime.step import Step

_CHECKED = 4  # sequences at most
_SEED = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed: requests as a server meets them, through the whole engine.

    Half of the weight is on a request that is alone, half on one among ``batch`` that come at once.
    Each is a prompt of its own and then greedy decode steps; no prompt is found in a cache.

    Attributes:
        prompt: tokens of each prompt.
        new_tokens: that each request generates.
        batch: requests at once.
    """

    prompt: int
    new_tokens: int
    batch: int

    @classmethod
    def of(cls, max_model_len: int, max_batch_size: int) -> Work:
        """The work of an engine: 32 tokens and 8 new ones, or what its context has room for."""
        prompt = max(1, min(32, max_model_len // 2))
        return cls(prompt, max(1, min(8, max_model_len - prompt)), max_batch_size)

    def to_json(self) -> dict[str, int]:
        """Plain data that `json` writes."""
        return asdict(self)

    def seconds(self, alone: float, together: float) -> float:
        """Of a request: the mean of one alone, and of one among ``batch``."""
        return (alone + together / self.batch) / 2

    def __str__(self) -> str:
        request = f"prompt {self.prompt}, {self.new_tokens} new tokens"
        return f"a request ({request}): 1/2 alone + 1/2 one of {self.batch} at once"


def build(spec: Mapping[str, Any]) -> BackendRunner:
    """The runner of a model's backends, as `BackendTunable.runner` describes it."""
    return BackendRunner(spec)


class BackendRunner:
    """The engines of one model on this machine's device.

    Args:
        spec: ``folder`` (of the engines, one a backend), ``candidates`` (how many there may be),
            ``reference`` (the folder of the engine that others are held against), ``work``.

    Raises:
        EngineError: the reference does not run here.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.folder, self.candidates = Path(str(spec["folder"])), int(spec["candidates"])
        self.reference, self.work = str(spec["reference"]), Work(**spec["work"])
        self.engines: dict[str, CausalLMEngine] = {}
        self.ids, self.expected = self._reference()
        self.prompts = [ids[: self.work.prompt] for ids in self._ids(self.work.batch).tolist()]

    def prepare(self, config: Config) -> None:
        """Loads an engine, with what it captures and sets up at its first steps."""
        # Of a GPU's memory the first takes its share, the next one as much beside it, and so on.
        share = min(1.0, (len(self.engines) + 1) / self.candidates)
        name = str(config["backend"])
        engine = self.engines[name] = self._loaded(name, share)
        engine.warm_up()
        self._generate(engine, self.prompts)

    def check(self, config: Config) -> float:
        """The largest error of its logits against the reference's, in units of what is tolerated:
        of prompts, and of decode steps of several sequences; inf for NaN.
        """
        engine = self.engines[str(config["backend"])]
        found = torch.stack(logits_of(engine, self.ids, self.work.prompt))
        error = float((found.double() - self.expected).abs().max() / self.expected.abs().max())
        return error / tolerance(engine.image) if math.isfinite(error) else math.inf

    def time(self, config: Config, rounds: int) -> list[float]:
        """Seconds of a request, ``rounds`` times."""
        engine = self.engines[str(config["backend"])]
        return [
            self.work.seconds(
                self._generate(engine, self.prompts[:1]), self._generate(engine, self.prompts)
            )
            for _ in range(rounds)
        ]

    def facts(self) -> dict[str, Any]:
        """The device, torch's threads, and how busy the machine is."""
        gpu = torch.cuda.is_available()
        return {
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        }

    def _generate(self, engine: CausalLMEngine, prompts: Sequence[list[int]]) -> float:
        """Seconds until all have their new tokens."""
        params = SamplingParams(max_new_tokens=self.work.new_tokens, ignore_eos=True)
        engine.reset_prefix_cache()
        started = time.perf_counter()
        engine.generate(prompts, params)
        return time.perf_counter() - started

    def _loaded(self, name: str, share: float = 1.0) -> CausalLMEngine:
        """An engine of the folder, within a share of the memory that it may take."""
        image = load_image(self.folder / name)
        lm = image.lm
        if lm is not None:
            image = replace(image, lm=replace(lm, memory_fraction=lm.memory_fraction * share))
        engine = start(image)
        if not isinstance(engine, CausalLMEngine):
            raise EngineError(
                f"engine {self.folder / name}",
                expected="one that generates, on this machine's device",
                found=f"{image.kind} for {image.target}",
                remedy="Tune on the device that the model is compiled for.",
            )
        return engine

    def _ids(self, count: int) -> torch.Tensor:
        """Random token ids i64[count, prompt + new tokens], the same in every process."""
        lm = load_image(self.folder / self.reference).lm
        assert lm is not None
        shape = (count, self.work.prompt + self.work.new_tokens)
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(lm.vocab_size, shape, generator=generator)

    def _reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids i64[B, S] and their logits f64[B, S, V]; computed once, and kept in a file for
        workers that come after one that died.
        """
        from safetensors.torch import load_file, save_file

        path = self.folder / "expected.safetensors"
        if not path.exists():
            ids = self._ids(min(self.work.batch, _CHECKED))
            logits = self._loaded(self.reference)(ids).float().cpu().contiguous()
            save_file({"ids": ids, "logits": logits}, path)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        kept = load_file(path)
        return kept["ids"], kept["logits"].double()


def tolerance(image: EngineImage) -> float:
    """What an engine's logits may be off, over the largest of them: by the loosest type of what it
    puts out, and by what its products and its cache round to codes.
    """
    graph = parse_graph(image.graphs[-1][1])
    types = (node.dtype.torch for node in graph.outputs)
    loosest = max(PASS_TOLERANCE.get(dtype, 0.0) for dtype in types)
    return max(loosest, engine_tolerance(graph))


def logits_of(engine: CausalLMEngine, ids: torch.Tensor, prompt: int) -> list[torch.Tensor]:
    """Logits f32[S, V] of each sequence of ``ids`` i64[B, S]: its first ``prompt`` tokens in steps
    of their own, those behind in decode steps of all sequences together.
    """
    pool, executor = engine.pool, engine.executor
    names = [-1 - index for index in range(len(ids))]  # requests number theirs from 0
    with engine.loop.lock:
        engine.loop.settle()
        try:
            for name in names:
                pool.add(name)
            rows = [
                list(_prefilled(engine, name, row[:prompt]))
                for name, row in zip(names, ids, strict=True)
            ]
            for place in range(prompt, ids.shape[1]):
                step = _step(engine, names, ids[:, place : place + 1], place)
                for row, logits in zip(rows, executor.run(step).cpu().float(), strict=True):
                    row.append(logits[None].clone())
        finally:
            for name in names:
                pool.free(name)
    return [torch.cat(row) for row in rows]


def _prefilled(engine: CausalLMEngine, name: int, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits of a prompt, in as many steps as the pool asks for."""
    most = engine.pool.max_append
    for begin in range(0, len(ids), most):
        step = _step(engine, [name], ids[None, begin : begin + most], begin)
        yield engine.executor.run(step).to("cpu", torch.float32, copy=True)


def _step(engine: CausalLMEngine, names: Sequence[int], ids: torch.Tensor, begin: int) -> Step:
    """A step of the tokens ``ids`` i64[B, S] of B sequences, which stand at ``begin`` in each."""
    pool, (count, new) = engine.pool, ids.shape
    slots = []
    for name in names:
        found, copies = pool.append(name, new)
        if copies:
            engine.executor.copy_pages(*zip(*copies, strict=True))
        slots.append(torch.as_tensor(found))
    return Step(
        ids.reshape(-1),
        (begin + torch.arange(new)).repeat(count),
        (torch.arange(count + 1) * new).int(),
        torch.tensor([begin + new - pool.gap(name) for name in names], dtype=torch.int32),
        torch.cat(slots),
        pool.block_tables(names),
        torch.arange(count * new),
    )
