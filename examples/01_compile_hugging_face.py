"""Compiles a Hugging Face model, generates, saves the engine, and loads it without the compiler.

The model is a tiny random one, so that the example runs offline in seconds. A folder written by
save_pretrained, or a .gguf file, goes through the same call: tw.compile("path/to/model").
"""

import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw

config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()

engine = tw.compile(model)  # for this machine, with a KV cache, for prompts of any length
report = engine.report()
print(f"compiled for {engine.target} in {report['seconds']['capture']:.1f} s of capture")
print(f"kernel calls by backend: {report['calls']}; ops left to torch: {report['aten'] or 'none'}")

# Three prompts of different lengths in one call: they share every step.
prompts = [[1, 2, 3], list(range(40)), [7] * 11]
greedy = tw.SamplingParams(max_new_tokens=24, ignore_eos=True)
started = time.perf_counter()
completions = engine.generate(prompts, greedy)
seconds = time.perf_counter() - started
print(f"generated {24 * len(prompts)} tokens in {seconds:.2f} s")

# The same tokens as Hugging Face gives.
for prompt, completion in zip(prompts, completions, strict=True):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=24,
        max_new_tokens=24,
        eos_token_id=None,
    )
    same = out[0, len(prompt) :].tolist() == completion.token_ids
    print(f"prompt of {len(prompt)}: {completion.token_ids[:6]} … equal to Hugging Face: {same}")

with tempfile.TemporaryDirectory() as folder:
    engine.save(f"{folder}/engine")
    loaded = tw.load(f"{folder}/engine")  # checks every file's hash, needs no transformers
    again = loaded.generate(prompts, greedy)
    print("saved and loaded:", [c.token_ids for c in again] == [c.token_ids for c in completions])
