"""A ring of weights for long: real text beside the separate kernels, a million launches, races.

    export PYTHONPATH=$PYTHONPATH:tests     # for the small model
    python benchmarks/soak_ring.py text SmolLM2.gguf wikitext.txt [--steps 10000]
    python benchmarks/soak_ring.py launches [--count 1000000]
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/soak_ring.py few

``text`` feeds a text's tokens to both ways, each with its own caches, in windows of 1000 tokens,
and compares the token that each would choose next: it may differ only where the separate kernels'
best two logits are nearer to each other than both ways' logits are. ``launches`` replays a step of
a small model of random weights, and looks at the logits' bits. ``few`` launches it a few times.
Exit code 1 where something differs; a launch that hangs ends by its watchdog.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from persistent_steps import DEVICE, PAGE, ROUNDING, Tensors, graph_path, place
from persistent_steps import step_inputs as inputs_of_steps

import tilewright as tw
from persistent_forms import WHOLE, step_inputs
from tilewright.codegen.persistent.loading import decoder
from tilewright.codegen.persistent.reading import Shape, read_decode
from tilewright.codegen.persistent.ring_decode import RingDecode
from tilewright.codegen.persistent.ring_source import RingCut
from tilewright.codegen.persistent.source import compile_persistent, source_of
from tilewright.ir.parser import parse_graph
from tilewright.runtime.engine import CausalLMEngine
from tilewright.targets import Target

WINDOW = 1000  # tokens of a text
TOGETHER = 100  # launches of a graph


def main() -> None:
    """Runs one of the three."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("text", "launches", "few"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--count", type=int, default=1_000_000)
    options = parser.parse_args()
    if options.what == "text":
        good = text_steps(*options.files, options.steps)
    else:
        good = launches(options.count if options.what == "launches" else 3, options.what)
    sys.exit(0 if good else 1)


def ring(shape: Shape, weights: Tensors) -> RingDecode:
    """The launch of a shape on this device."""
    target = Target.detect()
    cut = RingCut(programs=target.sms)
    source = source_of(shape, cut)
    (binary,) = compile_persistent([source], target.arch)
    made = decoder(shape, cut, weights, source, binary, torch.device(DEVICE))
    assert isinstance(made, RingDecode)
    return made


@torch.inference_mode()
def launches(count: int, what: str) -> bool:
    """Whether all launches of a small model's step end with the same bits."""
    pages = list(range(8))
    weights = {name: tensor.cuda() for name, tensor in WHOLE.tensors(1, len(pages)).items()}
    given = step_inputs(pages, 100, 7, WHOLE.page)
    inputs = {name: tensor.cuda() for name, tensor in given.items()}
    ours = ring(read_decode(WHOLE.graph()), weights)
    if what == "few":
        ours.limit = 1 << 30  # each look takes long where all of them are watched
    ours.run(inputs, weights)
    ours.check()
    logits = ours.logits.clone()
    replay = _captured(lambda: ours.run(inputs, weights)) if what == "launches" else None
    begun = time.perf_counter()
    for index in range(-(-count // TOGETHER) if replay else count):
        if replay is not None:
            replay()
        else:
            ours.run(inputs, weights)
        if index % 100 == 99:
            ours.check()
    ours.check()
    same = torch.equal(ours.logits, logits)
    took = time.perf_counter() - begun
    print(
        f"{count} launches in {took:.1f} s, logits {'equal' if same else 'DIFFER'}, none given up"
    )
    return same


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(TOGETHER):
            run()
    return graph.replay


def text_steps(model: Path, text: Path, steps: int) -> bool:
    """Whether both ways choose the same tokens of a text, but for those that are as near."""
    engine = tw.compile(
        str(model),
        dtype="bfloat16",
        quantize="expanded",
        max_model_len=WINDOW + 4 * PAGE,
        max_batch_size=1,
        memory_fraction=0.5,
        verify="off",
        decode="kernels",
    )
    assert isinstance(engine, CausalLMEngine) and engine.tokenizer is not None
    ids = engine.tokenizer.encode(text.read_text(encoding="utf-8")[: 8 * steps])[:steps]
    with torch.inference_mode():  # the engine's caches are written to
        return _both(engine, ids)


def _both(engine: CausalLMEngine, ids: list[int]) -> bool:
    image, runner = engine.image, engine.decode_runner  # type: ignore[attr-defined]
    shape = read_decode(parse_graph(image.decode.graphs[-1][1]))
    weights = {
        runner.program.weights[buffer]: tensor
        for buffer, tensor in runner.constants.items()
        if buffer in runner.program.weights
    }
    inputs = inputs_of_steps(WINDOW)
    pages = inputs["block_tables"].numel() + 1
    caches = {name: one[:pages].clone() for name, one in engine.executor.caches.tensors.items()}  # type: ignore[attr-defined]
    own = {name: tensor.clone() for name, tensor in caches.items()}
    replay, found = graph_path(runner, caches, inputs, 0)
    ours = ring(shape, weights)
    ours.run(inputs, own)
    step = _captured_once(lambda: ours.run(inputs, own))
    return _compared(ids, inputs, replay, found["logits"], step, ours)


def _captured_once(run: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _compared(
    ids: list[int],
    inputs: Tensors,
    replay: Callable[[], None],
    logits: torch.Tensor,
    step: Callable[[], None],
    ours: RingDecode,
) -> bool:
    equal, near, far, spreads = 0, 0, 0, []
    for index, token in enumerate(ids):
        place(inputs, index % WINDOW)
        inputs["token_ids"].fill_(token)
        replay()
        step()
        theirs, mine = logits.float(), ours.logits.float()
        off = (mine - theirs).abs().max()
        best, chosen = theirs.argmax(), mine.argmax()
        gap = theirs.max() - theirs[0, chosen]
        spreads.append((mine - theirs).square().mean().sqrt() / theirs.std())
        same, tie = bool(best == chosen), bool(gap <= 2 * off)
        equal, near, far = equal + same, near + (not same and tie), far + (not same and not tie)
    ours.check()
    offs = torch.stack(spreads)
    middle, most, worst = (float(offs.quantile(q)) for q in (0.5, 0.99, 1.0))
    print(
        f"{len(ids)} steps of text: {equal} tokens equal, {near} within rounding, {far} others; "
        f"logits off {middle:.4f} std in root mean squares (median; 99 in 100 {most:.4f}, "
        f"most {worst:.4f})"
    )
    return far == 0 and middle <= ROUNDING


if __name__ == "__main__":
    main()
