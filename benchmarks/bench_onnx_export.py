"""Emitted ONNX models beside torch's own export of the same model, in ONNX Runtime on the CPU.

    python benchmarks/bench_onnx_export.py MODEL.gguf [--json FILE]

Three files of one model in float32: our flavors ``standard`` and ``onnxruntime``, and what
``torch.onnx.export(dynamo=True)`` makes of the Hugging Face model with its cache, whose presents
are bound as the next pasts. All give the logits of the last token alone. Each round runs every file
once, so that what else the machine does hits all of them; ratios are of medians of rounds, with a
95% interval, over torch's. Decode is the median step behind a prompt of ``--context`` tokens;
prefill is ``--prompt`` tokens at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
import torch
from transformers import DynamicCache, PreTrainedModel

import tilewright as tw
from tilewright.compiler.bench.reference import ReferenceModel
from tilewright.compiler.bench.statistics import paired_ratio

TORCH = "torch.onnx"
FLAVORS = ("standard", "onnxruntime")


class Contender(Protocol):
    """A model in ONNX Runtime that decodes one sequence."""

    def start(self) -> None:
        """Forgets the sequence."""

    def step(self, ids: list[int], position: int) -> int:
        """The likeliest token behind ``ids``, which begin at ``position``."""


def _open(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Ours:
    """An emitted folder, its caches in place."""

    def __init__(self, folder: Path, room: int) -> None:
        facts = json.loads((folder / "generation.json").read_text(encoding="utf-8"))
        self.session = _open(folder / facts["model"])
        self.binding = self.session.io_binding()
        self.caches = []
        for cache in facts["caches"]:
            sizes = {"batch": 1, "cache_length": room}
            shape = [sizes.get(size, size) for size in cache["shape"]]
            memory = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, cache["dtype"]))
            self.binding.bind_ortvalue_input(cache["past"], memory)
            self.binding.bind_ortvalue_output(cache["present"], memory)
            self.caches.append(memory)

    def start(self) -> None:
        """What the caches hold is overwritten."""

    def step(self, ids: list[int], position: int) -> int:
        positions = np.arange(position, position + len(ids))
        feeds = {"input_ids": ids, "position_ids": positions, "logits_indices": [len(ids) - 1]}
        for name, values in feeds.items():
            self.binding.bind_cpu_input(name, np.array([values], dtype=np.int64))
        self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
        return int(self.binding.get_outputs()[-1].numpy()[0, -1].argmax())


class Torchs:
    """torch's export, its presents handed on as pasts."""

    def __init__(self, path: Path, kv_heads: int, width: int) -> None:
        self.session = _open(path)
        self.shape = (1, kv_heads, 0, width)
        names = [value.name for value in self.session.get_inputs()]
        self.ids, self.names = names[0], names[1:]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.start()

    def start(self) -> None:
        empty = np.zeros(self.shape, np.float32)
        self.past = [ort.OrtValue.ortvalue_from_numpy(empty) for _ in self.names]

    def step(self, ids: list[int], position: int) -> int:
        binding = self.session.io_binding()
        binding.bind_cpu_input(self.ids, np.array([ids], dtype=np.int64))
        for name, past in zip(self.names, self.past, strict=True):
            binding.bind_ortvalue_input(name, past)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        logits, *self.past = binding.get_outputs()
        return int(logits.numpy()[0, -1].argmax())


class _WithCache(torch.nn.Module):
    """The model over tensors alone: ids and pasts in, the last logits and presents out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, pasts: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(list(zip(pasts[0::2], pasts[1::2], strict=True)))
        found = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        presents = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return found.logits, *presents


def export_by_torch(model: PreTrainedModel, path: Path) -> Torchs:
    """``torch.onnx.export`` of the model with a cache of any length."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, count = config.num_key_value_heads, 2 * config.num_hidden_layers
    pasts = [torch.zeros(1, heads, 5, width) for _ in range(count)]
    length, past = torch.export.Dim("length", max=4096), torch.export.Dim("past", max=4096)
    torch.onnx.export(
        _WithCache(model).eval(),
        (torch.ones(1, 3, dtype=torch.long), pasts),
        path,
        dynamo=True,
        dynamic_shapes=({1: length}, [{2: past}] * count),
        external_data=True,
        verbose=False,
    )
    return Torchs(path, heads, width)


def main() -> int:
    """Measures and prints; exit code 0, and 1 where the tokens differ."""
    options = _options()
    room = max(options.prompt, options.context + options.new) + 1
    with tempfile.TemporaryDirectory() as name:
        contenders: dict[str, Contender] = {}
        for flavor in FLAVORS:
            folder = Path(name, flavor)
            tw.export_onnx(options.model, folder, flavor=flavor, max_model_len=2048)
            contenders[flavor] = Ours(folder, room)
        contenders[TORCH] = _torchs(options.model, Path(name, "torch.onnx"))
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        tokens: dict[str, list[int]] = {}
        for index in range(options.rounds + 1):
            for name, contender in contenders.items():
                seconds, tokens[name] = _round(contender, options)
                if index:  # the first one warms up
                    figures[name].append(seconds)
    same = len({tuple(found) for found in tokens.values()}) == 1
    _print(figures, options.prompt)
    print(f"the same {options.new} tokens: {same}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if same else 1


def _torchs(path: Path, target: Path) -> Torchs:
    model = ReferenceModel(str(path)).model.eval()
    with torch.no_grad():
        return export_by_torch(model, target)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--json", type=Path, help="file to write seconds to")
    return parser.parse_args()


def _round(
    contender: Contender, options: argparse.Namespace
) -> tuple[tuple[float, float], list[int]]:
    """Seconds of a decode step and of a prefill, and the tokens of the decode."""
    clock, ids = time.perf_counter, [100 + i % 9000 for i in range(4096)]
    contender.start()
    started = clock()
    contender.step(ids[: options.prompt], 0)
    prefill = clock() - started
    contender.start()
    tokens = [contender.step(ids[: options.context], 0)]
    steps = []
    for position in range(options.context, options.context + options.new - 1):
        started = clock()
        tokens.append(contender.step(tokens[-1:], position))
        steps.append(clock() - started)
    return (statistics.median(steps), prefill), tokens


def _print(figures: Mapping[str, list[tuple[float, float]]], prompt: int) -> None:
    print(f"{'tokens a second':16}{'decode':>10}{'prefill':>10}   over {TORCH}: decode, prefill")
    for name, rounds in figures.items():
        line, ratios = f"{name:16}", []
        for kind, tokens in ((0, 1), (1, prompt)):
            seconds = [found[kind] for found in rounds]
            line += f"{tokens / statistics.median(seconds):10.1f}"
            ratio = paired_ratio([found[kind] for found in figures[TORCH]], seconds)
            ratios.append(f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
        print(line if name == TORCH else f"{line}   {', '.join(ratios)}")


if __name__ == "__main__":
    sys.exit(main())
