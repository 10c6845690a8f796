"""What a plain module is captured with: the user's inputs, or those that its file tells."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedError
from .capture import DynamicShapes, Examples
from .module_lm import example_ids
from .options import CompileOptions
from .sources import Source


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a plain module is captured with."""

    examples: Examples | None
    dynamic_shapes: DynamicShapes


def inputs_of(source: Source, examples: Examples | None, dynamic_shapes: DynamicShapes) -> Inputs:
    """What the user gave; of an ONNX file with fixed sizes, or a decoder, what the file says."""
    if source.kind != "onnx" or examples is not None:
        return Inputs(examples, dynamic_shapes)
    if source.examples is None:
        from .onnx_import import missing_profile  # brings onnx

        raise missing_profile(source)
    return Inputs(source.examples, dynamic_shapes)


def may_generate(source: Source, inputs: Inputs, options: CompileOptions) -> bool:
    """Whether a plain module is tried as a causal LM: one example of token ids i64[1, S], no
    dynamic_shapes.

    Raises:
        UnsupportedError: a form of KV cache was named, and the inputs are others.
    """
    if source.is_causal_lm or options.cache is None:
        return False
    if example_ids(inputs.examples) is not None and inputs.dynamic_shapes is None:
        return True
    if options.cache_named:
        raise UnsupportedError(
            "option kv_cache",
            expected="token ids i64[1, S] as the only example input, and no dynamic_shapes",
            found="other inputs",
            remedy="Leave kv_cache out: the module is then compiled as a plain module.",
        )
    return False
