"""What an engine takes on a GPU beside its weights and KV pool, at the most, while it works.

    python benchmarks/gpu/check_memory.py ENGINE [--prompt-tokens 1024] [--new-tokens 32]

Prints bytes as JSON: weights, pool, graphs, and the peak of what the driver says is in use. Exit
code 1 where the peak is 1.5 GB or more above weights and pool.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading

import torch

import tilewright as tw

LIMIT = 1.5e9


def main() -> None:
    """Fills the batch, prefills all prompts in full steps, decodes, and looks at the driver."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    free, total = torch.cuda.mem_get_info()
    before = total - free
    with Watch() as watch:
        engine = tw.load(options.engine)
        count = engine.config.max_batch_size
        prompts = torch.randint(engine.config.vocab_size, (count, options.prompt_tokens)).tolist()
        params = tw.SamplingParams(max_new_tokens=options.new_tokens, ignore_eos=True)
        engine.generate(prompts, params)
    pool = sum(tensor.nbytes for tensor in engine.executor.caches.tensors.values())
    weights = sum({t.data_ptr(): t.nbytes for t in engine.runner.constants.values()}.values())
    beside = watch.peak - before - pool - weights
    print(json.dumps({
        "device": torch.cuda.get_device_name(), "sequences": count, "weights": weights,
        "pool": pool, "graphs": engine.executor.graphs.bytes, "in_use_before": before,
        "peak": watch.peak, "allocated_peak": torch.cuda.max_memory_allocated(), "beside": beside,
    }))  # fmt: skip
    sys.exit(int(beside >= LIMIT))


class Watch:
    """The most that the driver said was in use, asked every few milliseconds."""

    def __init__(self) -> None:
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self.done.wait(0.005):
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


if __name__ == "__main__":
    main()
