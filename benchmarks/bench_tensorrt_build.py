"""Engines of TensorRT for RTX, built without a GPU: sizes, times, and the kernels in them.

    python benchmarks/bench_tensorrt_build.py MODEL.gguf [--out FILE] [--only TEXT]

The model of the file, and the 1B shape of Llama 3.2 with random weights (and the file's tokenizer,
for FP8 is calibrated on a little text), in bfloat16, float16, INT4 in groups and FP8 with static
scales: for sm_80, sm_89 and sm_120 together, for FP8 the two that have it, and bfloat16 for each
alone. Each build is a process of its own, so that its memory is. Says of each whether attention is
one kernel, and which caches are written in place; the exit code is 1 where one is not.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import tilewright as tw
from tilewright.formats.gguf import GGUFCheckpoint
from tilewright.formats.gguf_tokenizer import read_gguf_tokenizer

ALL, FP8 = "sm_80,sm_89,sm_120", "sm_89,sm_120"
BATCH, LENGTH, TOKENS = 8, 2048, 256
FILE, SHAPE = "file", "1B"


@dataclass(frozen=True)
class Case:
    """An engine to build."""

    model: str
    dtype: str
    scheme: str | None
    targets: str
    group: int | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.scheme or self.dtype} {self.targets}"


CASES = [
    *(
        case
        for model, group in ((FILE, 64), (SHAPE, 128))  # SmolLM2's 576 columns are 9 times 64
        for case in (
            Case(model, "bfloat16", None, ALL),
            Case(model, "float16", None, ALL),
            Case(model, "bfloat16", "int4", ALL, group),
            Case(model, "bfloat16", "fp8-tensor", FP8),
        )
    ),
    *(Case(FILE, "bfloat16", None, target) for target in ALL.split(",")),
]


def write_shape(file: Path, folder: Path) -> None:
    """A model folder of the 1B shape without weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    read_gguf_tokenizer(GGUFCheckpoint(file)).save(folder)


def build(case: Case, file: Path) -> dict[str, object]:
    """Builds one engine, and says what came of it."""
    config = None
    if case.scheme is not None:
        config = tw.QuantConfig(case.scheme, case.group, method="rtn", tokens=TOKENS)
    with tempfile.TemporaryDirectory() as name:
        model, seed = str(file), None
        if case.model == SHAPE:
            write_shape(file, Path(name, "shape"))
            model, seed = str(Path(name, "shape")), 0
        made = tw.export_tensorrt(
            model,
            Path(name, "engine"),
            targets=case.targets,
            dtype=case.dtype,
            quantize=config,
            max_model_len=LENGTH,
            max_batch_size=BATCH,
            random_weights=seed,
            verify="off",
            strict=True,
        )
        caches = len(json.loads((made.path / "generation.json").read_text())["caches"])
    facts = {**asdict(made), "path": None, "in_place": len(made.in_place), "caches": caches}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"case": case.name, **facts, "peak_gib": round(peak, 2)}


def line(found: dict[str, object]) -> str:
    """A row of the table."""
    kernels = found["kernels"]
    assert isinstance(kernels, dict)
    attention = {n: c for n, c in kernels.items() if "_mha_" in n}
    return (
        f"{found['case']:42}{found['engine_bytes'] / 1e6:9.1f}{found['seconds']:8.1f}"
        f"{found['peak_gib']:8.2f}{sum(kernels.values()):9}"
        f"   {', '.join(f'{c} {n}' for n, c in attention.items())}; "
        f"in place {found['in_place']} of {found['caches']}"
    )


def main() -> int:
    """Builds and prints; exit code 1 where attention is in parts or a cache is copied."""
    options = _options()
    if options.case is not None:
        print(json.dumps(build(CASES[options.case], options.model)))
        return 0
    print(f"{'engine':42}{'MB':>9}{'s':>8}{'GiB':>8}{'kernels':>9}   of attention; caches")
    every = []
    for index, case in enumerate(CASES):
        if options.only not in case.name:
            continue
        command = [sys.executable, __file__, str(options.model), "--case", str(index)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        every.append(json.loads(done.stdout.splitlines()[-1]))
        print(line(every[-1]), flush=True)
        if options.out is not None:
            text = "".join(f"{json.dumps(found)}\n" for found in every)
            options.out.write_text(text, encoding="utf-8")
    good = all(found["fused"] and found["in_place"] == found["caches"] for found in every)
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, help="file to write a line of JSON a build to")
    parser.add_argument("--only", default="", help="builds whose name has this in it")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
