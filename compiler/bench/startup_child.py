"""One process of ``bench startup PATH BACKEND [CHECKPOINT]``: prints each phase as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(path: str, backend: str, checkpoint: str | None = None) -> None:
    """Imports, loads or compiles, and generates one token."""
    started = time.perf_counter()
    import torch

    from ...runtime.base_engine import RunningEngine
    from ...runtime.engine import CausalLMEngine, load
    from ...runtime.params import SamplingParams

    imported = time.perf_counter()
    if (Path(path) / "manifest.json").is_file():
        engine = load(path, checkpoint)
    else:
        from ..api import compile

        engine = compile(path, backend=backend, verify="structure")
    ready = time.perf_counter()
    if isinstance(engine, CausalLMEngine):
        prompt = torch.arange(1, 5).tolist()
        engine.generate([prompt], SamplingParams(max_new_tokens=1, ignore_eos=True))
    weights = engine.weight_load.seconds if isinstance(engine, RunningEngine) else 0.0
    times = {
        "import": imported - started,
        "ready": ready - imported,
        "weights": weights,
        "first_token": time.perf_counter() - ready,
    }
    print(json.dumps(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
