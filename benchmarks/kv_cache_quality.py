"""What a KV cache of codes costs in quality: perplexity of a text by engines that differ in their
cache alone.

    python benchmarks/kv_cache_quality.py MODEL TEXT [--dtype fp8 --dtype int8 --tokens 8192]

Windows of the text are prefilled through the paged cache, on the eager backend in float32: each
token's attention reads what the codes of all before it stand for. One JSON object a cache type.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import tilewright as tw
from tilewright.compiler.calibrate.text import encode_text
from tilewright.compiler.quality.compare import Logits, compare
from tilewright.formats.tokenizer import Tokenizer


def main() -> None:
    """Measures every cache type that was named against numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("model", help="a Hugging Face folder or a .gguf file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--dtype", action="append", choices=["fp8", "int8"])
    parser.add_argument("--tokens", type=int, default=8192, help="of the text's beginning")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--stride", type=int, default=512, help="new tokens of each further window")
    options = parser.parse_args()
    base, tokenizer = _logits(options.model, "auto", options.length)
    ids = encode_text(tokenizer, options.text)[: options.tokens]
    for dtype in options.dtype or ["fp8", "int8"]:
        model, _ = _logits(options.model, dtype, options.length)
        found = compare(base, model, ids, options.length, options.stride)
        print(json.dumps({"kv_cache": dtype, **found.to_json()}), flush=True)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the module's text as it is."""


def _logits(model: str, dtype: str, length: int) -> tuple[Logits, Tokenizer]:
    engine = tw.compile(
        model,
        target="cpu",
        backend="eager",
        dtype="float32",
        kv_cache=tw.KVCacheConfig(dtype=dtype),
        max_model_len=length,
        max_batch_size=1,
        verify="structure",
    )
    assert engine.image.tokenizer is not None, "a text needs a tokenizer"

    def run(ids: torch.Tensor) -> torch.Tensor:
        found = engine(ids)
        assert isinstance(found, torch.Tensor)
        return found

    return run, engine.image.tokenizer


if __name__ == "__main__":
    main()
