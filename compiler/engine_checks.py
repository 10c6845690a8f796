"""Checks a loaded engine: its graphs' texts, and its numbers against the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..codegen.persistent.beside import launches_of, without_launches
from ..errors import TilewrightError, VerificationError
from ..ir.dims import evaluate
from ..ir.graph import Graph, input_name, param_name
from ..ir.interpreter import interpret
from ..ir.parser import parse_graph
from ..ir.types import TensorType
from ..ir.verifier import verify
from ..passes.engine_error import engine_error
from ..runtime.base_engine import runs_here
from ..runtime.executor import CACHE_PREFIXES
from ..runtime.image import EngineImage
from ..runtime.runner import ProgramRunner
from ..runtime.step_buffer import GROUPS, SAMPLING
from ..runtime.token_choice import TOKENS
from ..targets import Target
from .inspect.facts import Setting, bindings, final_graph, graph_texts

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
    texts = graph_texts(image)
    for index, (name, text) in enumerate(texts):
        advance(f"graph {name}", 0.4 * index / len(texts))
        _check_text(f"{index:03d}-{name}", text)
    yield Check("graphs", f"{len(texts)} texts parse and are well-formed")
    advance("loading weights", 0.4)
    weights = {name: weight.load() for name, weight in image.weights.items()}
    steps = _module_steps(image) if image.lm is None else _lm_steps(image)
    done, inputs = 0, dict[str, torch.Tensor]()
    for what, part, own in steps:
        graph = final_graph(part)
        runner = ProgramRunner(part.program, weights, lambda name: image.files[name])
        for name, make in own:
            advance(f"{what}, {name}", 0.6 + 0.1 * done)
            inputs = make(graph, inputs)
            error, inputs = _compare(f"{what}, {name}", graph, runner, weights, inputs)
            yield Check(f"{what}, {name}", _agrees(error))
            done += 1
    if image.decode is not None and launches_of(image.decode.program):
        advance("one launch", 0.95)
        yield from _launches(image, weights, inputs)


def _agrees(error: float) -> str:
    return f"agrees with the interpreter, largest relative error {error:.1e}"


def _launches(
    image: EngineImage,
    weights: Mapping[str, torch.Tensor],
    before: Mapping[str, torch.Tensor],
) -> Iterator[Check]:
    """Steps as one launch for all layers, whose machine code runs on the device."""
    target, part = Target.parse(image.target), image.decoding
    if not runs_here(target):
        yield Check("one launch", f"not run: that takes a {target.sm} device")
        return
    graph, device = final_graph(part), torch.device(target.device_type)
    there = {name: tensor.to(device) for name, tensor in weights.items()}
    runner = ProgramRunner(part.program, there, lambda name: image.files[name], device=device)
    for launch in launches_of(part.program):
        count = int(str(launch.attrs.get("batch", 1)))
        name = f"one launch, batch {count}"
        step = _each_by_itself(_metadata(graph, image, PROMPT, count))
        try:
            error, _ = _compare(name, graph, runner, weights, {**before, **step})
        finally:
            given_up = runner.recover()
            if given_up is not None:  # which says more than that its logits are none
                raise given_up
        yield Check(name, _agrees(error))


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
    inputs = {input_name(node): inputs[input_name(node)] for node in graph.inputs}
    ordered = [inputs[input_name(node)] for node in graph.inputs]
    with torch.no_grad():
        expected = interpret(graph, [tensor.clone() for tensor in ordered], weights)
    shared = "shared_pages" in inputs and bool(inputs["shared_pages"].any())
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    found = {name: t.cpu() for name, t in runner.run(copies, shared=shared).items()}
    state = dict(zip(graph.output_names, expected, strict=True))
    wanted = {name: value for name, value in state.items() if name != TOKENS}
    error = engine_error(culprit, graph, wanted, found)
    if TOKENS in state:
        _check_tokens(culprit, found["logits"], found[TOKENS])
    return error, {name: state.get(name, tensor) for name, tensor in inputs.items()}


def _check_tokens(culprit: str, logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Greedy tokens are likeliest by the Program's own logits: a rounding of those may make another
    one the likeliest.
    """
    valid = bool(((tokens >= 0) & (tokens < logits.shape[-1])).all())
    if not valid or not torch.equal(logits.gather(-1, tokens[:, None])[:, 0], logits.amax(-1)):
        raise VerificationError(
            culprit,
            expected=f"the likeliest tokens of its logits, {logits.argmax(-1).tolist()}",
            found=str(tokens.tolist()),
            remedy="Compile the model again with this version, and report this if it stays.",
        )


