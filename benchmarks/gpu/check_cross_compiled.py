"""An engine that was compiled without a GPU, run on one, beside Hugging Face on the same device.

    python benchmarks/gpu/check_cross_compiled.py ENGINE --checkpoint MODEL.gguf [--tokens 64]

The engine runs in a process of its own, where triton, transformers and Tilewright's compiler and
passes cannot be imported and no C compiler is on the PATH. Its greedy tokens are compared with
Hugging Face's in the engine's element type: float32 has to give the same ones; bfloat16 the same up
to the first near-tie, a top-2 gap of Hugging Face's logits below 0.05. Exit code 1 if it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
NEAR_TIE = 0.05
QUESTIONS = (
    "What is the capital of France?",
    "Explain photosynthesis in one sentence.",
    "Write a haiku about the sea.",
    "What is 17 times 23?",
    "Who wrote Hamlet?",
    "List three uses of copper.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is a prime number?",
    "Describe a cat to someone who never saw one.",
    "What causes tides?",
    "Name the planets of the solar system.",
    "Write a Python function that reverses a string.",
    "What happened in 1969?",
    "How does a bicycle stay upright?",
    "Summarise the plot of Romeo and Juliet.",
    "What is the boiling point of water at sea level?",
    "Tell me a short story about a lighthouse.",
    "What is the difference between weather and climate?",
)
ALONE = """
import json, sys, time
BLOCKED = ("triton", "transformers", "tilewright.compiler", "tilewright.passes")
sys.modules.update(dict.fromkeys(BLOCKED))  # importing one raises ModuleNotFoundError
import tilewright as tw
questions, tokens = json.loads(sys.argv[3]), int(sys.argv[4])
started = time.perf_counter()
engine = tw.load(sys.argv[1], checkpoint=sys.argv[2])
loaded = time.perf_counter() - started
prompts = [engine.chat_prompt([{"role": "user", "content": q}]) for q in questions]
params = tw.SamplingParams(max_new_tokens=tokens, ignore_eos=True)
found = [engine.generate([prompt], params)[0] for prompt in prompts]
together = engine.generate(prompts[:8], params)
graphs = engine.executor.graphs
print(json.dumps({
    "prompts": prompts, "tokens": [c.token_ids for c in found], "texts": [c.text for c in found],
    "together": [c.token_ids for c in together], "loaded_seconds": loaded,
    "calls": dict(engine.report()["calls"]), "graphs": sorted(graphs.captured) if graphs else [],
    "graph_bytes": graphs.bytes if graphs else 0,
    "itl_ms": 1e3 * sorted(found[-1].timings.itl)[tokens // 2],
    "imported_though_blocked": [m for m in BLOCKED if sys.modules.get(m) is not None],
}))
"""


def main() -> int:
    """Compares, prints a line a prompt and a JSON line last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    ours = _run_alone(options)
    manifest = json.loads((Path(options.engine) / "program.json").read_text())
    dtype = torch.bfloat16 if "bf16" in manifest["buffers"]["k_cache_0"] else torch.float32
    from e2e.smollm2 import hugging_face_model

    model = hugging_face_model(Path(options.checkpoint)).to(dtype).cuda()
    exact = ties = 0
    wrong = []
    for index, (prompt, tokens) in enumerate(zip(ours["prompts"], ours["tokens"], strict=True)):
        expected, gaps = _greedy(model, prompt, options.tokens)
        pairs = enumerate(zip(tokens, expected, strict=True))
        first = next((i for i, (a, b) in pairs if a != b), None)
        tie = next((i for i, gap in enumerate(gaps) if gap < NEAR_TIE), None)
        if first is None:
            exact += 1
        elif dtype is torch.bfloat16 and tie is not None and tie <= first:
            ties += 1
            print(f"prompt {index}: differs at token {first}, first near-tie at {tie}")
        else:
            wrong.append((index, first, gaps[first]))
            print(f"prompt {index}: DIFFERS at token {first}, gap {gaps[first]:.4f}, tie at {tie}")
    batched = sum(a == b for a, b in zip(ours["together"], ours["tokens"], strict=False))
    kept = ("calls", "graphs", "graph_bytes", "itl_ms", "loaded_seconds", "imported_though_blocked")
    result = {
        "engine": Path(options.engine).name,
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name(),
        "prompts": len(QUESTIONS),
        "equal": exact,
        "equal_up_to_the_first_near_tie": ties,
        "different": wrong,
        "batch_of_8_equal_to_alone": batched,
        "text": ours["texts"][0],
        **{name: ours[name] for name in kept},
    }
    print(json.dumps(result))
    return 1 if wrong else 0


def _run_alone(options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as empty:
        root = Path(__file__).resolve().parents[2]
        link = Path(empty) / "site" / "tilewright"
        link.parent.mkdir()
        link.symlink_to(root)
        environment = {**os.environ, "PATH": empty}
        environment["PYTHONPATH"] = f"{link.parent}:{os.environ.get('PYTHONPATH', '')}"
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", ALONE, options.engine, options.checkpoint]
            + [json.dumps(QUESTIONS), str(options.tokens)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        print(f"the engine's process took {time.perf_counter() - started:.1f} s")
    if done.returncode:
        sys.exit(f"the engine failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def _greedy(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Hugging Face's greedy tokens with its own cache, and the top-2 gap of each step's logits."""
    tokens, gaps, past = [], [], None
    ids = torch.tensor([prompt], device="cuda")
    while len(tokens) < count:
        result = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = result.past_key_values
        top = result.logits[0, -1].float().topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        ids = torch.tensor([[tokens[-1]]], device="cuda")
    return tokens, gaps


if __name__ == "__main__":
    sys.exit(main())
