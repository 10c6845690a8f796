"""Whether a prompt of 128k tokens takes memory beside weights, KV cache and a chunk's activations.

    python benchmarks/bench_long_prompt.py CONFIG --out FILE [--lengths 4096,32768,131072]

One engine with random weights and a KV cache for the longest prompt. For each length: the time to
the first token, and the peak of what was allocated beside what the idle engine holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import tilewright as tw
from tilewright.runtime.engine import CausalLMEngine


def main() -> None:
    """Compiles, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", default="4096,32768,131072")
    options = parser.parse_args()
    lengths = [int(one) for one in options.lengths.split(",")]
    engine = tw.compile(
        options.config,
        random_weights=0,
        dtype="bfloat16",
        max_model_len=max(lengths) + 16,
        max_batch_size=1,
        verify="structure",
    )
    assert isinstance(engine, CausalLMEngine)
    engine.warm_up()
    kv_bytes = engine.executor.bytes_per_token * engine.pool.num_pages * engine.pool.page_size
    found = {
        "device": torch.cuda.get_device_name(),
        "held_mb": torch.cuda.memory_allocated() / 1e6,
        "kv_mb": kv_bytes / 1e6,
        "lengths": [_measure(engine, length) for length in lengths for _ in range(2)],
    }
    options.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found))


def _measure(engine: CausalLMEngine, length: int) -> dict[str, float]:
    prompt = np.random.default_rng(length).integers(engine.config.vocab_size, size=length).tolist()
    engine.reset_prefix_cache()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (done,) = engine.generate([prompt], tw.SamplingParams(max_new_tokens=1))
    torch.cuda.synchronize()
    beside = (torch.cuda.max_memory_allocated() - before) / 1e6
    result = {"tokens": float(length), "ttft_ms": done.timings.ttft * 1e3, "beside_mb": beside}
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