Make = Callable[[Graph, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
Steps = list[tuple[str, EngineImage, list[tuple[str, Make]]]]
"""What is checked, the image as it runs that, and steps: of a graph and the state before."""


def _lm_steps(image: EngineImage) -> Steps:
    """A prefill of 8 random tokens into a new cache, then one token of decode after them. If decode
    steps have a Program of their own: one more token, and 8 tokens as sequences that end with them,
    once more as a group that shares its first page, if it can read that once.
    """
    context = _context(image)

    def prefill(graph: Graph, _: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        caches = {
            input_name(node): _zeros(node.type, graph, image, context)
            for node in graph.inputs
            if input_name(node).startswith(CACHE_PREFIXES)
        }
        return {**caches, **_metadata(graph, image, 0, PROMPT)}

    def decode(graph: Graph, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**before, **_metadata(graph, image, PROMPT, 1)}

    def one(graph: Graph, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**before, **_each_by_itself(_metadata(graph, image, PROMPT + 1, 1))}

    def several(graph: Graph, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**before, **_each_by_itself(_metadata(graph, image, 0, PROMPT))}

    def sharing(graph: Graph, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert image.lm is not None
        step = _each_by_itself(_metadata(graph, image, image.lm.page_size, PROMPT))
        rows = torch.arange(PROMPT, dtype=torch.int32)
        once = dict.fromkeys(("group_ids", "shared_pages"), torch.ones_like(rows))
        return {**before, **step, "group_rows": rows, **once}

    general: Steps = [("program", image, [("prefill", prefill), ("decode", decode)])]
    if image.decode is None:
        return general
    each: list[tuple[str, Make]] = [("one sequence", one), (f"{PROMPT} sequences", several)]
    if context > CONTEXT:
        each.append((f"{PROMPT} sequences that share a page", sharing))
    part = image.decoding
    if launches_of(part.program):
        part = replace(part, program=without_launches(part.program))
    return [*general, ("decode program", part, each)]


def _each_by_itself(step: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every token of a step of one sequence as a sequence of its own that ends with it, over the
    same pages: they are all written before any is read. Its next token is the likeliest.
    """
    count = len(step["token_ids"])
    return {
        **step,
        "seq_lens": (step["positions"] + 1).to(torch.int32),
        "block_tables": step["block_tables"].expand(count, -1).contiguous(),
        **{
            name: torch.full((count,), int(name == "top_p"), dtype=dtype)
            for name, dtype in SAMPLING.items()
        },
        **{name: torch.zeros(count, dtype=dtype) for name, dtype in GROUPS.items()},
    }


def _context(image: EngineImage) -> int:
    """Tokens that there is room for: a page and more, if a decode step may share it."""
    assert image.lm is not None
    needed = max(image.lm.page_size + PROMPT, CONTEXT + 1)
    shares = image.decode is not None and image.decode.program.shares
    return needed if shares and needed <= image.lm.max_model_len else CONTEXT


def _zeros(type_: TensorType, graph: Graph, image: EngineImage, context: int) -> torch.Tensor:
    sizes = bindings(graph, image, Setting("verify", PROMPT, context))
    return torch.zeros([evaluate(size, sizes) for size in type_.shape], dtype=type_.dtype.torch)


def _metadata(graph: Graph, image: EngineImage, start: int, count: int) -> dict[str, torch.Tensor]:
    """The inputs of a step of one sequence that begins at slot 0 (page 0 and on)."""
    assert image.lm is not None
    positions = torch.arange(start, start + count)
    generator = torch.Generator().manual_seed(start)
    pages = -(-_context(image) // image.lm.page_size)
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


def _module_steps(image: EngineImage) -> Steps:
    """One call on random inputs; integers are 0 or 1, which every index range holds."""

    def call(graph: Graph, _: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = bindings(graph, image, Setting("call", PROMPT, PROMPT))
        return {input_name(node): _random(node.type, sizes, generator) for node in graph.inputs}

    return [("program", image, [("call", call)])]


def _random(
    type_: TensorType, sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    shape = [evaluate(size, sizes) for size in type_.shape]
    if type_.dtype.is_float:
        return torch.randn(shape, generator=generator).to(type_.dtype.torch)
    return torch.randint(2, shape, generator=generator).to(type_.dtype.torch)
