"""Whether text without end stays as good as it begins: the perplexity of one long stream through a
window with sinks, block by block, beside that of each block alone in a dense context.

    python benchmarks/sinks_perplexity.py MODEL TEXT [--tokens 100000 --window 4096 --sinks 4]

The stream is one request, prefilled through a cache of constant size; the pages that it holds are
counted after each step. A block is as long as the window, so a dense block never sees more than the
stream does. One JSON object a block and one for all with --json, else a table; what lies behind the
last whole block is left out.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import tilewright as tw
from tilewright.compiler.calibrate.text import encode_text
from tilewright.runtime.engine import CausalLMEngine
from tilewright.targets import Target


@dataclass(frozen=True, slots=True)
class Block:
    """Some tokens of the stream.

    Attributes:
        start, stop: which ones.
        stream: their perplexity as the stream has it, of all but the first.
        dense: the same where nothing comes before the first; None if that was not asked for.
        pages: the most that the stream has held up to here.
    """

    start: int
    stop: int
    stream: float
    dense: float | None
    pages: int


def main() -> None:
    """Measures a stream, and prints what came of it."""
    options = _options()
    target = Target.detect() if options.target == "auto" else Target.parse(options.target)
    backend = options.backend or ("eager" if target.is_cpu else "triton")
    window, sinks = options.window, options.sinks

    def engine_of(cache: tw.KVCacheConfig, longest: int | None) -> CausalLMEngine:
        engine = tw.compile(
            options.model,
            target=target,
            backend=backend,
            dtype=options.dtype,
            kv_cache=cache,
            max_model_len=longest,
            max_batch_size=1,
            verify="structure",
        )
        assert isinstance(engine, CausalLMEngine)
        return engine

    cache = tw.KVCacheConfig(
        dtype=options.kv_cache_dtype, window=window, sinks=sinks, prefix_caching=False
    )
    engine = engine_of(cache, None)
    assert engine.tokenizer is not None, "a text needs a tokenizer"
    ids = encode_text(engine.tokenizer, options.text)[: options.tokens]
    stream, pages = scores(engine, ids)
    blocks = [range(at, min(at + window, len(ids))) for at in range(0, len(ids), window)]
    blocks = [block for block in blocks if len(block) == window or len(blocks) == 1]
    whole = None
    if not options.no_dense:
        del engine  # its memory is the next one's
        plain = tw.KVCacheConfig(dtype=options.kv_cache_dtype, prefix_caching=False)
        whole = engine_of(plain, window + 1)
    found: list[Block] = []
    if not options.json:
        print(f"{'tokens':>16} {'stream':>9} {'dense':>9} {'ratio':>7} {'pages':>6}")
    for block in blocks:
        ours = perplexity(stream[block.start : block.stop - 1])
        dense = None
        if whole is not None:
            dense = perplexity(scores(whole, ids[block.start : block.stop])[0])
        found.append(Block(block.start, block.stop, ours, dense, max(pages[: block.stop])))
        _print(found[-1], options.json)
    total = _total(found, {"window": window, "sinks": sinks, "backend": backend})
    print(json.dumps(total) if options.json else ", ".join(f"{n} {v}" for n, v in total.items()))


def scores(engine: CausalLMEngine, ids: list[int]) -> tuple[list[float], list[int]]:
    """The logprobs of all tokens but the first, and pages held after each token was computed."""
    pool, pages = engine.pool, [0] * len(ids)
    before = engine.counters.tokens_computed

    def count(counters: object) -> None:
        done = engine.counters.tokens_computed - before
        pages[min(done, len(ids)) - 1] = pool.num_pages - 1 - pool.num_available

    params = tw.SamplingParams(max_new_tokens=2, ignore_eos=True, prompt_logprobs=0)
    ((one,),) = engine.loop.generate([ids], params, count)
    assert one.prompt_logprobs is not None
    return [entry.logprob for entry in one.prompt_logprobs if entry is not None], pages


def perplexity(logprobs: list[float]) -> float:
    """Of tokens with these logprobs."""
    return math.exp(-sum(logprobs) / len(logprobs))


def _print(block: Block, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(block)), flush=True)
        return
    alone = "" if block.dense is None else f"{block.dense:9.3f}"
    ratio = "" if block.dense is None else f"{block.stream / block.dense:7.4f}"
    row = f"{block.stop:>16} {block.stream:9.3f} {alone:>9} {ratio:>7} {block.pages:>6}"
    print(row, flush=True)


def _total(blocks: list[Block], setting: dict[str, object]) -> dict[str, object]:
    def mean(values: list[float]) -> float | None:
        return math.exp(sum(map(math.log, values)) / len(values)) if values else None

    alone = [(block.stream, block.dense) for block in blocks if block.dense is not None]
    ratios = [stream / dense for stream, dense in alone]
    return {
        **setting,
        "tokens": blocks[-1].stop,
        "stream": mean([block.stream for block in blocks]),
        "dense": mean([dense for _, dense in alone]),
        "ratio": mean(ratios),
        "worst_ratio": max(ratios, default=None),
        "pages": blocks[-1].pages,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("model", help="a Hugging Face folder or a .gguf file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the text's beginning")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--backend", help="triton on a GPU and eager on a CPU, if it is left out")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8", "int8"])
    parser.add_argument("--no-dense", action="store_true", help="the stream alone")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the module's text as it is."""


if __name__ == "__main__":
    main()
