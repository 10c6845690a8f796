"""A quantized Hugging Face folder, as compressed-tensors has it, for other engines to load."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..codegen.program import Json
from ..errors import UnsupportedError, UsageError
from ..formats.atomic import atomic_folder
from ..formats.checkpoint import Checkpoint, open_checkpoint
from ..formats.compressed_tensors import Codes, Grouping
from ..formats.safetensors_folder import write_tensors
from ..formats.weights import Apply, Stored, Weight
from ..ir.graph import Graph
from ..ir.ops.quant import unpack4
from ..passes.quantize import Recipe, linears_to_quantize
from ..passes.schemes import SCHEMES, Parts, QuantConfig
from .calibrate.recipe import plain_graph
from .hf_model import capture_causal_lm
from .lowering import lower
from .options import CompileOptions, resolve_options
from .quantizing import make_recipe, quality_of
from .sources import Source, open_source

_COPIED = (".json", ".jinja", ".model", ".txt", ".py")
_CONTEXT = 8192  # tokens that samples are no longer than


@dataclass(frozen=True, slots=True)
class _Linear:
    """One stored weight among the rows of a graph's weight, and the module that has it."""

    stored: Stored
    module: str
    merged: str
    weight: Weight
    start: int


def export_quantized(
    model: str | Path,
    output: str | Path,
    quantize: str | QuantConfig,
    trust_remote_code: bool = False,
) -> dict[str, Json]:
    """Quantizes the linears of a Hugging Face folder into another such folder, which transformers
    and others load by compressed-tensors. All that is not quantized is copied as it is.

    Args:
        model: a folder with config.json and safetensors in numbers.
        output: the folder to write; it appears whole or not at all.
        quantize: as `compile` takes it; without a method, "rtn" where the scheme's own would
            change other weights than those of linears.
        trust_remote_code: whether the folder may bring Python code.

    Returns:
        ``scheme``, ``method``, ``group``, ``symmetric``, ``format``; ``linears`` that are
        quantized and ``kept``, the names of those that are not; ``bytes`` of all tensors;
        ``quality`` (None where the configuration does not ask for it).

    Raises:
        UsageError: no folder of that kind, or an option that is not valid.
        UnsupportedError: a method that moves scales into other weights, a checkpoint that is
            quantized already, or no linear to quantize.
        CheckpointError: files that are damaged.
    """
    folder, place = Path(model), Path(output)
    config = _resolved(quantize, trust_remote_code)
    _check_folders(folder, place)
    source = open_source(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if source.quantized_by is not None:
        raise UnsupportedError(
            str(folder),
            expected="a model in numbers",
            found=f"one quantized by {source.quantized_by}",
            remedy="Quantize the original model.",
        )
    graph = lower(capture_causal_lm(source.module), "exported", source.weights)
    limit = min(source.max_position_embeddings or _CONTEXT, _CONTEXT)
    recipe = make_recipe(graph, source, _options(config, trust_remote_code), limit)
    assert recipe is not None
    found = list(_linears(plain_graph(graph), source, recipe))
    if not found:
        raise UnsupportedError(
            f"quantize={config.scheme!r} of {folder}",
            expected="linears that the checkpoint holds as [N, K], one tensor each",
            found="none",
            remedy="Write an engine instead: leave --format out.",
        )
    scheme = SCHEMES[config.scheme]
    grouping = Grouping(
        scheme.codes.torch,
        scheme.block_rows,
        config.group or 0,
        config.symmetric,
        scheme.activations,
    )
    modules = {linear.module for linear in found}
    kept = [
        name
        for name, module in source.module.named_modules()
        if isinstance(module, nn.Linear) and name not in modules
    ]
    with atomic_folder(place) as new:
        tensors = _tensors(open_checkpoint(folder), found, recipe, grouping)
        size = write_tensors(new, tensors)
        _write_rest(folder, new, grouping.settings(kept))
    quality = quality_of(graph, source, recipe, limit)
    return {
        "scheme": config.scheme,
        "method": config.method,
        "group": config.group,
        "symmetric": config.symmetric,
        "format": grouping.format,
        "linears": len(found),
        "kept": [*kept],
        "bytes": size,
        "quality": None if quality is None else quality.to_json(),
    }


def _resolved(quantize: str | QuantConfig, trust_remote_code: bool) -> QuantConfig:
    asked = QuantConfig(quantize) if isinstance(quantize, str) else quantize
    config = _options(asked, trust_remote_code).quantize
    assert config is not None
    if asked.method is None and config.method == "smoothquant":
        return replace(config, method="rtn")
    if config.method in ("awq", "smoothquant"):
        raise UnsupportedError(
            f"method {config.method!r} with compressed-tensors",
            expected="rtn or gptq, which change the weights of linears alone",
            found=f"{config.method}, which moves scales into norms and other weights",
            remedy="Choose rtn or gptq, or write an engine.",
        )
    return config


def _options(config: QuantConfig, trust_remote_code: bool) -> CompileOptions:
    return resolve_options(
        target="cpu",
        backend="eager",
        kv_cache=None,
        dtype="float32",
        max_model_len=None,
        max_batch_size=None,
        verify="off",
        trust_remote_code=trust_remote_code,
        quantize=config,
    )


def _check_folders(folder: Path, place: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UsageError(
            str(folder),
            expected="a Hugging Face folder with config.json and safetensors",
            found="no config.json",
            remedy="Pass such a folder; a .gguf file can become an engine only.",
        )
    if place.exists() and place.resolve() == folder.resolve():
        raise UsageError(
            str(place),
            expected="another folder than the model's",
            found="the same one",
            remedy="Choose another place to write to.",
        )


def _linears(graph: Graph, source: Source, recipe: Recipe) -> Iterator[_Linear]:
    """The linears to quantize whose weights are tensors of the checkpoint, used once each."""
    modules: dict[str, str] = {}
    uses: Counter[str] = Counter()
    for name, weight in source.weights.items():
        stored = _uncast(weight)
        if isinstance(stored, Stored):
            uses[stored.name] += 1
            modules[stored.name] = name.removesuffix(".weight")
    for name in linears_to_quantize(graph, recipe.config):
        whole = _uncast(graph.weights[name])
        members: tuple[object, ...] = (graph.weights[name],)
        if isinstance(whole, Apply) and whole.op == "concat":
            members = whole.args
        stems = [_uncast(member) for member in members]
        if not all(isinstance(stem, Stored) and uses[stem.name] == 1 for stem in stems):
            continue
        start = 0
        for member, stem in zip(members, stems, strict=True):
            assert isinstance(stem, Stored) and isinstance(member, Weight)
            yield _Linear(stem, modules[stem.name], name, member, start)
            start += stem.shape[0]


def _uncast(weight: object) -> object:
    while isinstance(weight, Apply) and weight.op == "cast":
        weight = weight.args[0]
    return weight


def _tensors(
    checkpoint: Checkpoint, linears: list[_Linear], recipe: Recipe, grouping: Grouping
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new checkpoint, in the order of the old one."""
    by_name = {linear.stored.name: linear for linear in linears}
    for name in checkpoint.names():
        if name not in by_name:
            yield name, checkpoint.tensor(name).load()
            continue
        stem = name.removesuffix(".weight")
        for suffix, tensor in grouping.tensors(_codes(by_name[name], recipe)).items():
            yield f"{stem}.{suffix}", tensor


def _codes(linear: _Linear, recipe: Recipe) -> Codes:
    """The codes of one linear: of rows of those that calibration chose, or rounded to nearest."""
    count, width = linear.stored.shape
    made: Parts | None = recipe.made.get(linear.merged)
    start = linear.start if made is not None else 0
    parts = recipe.scheme.parts(linear.weight, recipe.config) if made is None else made

    def rows(suffix: str) -> Tensor:
        tensor = parts[suffix].load()
        return tensor if made is None else tensor[start : start + count].clone()

    codes = rows("codes")
    if codes.dtype == torch.uint8:
        codes = unpack4(codes)[:, :width]
    static = recipe.static.get(linear.merged)
    return Codes(
        codes,
        rows("scale"),
        rows("zero") if "zero" in parts else None,
        None if static is None else static.load().clone(),
    )


def _write_rest(folder: Path, new: Path, settings: dict[str, object]) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _COPIED and ".safetensors" not in file.name:
            shutil.copyfile(file, new / file.name)
    path = new / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps({**raw, "quantization_config": settings}, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
