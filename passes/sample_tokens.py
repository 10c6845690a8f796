"""The step samples: a decoder that gives logits gives tokens too."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import UnsupportedError
from ..ir.build import input_node, make
from ..ir.dims import evaluate
from ..ir.dtypes import DType
from ..ir.graph import Graph, input_name
from ..ir.interpreter import bind_symbols
from ..ir.schema import schema
from ..ir.types import TensorType
from .base import Pass, Tensors

PARAMETERS = {
    "temperature": DType.F32,
    "top_k": DType.I32,
    "top_p": DType.F32,
    "min_p": DType.F32,
    "uniform": DType.F32,
}
"""The inputs that are added, each [R], and their element types."""


def sample_tokens(graph: Graph) -> Graph:
    """Draws a token of each row of the logits, which stay an output.

    Before::

        def decoder(…):
            ...
            return {"logits": linear_0, "k_cache_0": k_new, …}

    After::

        def decoder(…, temperature: f32[R], top_k: i32[R], top_p: f32[R], min_p: f32[R],
                    uniform: f32[R]):
            ...
            sample_0: i64[R] = sample(linear_0, temperature, top_k, top_p, min_p, uniform)
            return {"logits": linear_0, "k_cache_0": k_new, …, "tokens": sample_0}

    Other passes belong before it: what moves a logit by a rounding may move a token.

    Raises:
        UnsupportedError: there is no output ``logits`` of floats [R, V], or the name of what is
            added is taken.
    """
    outputs = dict(zip(graph.output_names, graph.outputs, strict=True))
    logits = outputs.get("logits")
    taken = {input_name(node) for node in graph.inputs} | set(outputs)
    found = sorted(taken & {*PARAMETERS, "tokens"})
    if logits is None or logits.type.rank != 2 or not logits.dtype.is_float or found:
        raise UnsupportedError(
            f"graph {graph.name}",
            expected="an output logits [R, V] of floats, and no tokens or parameters of sampling",
            found=f"{', '.join(found)}" if found else str(logits and logits.type),
            remedy="Sample from the logits outside of the graph.",
        )
    rows = logits.shape[:1]
    given = tuple(input_node(name, TensorType(dtype, rows)) for name, dtype in PARAMETERS.items())
    tokens = make("sample", logits, *given)
    return replace(
        graph,
        inputs=graph.inputs + given,
        outputs=(*graph.outputs, tokens),
        output_names=(*graph.output_names, "tokens"),
    )


def with_parameters(before: Graph, after: Graph, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """The inputs, and parameters of rows that are greedy and random by turns: some with a
    temperature alone, some cut by one or by all of top-k, top-p and min-p.
    """
    logits = dict(zip(before.output_names, before.outputs, strict=True))["logits"]
    count = evaluate(logits.shape[0], bind_symbols(before, inputs))
    row = torch.arange(count)
    kind = row // 2 % 5  # nothing, top-k, top-p, min-p, all
    values = {
        "temperature": torch.where(row % 2 == 0, 0.0, 0.5 + 0.25 * kind),
        "top_k": torch.where((kind == 1) | (kind == 4), 5, 0),
        "top_p": torch.where((kind == 2) | (kind == 4), 0.75, 1.0),
        "min_p": torch.where((kind == 3) | (kind == 4), 0.0625, 0.0),
        "uniform": row * 0.6180339887498949 % 1.0,
    }
    added = (values[name].to(dtype.torch) for name, dtype in PARAMETERS.items())
    return (*inputs, *added)


def without_tokens(after: Graph, inputs: Tensors, outputs: Tensors) -> tuple[torch.Tensor, ...]:
    """The outputs that there were before."""
    return tuple(outputs[:-1])


SAMPLE_TOKENS = Pass("sample_tokens", sample_tokens, with_parameters, without_tokens)


def tokens_of(graph: Graph, inputs: Tensors, logits: torch.Tensor) -> torch.Tensor | None:
    """The tokens i64[R] that the graph's last op draws from other logits than its own, which may
    differ by a rounding; None where it does not sample.
    """
    outputs = dict(zip(graph.output_names, graph.outputs, strict=True))
    node = outputs.get("tokens")
    if node is None or node.op != "sample":
        return None
    given = {input_name(n): tensor for n, tensor in zip(graph.inputs, inputs, strict=True)}
    parameters = (given[input_name(operand)] for operand in node.operands[1:])
    tokens = schema("sample").reference(logits, *parameters)
    assert isinstance(tokens, torch.Tensor)
    return tokens
