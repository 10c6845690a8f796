"""The Source of an ONNX file, and the tensors to capture it with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import UsageError
from ...formats.stored_codes import codes_of
from ..sources import Source, read_json
from .decoder import OnnxDecoder, facts_of, is_decoder
from .model import Input
from .module import OnnxGraph, Steps, parameter_name
from .reader import read_onnx

_EXAMPLE_TOKENS = 8


def open_onnx(path: Path) -> Source:
    """Opens an ONNX file.

    Raises:
        CheckpointError, UnsupportedError: as `read_onnx`.
    """
    model = read_onnx(path)
    decodes = is_decoder(model)
    module: Steps = OnnxDecoder(model) if decodes else OnnxGraph(model)
    weights = {home: model.weights[name] for name, home in module.weight_names().items()}
    ends, longest = (
        facts_of(read_json(path.parent / "generation.json", required=False))
        if decodes
        else ((), None)
    )
    tokenizer = decodes and (path.parent / "tokenizer.json").exists()
    return Source(
        "onnx",
        str(path),
        module.eval(),
        weights,
        eos_token_ids=ends,
        max_position_embeddings=longest,
        tokenizer=path.parent if tokenizer else None,
        quantized_by="onnx" if any(map(codes_of, weights.values())) else None,
        examples=_decoder_example() if decodes else _examples(model.inputs),
        inputs=tuple(map(str, model.inputs)),
    )


def _decoder_example() -> Mapping[str, object]:
    return {"input_ids": torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64)}


def _examples(inputs: tuple[Input, ...]) -> Mapping[str, object] | None:
    """Zeros of the inputs' shapes; None where a size is open."""
    examples = {}
    for given in inputs:
        sizes = [dim for dim in given.dims if isinstance(dim, int)]
        if len(sizes) < len(given.dims):
            return None
        examples[parameter_name(given.name)] = torch.zeros(sizes, dtype=given.dtype)
    return examples


def missing_profile(source: Source) -> UsageError:
    """The error for a file of open sizes that is compiled without any."""
    return UsageError(
        f"dynamic shapes of {source.name}",
        expected="example_inputs, whose sizes are taken, and dynamic_shapes for those that vary",
        found=f"open sizes in {', '.join(text for text in source.inputs)}",
        remedy="Call tilewright.compile(path, {name: tensor, …}, dynamic_shapes={name: {axis: "
        "torch.export.Dim(…)}}), or export the model with fixed sizes.",
    )
