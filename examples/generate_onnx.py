"""Generates from a folder that `tilewright compile MODEL --emit onnx -o FOLDER` wrote.

    python examples/generate_onnx.py FOLDER TOKEN_IDS [MAX_NEW_TOKENS]

It needs onnxruntime and numpy alone. TOKEN_IDS are separated by commas, and so are those printed;
FOLDER/tokenizer.json, for the package tokenizers, turns text into ids and back.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

folder, prompt = Path(sys.argv[1]), [int(token) for token in sys.argv[2].split(",")]
facts = json.loads((folder / "generation.json").read_text())
longest = facts["max_length"]
if len(prompt) >= longest:
    sys.exit(f"a prompt of {len(prompt)} tokens, of a model that takes less than {longest}")
length = min(longest, len(prompt) + int(sys.argv[3] if len(sys.argv) > 3 else 32))
session = ort.InferenceSession(folder / facts["model"], providers=["CPUExecutionProvider"])

# One buffer a cache, both input and output: a step writes what is new, and copies nothing.
binding = session.io_binding()
sizes = {"batch": 1, "cache_length": length}
for cache in facts["caches"]:
    shape = [sizes.get(size, size) for size in cache["shape"]]
    memory = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=cache["dtype"]))
    binding.bind_ortvalue_input(cache["past"], memory)
    binding.bind_ortvalue_output(cache["present"], memory)


def next_token(new: list[int], start: int) -> int:
    """The likeliest token behind the ``new`` ones, which begin at position ``start``."""
    positions = np.arange(start, start + len(new))
    inputs = {"input_ids": new, "position_ids": positions, "logits_indices": [len(new) - 1]}
    for name, values in inputs.items():
        binding.bind_cpu_input(name, np.array([values], dtype=np.int64))
    binding.bind_output("logits", "cpu")
    session.run_with_iobinding(binding)
    # Outputs come in the order in which they were bound, logits last.
    return int(binding.get_outputs()[-1].numpy()[0, 0].argmax())


tokens, new = list(prompt), prompt
while len(tokens) < length:
    new = [next_token(new, len(tokens) - len(new))]
    tokens += new
    if new[0] in facts["eos_token_ids"]:
        break
print(",".join(map(str, tokens[len(prompt) :])))
