"""`tilewright.export_tensorrt`: from a model to a folder with a TensorRT engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..errors import UnsupportedError, UsageError
from ..formats.atomic import atomic_folder
from ..ir.graph import Graph
from ..passes.heads import GQA
from ..passes.schemes import QuantConfig
from ..targets import Target
from .api import Phases, Progress, identifier, sample_ids
from .changes import make_changes
from .emit_network import network_error
from .emit_source import (
    Changes,
    captured,
    cut_graphs,
    layer_names,
    open_causal_lm,
    slot_graphs,
)
from .options import CompileOptions, context_of, resolve_options
from .sources import Source, source_tokenizer

if TYPE_CHECKING:
    from ..codegen.tensorrt.builder import Built
    from ..codegen.tensorrt.decoder import Lowered
    from ..codegen.tensorrt.flavor import Flavor
    from ..codegen.tensorrt.profiles import Profile

ENGINE, NETWORK, GENERATION = "model.engine", "network.txt", "generation.json"
BFLOAT16_SINCE = 80


@dataclass(frozen=True, slots=True)
class EmittedEngine:
    """What was written.

    Attributes:
        path: the folder.
        flavor: "tensorrt_rtx" or "tensorrt", and its version.
        targets: that the engine is for, such as "sm_89".
        layers: of the network.
        engine_bytes: of the engine file.
        seconds: that TensorRT took to build it.
        fused: whether every attention layer is one kernel.
        kernels: how often each kernel is launched, in both profiles together; none where the
            engine does not say.
        in_place: the caches, by output, that are one memory with their input; none where the
            engine does not say.
        notes: what a user may want to know of the engine.
        largest_error: relative, of the network that it was built from, run by the reference of its
            layers beside the interpreter; None where numbers were not compared.
    """

    path: Path
    flavor: str
    targets: tuple[str, ...]
    layers: int
    engine_bytes: int
    seconds: float
    fused: bool
    kernels: dict[str, int]
    in_place: tuple[str, ...]
    notes: tuple[str, ...]
    largest_error: float | None = None


def export_tensorrt(
    model: object,
    path: str | Path,
    *,
    targets: str | Sequence[str] = "auto",
    dtype: str = "auto",
    quantize: str | QuantConfig | None = None,
    attention: str | GQA | None = None,
    max_model_len: int | None = None,
    max_batch_size: int | None = None,
    strict: bool = False,
    verify: str = "sample",
    trust_remote_code: bool = False,
    random_weights: int | None = None,
    progress: Progress | None = None,
) -> EmittedEngine:
    """Writes a causal LM, after the passes, as a folder for TensorRT: ``model.engine``, whose
    caches are updated in place; ``network.txt``, what it was built from; ``generation.json`` and,
    where the model has one, ``tokenizer.json``. codegen/tensorrt/decoder.py says what goes in and
    out. TensorRT for RTX builds it on a machine without a GPU.

    The passes and the network are checked as `verify` says; the engine itself runs on a GPU alone,
    so that what TensorRT makes of the network is not compared here.

    Args:
        model: a Hugging Face model, a model folder or a .gguf file.
        path: the folder; one that is there is replaced when the new one is complete.
        targets: names of `tilewright targets`, or architectures such as "sm_89", as a sequence or
            with commas between; "auto" for all that TensorRT builds for and that have the types.
        dtype: as `compile` takes it; "auto" is bfloat16, or float16 where a target has no other.
        quantize: as `compile` takes it; of FP8, "fp8-tensor" and "fp8-weight" have a form.
        attention, max_model_len, max_batch_size: as `compile` takes them; a cache holds so many
            sequences of that length.
        strict: whether attention that is not one fused kernel is an error, rather than a note.
        verify, trust_remote_code, random_weights: as `compile` takes them.
        progress: called as phases begin.

    Raises:
        UsageError, CheckpointError, CaptureError: what is wrong with the model or an option.
        UnsupportedError: no TensorRT is installed, it does not build for a target, or an op or
            scheme has no form in it; nothing is written.
        VerificationError: a pass or the network computes something else.
    """
    from ..codegen.tensorrt.flavor import find_flavor

    archs = None if targets == "auto" else _archs(targets)
    flavor = find_flavor()
    if archs is not None:
        flavor.check(archs, ())
    options = resolve_options(
        target="cpu",
        backend="onnxruntime",
        kv_cache="static",
        dtype=_usual(model, archs) if dtype == "auto" else dtype,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        verify=verify,
        trust_remote_code=trust_remote_code,
        random_weights=random_weights,
        tune="none",
        quantize="expanded" if quantize is None else quantize,
        attention=attention,
    )
    return _Export(options, flavor, archs, strict, Phases(progress)).write(model, Path(path))


def _archs(targets: str | Sequence[str]) -> tuple[int, ...]:
    """The architectures that were named."""
    names = targets.split(",") if isinstance(targets, str) else list(targets)
    found: dict[int, None] = {}
    for name in map(str.strip, names):
        number = name.lower().removeprefix("sm_")
        arch = int(number) if number.isdigit() else Target.parse(name).arch
        if arch == 0:
            raise UsageError(
                "option target",
                expected="NVIDIA GPUs, which TensorRT builds for",
                found=name,
                remedy="Name GPUs, or leave the option out for all that can be had.",
            )
        found[arch] = None
    return tuple(sorted(found))


def _usual(model: object, archs: tuple[int, ...] | None) -> str:
    """The type to compute in where none is named: fused attention wants 16 bits. A module of the
    user's own stays as it is, to be refused for what it is.
    """
    if isinstance(model, nn.Module) and not hasattr(model, "config"):
        return "auto"
    return "float16" if archs and min(archs) < BFLOAT16_SINCE else "bfloat16"


@dataclass(frozen=True, slots=True)
class _Export:
    """One export: what was asked for, and who wants to hear of it."""

    options: CompileOptions
    flavor: Flavor
    archs: tuple[int, ...] | None
    strict: bool
    phases: Phases

    def write(self, model: object, path: Path) -> EmittedEngine:
        from ..codegen.tensorrt.plan import read_plan
        from ..codegen.tensorrt.profiles import decoder_profiles

        run = self.phases.run
        source = run("open", 0.0, lambda: open_causal_lm(model, self.options))
        graph = run("capture", 0.05, lambda: captured(source, identifier(source.name)))
        limit = context_of(source.max_position_embeddings, self.options)
        changes = run("calibrate", 0.15, lambda: make_changes(graph, source, self.options, limit))
        stands, error = run("verify", 0.2, lambda: self._check_sample(source, limit, changes))
        level = "structure" if stands else self.options.verify
        samples = (sample_ids(graph, limit),)
        passed = run(
            "passes", 0.3, lambda: slot_graphs(graph, changes, level, samples, self.options)
        )
        final = passed.final
        lowered = run("convert", 0.4, lambda: self._lowered(final, limit))
        if level in ("sample", "full"):
            error = run(
                "check", 0.45, lambda: network_error(lowered, final, passed.inputs(samples))
            )
        archs = self.archs or self.flavor.suits(lowered.network.dtypes)
        profiles = decoder_profiles(self.options.max_batch_size, limit)
        with atomic_folder(path) as folder:
            built = run("build", 0.5, lambda: self._built(lowered, archs, profiles, folder))
            plan = read_plan(folder / ENGINE)
            (folder / NETWORK).write_text(f"{lowered.network}\n", encoding="utf-8")
            tokenizer = source_tokenizer(source)
            if tokenizer is not None:
                tokenizer.save(folder)
            facts = self._facts(lowered, built, profiles, source, final, limit)
            (folder / GENERATION).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return EmittedEngine(
            path,
            f"{self.flavor.name} {self.flavor.version}",
            tuple(f"sm_{arch}" for arch in built.archs),
            len(lowered.network.layers),
            built.bytes,
            built.seconds,
            built.fused,
            dict(plan.kernels),
            tuple(c.present for c in lowered.caches if c.present in plan.in_place),
            built.notes,
            error,
        )

    def _check_sample(
        self, source: Source, limit: int, changes: Changes
    ) -> tuple[bool, float | None]:
        """Compares numbers of the model cut to one layer of each kind: whether that stands for the
        whole one, and its error.
        """
        cut = cut_graphs(source, limit, changes, self.options)
        if cut is None:
            return False, None
        passed, samples = cut
        lowered = self._lowered(passed.final, limit)
        return True, network_error(lowered, passed.final, passed.inputs(samples))

    def _lowered(self, graph: Graph, limit: int) -> Lowered:
        from ..codegen.tensorrt.decoder import lower_decoder

        try:
            return lower_decoder(graph, layer_names(graph), limit)
        except UnsupportedError as error:
            scheme = self.options.quantize
            if scheme is None:
                raise
            raise UnsupportedError(
                f"quantize={scheme.scheme!r} for TensorRT: {error.culprit}",
                expected=error.expected,
                found=error.found,
                remedy="Quantize by fp8-tensor, fp8-weight or int8-weight, or by int4, symmetric "
                "and with groups that divide the columns.",
            ) from error

    def _built(
        self,
        lowered: Lowered,
        archs: tuple[int, ...],
        profiles: Sequence[Profile],
        folder: Path,
    ) -> Built:
        from ..codegen.tensorrt.builder import build_engine

        with (folder / ENGINE).open("wb") as file:
            return build_engine(lowered.network, self.flavor, archs, profiles, file, self.strict)

    def _facts(
        self,
        lowered: Lowered,
        built: Built,
        profiles: Sequence[Profile],
        source: Source,
        graph: Graph,
        limit: int,
    ) -> dict[str, object]:
        """What generation.json holds: all that a loop over the engine has to know."""
        return {
            "model": ENGINE,
            "flavor": self.flavor.name,
            "version": self.flavor.version,
            "targets": [f"sm_{arch}" for arch in built.archs],
            "profiles": [profile.to_json() for profile in profiles],
            "eos_token_ids": list(source.eos_token_ids),
            "max_length": limit,
            "vocab_size": int(str(graph.outputs[0].shape[-1])),
            "caches": [
                {
                    "past": cache.past,
                    "present": cache.present,
                    "shape": ["batch", cache.heads, limit, cache.width],
                    "dtype": str(cache.dtype.torch).removeprefix("torch."),
                }
                for cache in lowered.caches
            ],
        }
