"""Compiles a model for an H100 and for a B200 on a machine that need not have a GPU.

Each engine holds its kernels as source beside machine code, so that what they take of the device
(registers, shared memory, warps an SM holds) is known without running them; `tilewright inspect`
reads it from the engine's folder. Copied to such a GPU, the folder runs as it is: tw.load(folder).
"""

import json
import subprocess
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw

config = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).to(torch.bfloat16).eval()


def inspect(folder: str) -> dict:
    """What `tilewright inspect FOLDER --json` prints."""
    command = [sys.executable, "-m", "tilewright", "inspect", folder, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


found = {}
for target in ("h100", "b200"):
    with tempfile.TemporaryDirectory() as folder:
        # The numbers are those of one model: once they are held against its graph.
        verify = "sample" if target == "h100" else "structure"
        engine = tw.compile(model, target=target, max_batch_size=16, verify=verify)
        engine.save(f"{folder}/engine")
        found[target] = inspect(f"{folder}/engine")
        print(f"compiled for {engine.target}, kernel calls: {engine.report()['calls']}")

print("\nkernels for h100, at decode:")
print(f"  {'':34}launches  registers  spills  shared  occupancy  roofline")
for kernel in found["h100"]["decode_kernels"]:
    roofline = f"{kernel['costs']['decode']['roofline_seconds'] * 1e6:7.3f} µs"
    row = f"  {kernel['kernel']:34}{kernel['launches']['decode']:8}"
    running = [one for one in kernel["binaries"] if "decode" in one["runs_at"]]
    if not running:  # a library's: cuBLAS multiplies
        print(f"{row}{'–':>11}{'–':>8}{'–':>8}{'–':>11}{roofline}")
    for one in running:
        takes = f"{one['registers']:11}{one['spilled_bytes']:8}{one['shared_bytes']:8}"
        print(f"{row}{takes}{one['occupancy']:11.0%}{roofline}")
        row, roofline = f"{'and another of its functions':>31}{'':13}", ""

print("\na decode step, by the peak rates of each device:")
for target, facts in found.items():
    step = facts["steps"]["decode"]
    print(f"  {target}: at least {step['roofline_seconds'] * 1e6:.1f} µs", end="")
    print(f", {step['launches']} launches, {step['launches_a_layer']:.3g} a layer")


def resources(facts: dict) -> dict:
    """(registers, bytes of shared memory, blocks an SM) of each function of each kernel."""
    return {
        (kernel["kernel"], one["key"]): (
            one["registers"],
            one["shared_bytes"],
            one["blocks_per_sm"],
        )
        for kernel in facts["kernels"]
        for one in kernel["binaries"]
    }


print("\nwhat differs on b200: (registers, bytes of shared memory, blocks an SM)")
here, there = (resources(found[target]) for target in ("h100", "b200"))
same = len(here.keys() & there.keys())
print(f"  {same} of {len(there)} functions have the same source; of those, differ")
for (kernel, function), takes in there.items():
    if here.get((kernel, function), takes) != takes:
        name = dict.fromkeys((kernel.rpartition("-")[0], function.partition("(")[0]))
        print(f"    {', '.join(name):34}{here[kernel, function]} → {takes}")

shown = next(kernel for kernel in found["h100"]["kernels"] if kernel["kind"] == "generated")
print(f"\nthe source of {shown['kernel']}, which computes {shown['ops']}:\n")
print(shown["source"])
