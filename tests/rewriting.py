"""Shared by the tests of passes: parse, run, compare text, compare numbers in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from tilewright.formats.weights import Held
from tilewright.ir.dims import evaluate
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph, param_name
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.verifier import verify


def draw(dtype: DType, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    if dtype is DType.BOOL:
        return torch.rand(tuple(shape), generator=generator) > 0.5
    if dtype.is_integer:
        return torch.randint(0, 5, tuple(shape), generator=generator).to(dtype.torch)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype.torch)


def draw_inputs(
    graph: Graph, sizes: Mapping[str, int], generator: torch.Generator
) -> list[torch.Tensor]:
    """A random tensor for each input, symbols bound by ``sizes``."""
    return [
        draw(node.dtype, [evaluate(size, sizes) for size in node.shape], generator)
        for node in graph.inputs
    ]


def with_weights(graph: Graph, generator: torch.Generator) -> Graph:
    """The graph with a random weight for each param that has none."""
    missing = [p for p in graph.params if param_name(p) not in graph.weights]
    return graph.with_weights(
        {param_name(p): Held(draw(p.dtype, p.shape, generator), param_name(p)) for p in missing}
    )


def parse(text: str, seed: int = 0, weights: Mapping[str, Held] | None = None) -> Graph:
    """The verified graph of a text, with random weights unless given."""
    generator = torch.Generator().manual_seed(seed)
    return verify(with_weights(parse_graph(text, weights), generator))


def assert_same_numbers(
    before: Graph,
    after: Graph,
    sizes: Mapping[str, int] | None = None,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> None:
    """Both graphs give the same outputs on the same random inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = draw_inputs(before, sizes or {}, generator)
    verify(after)
    for old, new in zip(interpret(before, inputs), interpret(after, inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=tolerance, atol=tolerance, equal_nan=True)


def check(
    function: Callable[[Graph], Graph],
    before: str,
    after: str | None,
    sizes: Mapping[str, int] | None = None,
    tolerance: float = 1e-9,
    weights: Mapping[str, Held] | None = None,
) -> Graph:
    """``function`` turns the text ``before`` into ``after`` (None: into itself), and the
    numbers agree in float64.

    For the numbers, f32 in the text is read as f64.
    """
    graph = parse(before, weights=weights)
    result = function(graph)
    wanted = str(graph) if after is None else str(parse_graph(after))
    assert str(result) == wanted, f"\n{result}\ninstead of\n{wanted}"
    wide_weights = {k: Held(_wide(w.load()), k) for k, w in graph.weights.items()}
    wide = verify(parse_graph(before.replace("f32", "f64"), wide_weights))
    assert_same_numbers(wide, function(wide), sizes, tolerance)
    return result


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.dtype == torch.float32 else tensor
