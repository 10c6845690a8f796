"""A few prefill and decode steps of an engine, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --report-api-errors no \
        python benchmarks/gpu/decode_once.py ENGINE --checkpoint MODEL.gguf

The caches are filled with NaN first, so that a read beyond a sequence also shows in the tokens.
"""

from __future__ import annotations

import argparse

import torch

import tilewright as tw


def main() -> None:
    """Generates from three prompts at once, then from one alone, and prints the tokens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("--checkpoint")
    parser.add_argument("--tokens", type=int, default=8)
    options = parser.parse_args()
    engine = tw.load(options.engine, checkpoint=options.checkpoint)
    for tensor in engine.executor.caches.tensors.values():
        tensor.fill_(torch.nan)
    params = tw.SamplingParams(max_new_tokens=options.tokens, ignore_eos=True)
    prompts = [[1, 504, 3575, 282, 4649], list(range(300, 340)), [17] * 19]
    together = [completion.token_ids for completion in engine.generate(prompts, params)]
    alone = engine.generate(prompts[:1], params)[0].token_ids
    torch.cuda.synchronize()
    print("tokens", together, "the same alone:", alone == together[0])


if __name__ == "__main__":
    main()
