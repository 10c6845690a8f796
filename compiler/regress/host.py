"""The host's part of a step, without a GPU: a tiny model generates with the real loop, scheduler,
runner and launch plans, and what Python does meanwhile is counted. Its kernels get their plans and
arguments but are not launched, its graphs are not captured, and its logits are made up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ...codegen.program import Program
from ...codegen.triton.interpreted import InterpretedKernel
from ...codegen.triton.invocation import Given, Invocation
from ...codegen.triton.source import Launch
from ...runtime.decode_graphs import DecodeGraphs, bucket_of
from ...runtime.executor import PagedExecutor
from ...runtime.loop import GenerationLoop
from ...runtime.params import SamplingParams
from ...runtime.pool import PagedPool
from ...runtime.runner import ProgramRunner
from ...runtime.sampling import Sampler
from ...runtime.scheduler import Scheduler
from ...runtime.step import Step
from ...runtime.token_choice import TokenChooser
from ...runtime.weights import load_weights
from ..api import Phases, compile_image
from ..options import KVCacheConfig, resolve_options
from .counting import PYTHON, Counts, count_calls

Number = int | float
_BATCHES = (1, 8, 32)
_PROMPT, _STEPS, _FIRST = 24, 32, 4  # tokens; decode steps that are counted, and those before
_PAGE = 16
_LONGEST = 128
_VOCAB = 160
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 256,
}
"""config.json of the model; what is counted hardly depends on its sizes, but on its calls."""


@dataclass(frozen=True, slots=True)
class Runners:
    """What runs the tiny model.

    Attributes:
        general: any step.
        decode: steps in which every sequence brings one token; None where `general` does.
    """

    general: ProgramRunner
    decode: ProgramRunner | None


def unlaunched_runners(folder: Path) -> Runners:
    """The tiny model's Programs as Triton's backend makes them, their kernels not launched.

    Args:
        folder: for the model's config.
    """
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    options = resolve_options(
        target="cpu",
        backend="triton",
        kv_cache=KVCacheConfig("paged", _PAGE),
        dtype="float32",
        max_model_len=_LONGEST,
        max_batch_size=max(_BATCHES),
        verify="off",
        trust_remote_code=False,
        random_weights=0,
        tune="none",
    )
    image = compile_image(folder, None, None, options, Phases())
    weights = load_weights(image.weights, torch.device("cpu"))

    def unlaunched(program: Program) -> ProgramRunner:
        runner = ProgramRunner(program, weights, image.files.__getitem__)
        runner.steps = [
            (call, _Planned(kernel) if isinstance(kernel, InterpretedKernel) else kernel)
            for call, kernel in runner.steps
        ]
        return runner

    decode = None if image.decode is None else unlaunched(image.decode.program)
    return Runners(unlaunched(image.program), decode)


def host_series(runners: Runners) -> dict[str, Number]:
    """Calls of Python and of C functions in steps of the tiny model, and how batches are padded.

    Counts are of functions of ours, and of the C functions that those call: torch's count once,
    and ``time.sleep`` counts too.

    Args:
        runners: of `unlaunched_runners`.
    """
    series: dict[str, Number] = {}
    replays = 0
    for batch in _BATCHES:
        for graphs in (True, False):
            # The first time the runner has other sizes in mind, and torch has never done it.
            _generate(runners, batch, 1 + _FIRST, graphs)
            few, _ = _generate(runners, batch, 1 + _FIRST, graphs)
            many, replayed = _generate(runners, batch, 1 + _FIRST + _STEPS, graphs)
            replays += replayed
            name = f"a decode step{'' if graphs else ' without graphs'}, batch {batch} ({PYTHON})"
            series[f"python calls {name}"] = (many.calls - few.calls) / _STEPS
            series[f"C calls {name}"] = (many.c_calls - few.c_calls) / _STEPS
    one, _ = _generate(runners, 1, 1, graphs=True)
    series[f"python calls a prefill ({PYTHON})"] = one.calls
    series[f"C calls a prefill ({PYTHON})"] = one.c_calls
    series["graph replays"] = replays
    counts = range(1, max(_BATCHES) + 1)
    series["buckets"] = len({bucket_of(count) for count in counts})
    series["padded rows"] = sum(bucket_of(count) - count for count in counts)
    return series


def _generate(runners: Runners, batch: int, tokens: int, graphs: bool) -> tuple[Counts, int]:
    """What generating so many tokens for each of a batch comes to, and how many graphs it replays;
    everything but the Programs is new each time.
    """
    pool = PagedPool(max(_BATCHES) * -(-_LONGEST // _PAGE) + 1, _PAGE)
    executor = _Executor(runners, graphs)
    scheduler = Scheduler(pool, executor.capabilities, max_num_seqs=max(_BATCHES))
    loop = GenerationLoop(executor, pool, scheduler, Sampler(), None, (), _LONGEST, _VOCAB)
    prompts = [[(7 * i + 13 * j) % _VOCAB for i in range(_PROMPT)] for j in range(batch)]
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    _, counts = count_calls(lambda: loop.generate(prompts, params))
    return counts, executor.replays


class _Planned(Invocation):
    """A kernel that stops short of its launches."""

    def __init__(self, kernel: Invocation) -> None:
        aliases = tuple(kernel.aliases.items())
        super().__init__(kernel.source, kernel.result_types, aliases, kernel.device)

    def launch(
        self,
        launch: Launch,
        grid: tuple[int, int, int],
        arguments: Sequence[Given],
    ) -> None:
        """Nothing: there is no device."""


class _Executor(PagedExecutor):
    """Steps as on a GPU: those that decode replay a graph, or what stands for one. Without graphs
    the general Program runs them, as it does where no graph can hold the other.
    """

    def __init__(self, runners: Runners, graphs: bool) -> None:
        decode = (runners.decode or runners.general) if graphs else None
        super().__init__(runners.general, max(_BATCHES), _LONGEST, decode=decode)
        self.replays = 0
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.rand((max(_BATCHES), _VOCAB), generator=generator)

    def _graphs(self, runner: ProgramRunner, pages: int) -> DecodeGraphs:
        graphs = _Graphs(runner, self.caches.tensors, self.max_sequences, pages)
        graphs.replayed = self.replay
        graphs.chooser = _Chooser(runner)
        return graphs

    def replay(self) -> None:
        """Counts what would be one."""
        self.replays += 1

    def run(self, step: Step) -> torch.Tensor:
        return self.logits[: len(super().run(step))]


class _Chooser(TokenChooser):
    """Does what choosing takes of the host, and makes the tokens up."""

    def choose(
        self,
        logits: torch.Tensor,
        fields: Mapping[str, torch.Tensor],
        params: Sequence[SamplingParams],
    ) -> torch.Tensor:
        return torch.zeros_like(super().choose(logits, fields, params))


class _Graphs(DecodeGraphs):
    replayed: Any = None

    def _capture(self, shape: Any, shared: bool) -> Any:
        tokens = torch.arange(shape.rows) if self.samples else None
        return SimpleNamespace(
            graph=SimpleNamespace(replay=self.replayed),
            logits=torch.zeros((shape.rows, _VOCAB)),
            tokens=tokens,
        )
