"""Suites and snapshots that are small enough for tests."""

from __future__ import annotations

from pathlib import Path

from tilewright.compiler.regress.collect import versions
from tilewright.compiler.regress.snapshot import KernelSnapshot, Snapshot
from tilewright.compiler.regress.suite import Suite, load_suite

LLAMA = """
[[model]]
name = "tiny"
targets = ["h100"]
max_model_len = 64
max_batch_size = 4
watch = ["paged_attention"]

[model.config]
model_type = "llama"
architectures = ["LlamaForCausalLM"]
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 160
max_position_embeddings = 256
"""
GRAPH = """
[[graph]]
name = "norm"
targets = ["h100"]
watch = ["add_rms_norm"]
sizes = { T = 512 }
text = '''
def f(x: bf16[T, 4096], r: bf16[T, 4096], w: bf16[4096]):
    def add_rms_norm(a: bf16[T, 4096], b: bf16[T, 4096], w: bf16[4096]):
        s: bf16[T, 4096] = add(a, b)
        n: bf16[T, 4096] = rms_norm(s, w, eps=1e-05, stepwise=True)
        return {"out0": s, "out1": n}
    two: (bf16[T, 4096], bf16[T, 4096],) = fused(x, r, w, body=add_rms_norm, kind="reduction")
    s: bf16[T, 4096] = item(two, index=0)
    n: bf16[T, 4096] = item(two, index=1)
    return {"s": s, "n": n}
'''
"""
HEAD = 'name = "small"\nowner = "kernels"\n'


def suite_of(folder: Path, text: str) -> Suite:
    """The suite of a text, which is written to a file first."""
    path = folder / "suite.toml"
    path.write_text(text)
    return load_suite(path)


def kernel(name: str = "add_ab12", digest: str = "1" * 64, **more) -> KernelSnapshot:
    """A kernel without code."""
    known = {
        "subject": name.rsplit("_", 1)[0],
        "id": f"{name}-{digest[:8]}",
        "kind": "generated",
        "digest": digest,
        "text": f"# {digest}\nx = 1\n",
        "launches": ("always:", "  add[T, 1, 1](), 4 warps, 1 stages"),
        "cubins": {"": digest},
        "series": {"registers": 40, "spills": 0, "instructions": 100},
    }
    return KernelSnapshot(**{**known, **more})


def snapshot(definition: str, *kernels: KernelSnapshot, **more) -> Snapshot:
    """Of the case "norm" on h100, with made-up figures."""
    calls = "".join(f'{{"kernel": "triton/generated/{k.id}"}}\n' for k in kernels)
    known = {
        "case": "norm",
        "target": "h100",
        "definition": definition,
        "versions": versions(),
        "kernels": kernels,
        "series": {"call": {"launches": len(kernels), "roofline": 1e-6}},
        "parts": {"call": {k.subject: (1, 10, 100) for k in kernels}},
        "passes": (("captured", "a"), ("fuse", "b")),
        "graph": "def f(): ...",
        "program": calls,
    }
    return Snapshot(**{**known, **more})
