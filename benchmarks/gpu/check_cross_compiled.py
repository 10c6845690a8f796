"""An engine that was compiled without a GPU, run on one, beside Hugging Face on the same device.

    python benchmarks/gpu/check_cross_compiled.py ENGINE --checkpoint MODEL.gguf [--tokens 64]

The engine runs in a process of its own, where triton, transformers and Tilewright's compiler and
passes cannot be imported and no C compiler is on the PATH. Its greedy tokens are compared with
Hugging Face's in the engine's element type: float32 has to give the same ones; bfloat16 the same up
to the first near-tie, a top-2 gap of Hugging Face's logits below 0.05. Exit code 1 if it does not.

With --control Hugging Face is held to itself by the same rule, its eager attention to its sdpa; and
the logits of all prompts, ours and both of theirs, to those of the float32 model.
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
LOGITS = str(Path(tempfile.gettempdir()) / "logits.safetensors")
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
import torch
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = not sys.argv[6]
import tilewright as tw
questions, tokens = json.loads(sys.argv[3]), int(sys.argv[4])
started = time.perf_counter()
engine = tw.load(sys.argv[1], checkpoint=sys.argv[2])
loaded = time.perf_counter() - started
prompts = [engine.chat_prompt([{"role": "user", "content": q}]) for q in questions]
params = tw.SamplingParams(max_new_tokens=tokens, ignore_eos=True)
found = [engine.generate([prompt], params)[0] for prompt in prompts]
together = engine.generate(prompts[:8], params)
if sys.argv[5]:
    from safetensors.torch import save_file
    save_file({str(i): engine(torch.tensor(p)) for i, p in enumerate(prompts)}, sys.argv[5])
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
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--full-reductions", action="store_true", help="in cuBLAS, for both")
    options = parser.parse_args()
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = not options.full_reductions
    ours = _run_alone(options)
    manifest = json.loads((Path(options.engine) / "program.json").read_text())
    dtype = torch.bfloat16 if "bf16" in manifest["buffers"]["k_cache_0"] else torch.float32
    from e2e.smollm2 import hugging_face_model

    model = _in(hugging_face_model(Path(options.checkpoint)), dtype).cuda()
    expected = [_greedy(model, prompt, options.tokens) for prompt in ours["prompts"]]
    exact, ties, wrong = _compared(ours["tokens"], expected, dtype is torch.bfloat16)
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
    if options.control:
        result["control"] = _control(model, ours["prompts"], expected, options)
    print(json.dumps(result))
    return 1 if wrong else 0


def _compared(
    found: list[list[int]], expected: list[tuple[list[int], list[float]]], ties_allowed: bool
) -> tuple[int, int, list[tuple[int, int, float]]]:
    """How many are equal, how many up to the first near-tie, and (prompt, token, gap) of others."""
    exact = ties = 0
    wrong = []
    for index, (tokens, (wanted, gaps)) in enumerate(zip(found, expected, strict=True)):
        pairs = enumerate(zip(tokens, wanted, strict=True))
        first = next((i for i, (a, b) in pairs if a != b), None)
        tie = next((i for i, gap in enumerate(gaps) if gap < NEAR_TIE), None)
        if first is None:
            exact += 1
        elif ties_allowed and tie is not None and tie <= first:
            ties += 1
        else:
            wrong.append((index, first, gaps[first]))
            print(f"prompt {index}: DIFFERS at token {first}, gap {gaps[first]:.4f}, tie at {tie}")
    return exact, ties, wrong


@torch.inference_mode()
def _control(
    model: torch.nn.Module,
    prompts: list[list[int]],
    expected: list[tuple[list[int], list[float]]],
    options: argparse.Namespace,
) -> dict:
    """Hugging Face beside itself, and everybody's distance from float32."""
    from safetensors.torch import load_file

    from e2e.smollm2 import hugging_face_model

    ids = [torch.tensor([prompt], device="cuda") for prompt in prompts]
    sdpa = [model(one).logits[0].float() for one in ids]
    model.set_attn_implementation("eager")
    print("control: Hugging Face's eager attention beside its sdpa")
    again = [_greedy(model, prompt, options.tokens)[0] for prompt in prompts]
    exact, ties, wrong = _compared(again, expected, True)
    eager = [model(one).logits[0].float() for one in ids]
    truth_model = hugging_face_model(Path(options.checkpoint)).cuda()
    truth = [truth_model(one).logits[0] for one in ids]
    saved = load_file(LOGITS)
    ours = [saved[str(index)].cuda() for index in range(len(ids))]
    distances = {}
    for name, logits in (("tilewright", ours), ("sdpa", sdpa), ("eager", eager)):
        off = torch.cat([(a - b).flatten() for a, b in zip(logits, truth, strict=True)]).double()
        same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(logits, truth, strict=True)]
        distances[name] = {
            "rms_error": float(off.square().mean().sqrt()),
            "largest_error": float(off.abs().max()),
            "first_choice_of_float32": float(torch.cat(same).float().mean()),
        }
    return {
        "eager_equal_to_sdpa": exact,
        "up_to_the_first_near_tie": ties,
        "different": wrong,
        "to_float32": distances,
        "rms_ours_to_sdpa": _rms(ours, sdpa),
        "rms_eager_to_sdpa": _rms(eager, sdpa),
    }


def _rms(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    apart = torch.cat([(a - b).flatten() for a, b in zip(some, others, strict=True)])
    return float(apart.double().square().mean().sqrt())


def _in(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model as from_pretrained(dtype=…) makes it: ``model.to`` would round the rotary
    frequencies too, which transformers keeps in float32.
    """
    fresh = type(model)._from_config(model.config, dtype=dtype)
    fresh.load_state_dict(model.state_dict())
    assert fresh.model.rotary_emb.inv_freq.dtype is torch.float32
    return fresh.eval()


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
            + [json.dumps(QUESTIONS), str(options.tokens), LOGITS if options.control else ""]
            + ["yes" if options.full_reductions else ""],
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
