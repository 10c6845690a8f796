"""Checks a loaded engine: its graphs' texts, and its numbers against the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import TilewrightError, VerificationError
from ..ir.dims import evaluate
from ..ir.graph import Graph, input_name, param_name
from ..ir.interpreter import interpret
from ..ir.parser import parse_graph
from ..ir.types import TensorType
from ..ir.verifier import verify
from ..passes.driver import largest_error
from ..runtime.executor import CACHE_PREFIXES
from ..runtime.image import EngineImage
from ..runtime.runner import ProgramRunner
from .inspect.facts import Setting, bindings, final_graph

PROMPT, CONTEXT = 8, 16
Advance = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was found to hold: what, and the figure behind it."""

    name: str
    found: str


def verify_image(
    image: EngineImage, advance: Advance = lambda phase, share: None
) -> Iterator[Check]:
    """Verifies an engine whose hashes are right; yields each check as it is passed.

    Raises:
        VerificationError: graph text that is ill-formed, or a Program that computes something
            else than its graph.
    """
    for index, (name, text) in enumerate(image.graphs):
        advance(f"graph {name}", 0.4 * index / len(image.graphs))
        _check_text(f"{index:03d}-{name}", text)
    yield Check("graphs", f"{len(image.graphs)} texts parse and are well-formed")
    advance("loading weights", 0.4)
    weights = {name: weight.load() for name, weight in image.weights.items()}
    graph = final_graph(image)
    runner = ProgramRunner(image.program, weights, lambda name: image.files[name])
    steps = _lm_steps if image.lm is not None else _module_steps
    inputs: Mapping[str, torch.Tensor] = {}
    for index, (name, make) in enumerate(steps(graph, image)):
        advance(name, 0.6 + 0.2 * index)
        inputs = make(inputs)
        error, inputs = _compare(f"program, {name}", graph, runner, weights, inputs)
        yield Check(
            f"program, {name}", f"agrees with the interpreter, largest relative error {error:.1e}"
        )


class _Declared:
    """A weight of which only the type is known."""

    def __init__(self, type_: TensorType) -> None:
        self.shape = tuple(size for size in type_.shape if isinstance(size, int))
        self.dtype = type_.dtype.torch

    def load(self) -> torch.Tensor:
        """Nothing to load; never called by the verifier."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _check_text(title: str, text: str) -> None:
    try:
        graph = parse_graph(text)
        # The texts of all passes stand in the folder, but only the last one's weights.
        weights = {param_name(node): _Declared(node.type) for node in graph.params}
        verify(graph.with_weights(weights))
    except TilewrightError as error:
        raise VerificationError(
            f"graph {title}",
            expected="a well-formed graph",
            found=str(error),
            remedy="Compile the model again with this version.",
        ) from error
    if str(graph) != text:
        raise VerificationError(
            f"graph {title}",
            expected="text that prints back as it is",
            found="another text",
            remedy="Compile the model again with this version.",
        )


def _compare(
    culprit: str,
    graph: Graph,
    runner: ProgramRunner,
    weights: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
) -> tuple[float, dict[str, torch.Tensor]]:
    """The largest error of any output, and the inputs with the state as the reference leaves it."""
    ordered = [inputs[input_name(node)] for node in graph.inputs]
    with torch.no_grad():
        expected = interpret(graph, [tensor.clone() for tensor in ordered], weights)
    found = runner.run({name: tensor.clone() for name, tensor in inputs.items()})
    pairs = [(a, found[name]) for name, a in zip(graph.output_names, expected, strict=True)]
    error = largest_error(culprit, [a for a, _ in pairs], [b for _, b in pairs])
    state = dict(zip(graph.output_names, expected, strict=True))
    return error, {name: state.get(name, tensor) for name, tensor in inputs.items()}


Make = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


def _lm_steps(graph: Graph, image: EngineImage) -> list[tuple[str, Make]]:
    """A prefill of 8 random tokens into a new cache, then one token of decode after them."""

    def prefill(_: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        caches = {
            input_name(node): _zeros(node.type, graph, image)
            for node in graph.inputs
            if input_name(node).startswith(CACHE_PREFIXES)
        }
        return {**caches, **_metadata(graph, image, 0, PROMPT)}

    def decode(before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**before, **_metadata(graph, image, PROMPT, 1)}

    return [("prefill", prefill), ("decode", decode)]


def _zeros(type_: TensorType, graph: Graph, image: EngineImage) -> torch.Tensor:
    sizes = bindings(graph, image, Setting("verify", PROMPT, CONTEXT))
    return torch.zeros([evaluate(size, sizes) for size in type_.shape], dtype=type_.dtype.torch)


def _metadata(graph: Graph, image: EngineImage, start: int, count: int) -> dict[str, torch.Tensor]:
    """The inputs of a step of one sequence that begins at slot 0 (page 0 and on)."""
    assert image.lm is not None
    positions = torch.arange(start, start + count)
    generator = torch.Generator().manual_seed(start)
    pages = -(-CONTEXT // image.lm.page_size)
    every = {
        "token_ids": torch.randint(image.lm.vocab_size, (count,), generator=generator),
        "positions": positions,
        "query_start": torch.tensor([0, count], dtype=torch.int32),
        "seq_lens": torch.tensor([start + count], dtype=torch.int32),
        "slot_mapping": positions,
        "block_tables": torch.arange(pages, dtype=torch.int32)[None],
        "logits_indices": torch.tensor([count - 1]),
    }
    wanted = {input_name(node) for node in graph.inputs}
    return {name: tensor for name, tensor in every.items() if name in wanted}


def _module_steps(graph: Graph, image: EngineImage) -> list[tuple[str, Make]]:
    """One call on random inputs; integers are 0 or 1, which every index range holds."""

    def call(_: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = bindings(graph, image, Setting("call", PROMPT, PROMPT))
        return {input_name(node): _random(node.type, sizes, generator) for node in graph.inputs}

    return [("call", call)]


def _random(
    type_: TensorType, sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    shape = [evaluate(size, sizes) for size in type_.shape]
    if type_.dtype.is_float:
        return torch.randn(shape, generator=generator).to(type_.dtype.torch)
    return torch.randint(2, shape, generator=generator).to(type_.dtype.torch)
