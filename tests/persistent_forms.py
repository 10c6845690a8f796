"""Decode graphs of small dense models as text, and steps of them, for tests of the one launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tilewright.ir.graph import Graph, input_name, param_name
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.runtime.step_buffer import GROUPS


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model whose decode graph there is."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    ffn: int = 96
    vocab: int = 72
    page: int = 4

    def graph(self) -> Graph:
        """The fused decode graph, as the passes make it of a Llama."""
        return parse_graph("\n".join(self._lines()) + "\n")

    def tensors(self, seed: int, pages: int) -> dict[str, torch.Tensor]:
        """Random weights and caches by name."""
        random = torch.Generator().manual_seed(seed)
        graph, found = self.graph(), {}
        for node in graph.params:
            name, shape = param_name(node), tuple(map(int, map(str, node.shape)))
            drawn = torch.randn(shape, generator=random)
            if name == "inv_freq":
                drawn = 1000.0 ** -(torch.arange(self.dim // 2) * 2 / self.dim)
            elif len(shape) == 1:
                drawn = 1 + drawn / 4
            else:
                drawn /= shape[1] ** 0.5
            found[name] = drawn.to(node.dtype.torch)
        for layer in range(self.layers):
            for part in "kv":
                cache = torch.randn(pages, self.page, self.kv_heads, self.dim, generator=random)
                found[f"{part}_cache_{layer}"] = cache.bfloat16()
        return found

    def _lines(self) -> list[str]:
        m, q, kv = self, self.heads * self.dim, self.kv_heads * self.dim
        cache = f"bf16[N, {m.page}, {m.kv_heads}, {m.dim}]"
        caches = "".join(f", k_cache_{i}: {cache}, v_cache_{i}: {cache}" for i in range(m.layers))
        lines = [
            "def model(token_ids: i64[B], positions: i64[B], seq_lens: i32[B]"
            f", slot_mapping: i64[B], block_tables: i32[B, M]{caches}, temperature: f32[B]"
            ", top_k: i32[B]"
            ", top_p: f32[B], min_p: f32[B], uniform: f32[B]):"
        ]
        lines += _EMBED.format(v=m.vocab, d=m.width).splitlines()
        lines += _CAST.splitlines() + _ROPE.format(h=m.dim // 2).splitlines()
        lines += _NORMED.format(name="qkv", n=q + 2 * kv, d=m.width).splitlines()
        lines += _NORMED.format(name="lm_head", n=m.vocab, d=m.width).splitlines()
        lines += _ADDED.format(name="o", n=m.width, k=q).splitlines()
        lines += _ADDED.format(name="down", n=m.width, k=m.ffn).splitlines()
        lines += _GATED.format(n=2 * m.ffn, f=m.ffn, d=m.width).splitlines()
        body = [
            f'embed: bf16[{m.vocab}, {m.width}] = param("embed")',
            f"h: bf16[B, {m.width}] = "
            'fused(embed, token_ids, body=embedding_1, kind="elementwise")',
            'cast_1: f32[B] = fused(positions, body=cast_body, kind="elementwise")',
            f'inv_freq: f32[{m.dim // 2}] = param("inv_freq")',
            f"turn: (bf16[B, {m.dim // 2}], bf16[B, {m.dim // 2}],) = "
            'fused(cast_1, inv_freq, body=rope_body, kind="elementwise")',
            f"cos_1: bf16[B, {m.dim // 2}] = item(turn, index=0)",
            f"sin_1: bf16[B, {m.dim // 2}] = item(turn, index=1)",
        ]
        stream = "h"
        for i in range(m.layers):
            parts = (("q", 0, m.heads), ("k", q, m.kv_heads), ("v", q + kv, m.kv_heads))
            body += [
                f'norm_{i}: bf16[{m.width}] = param("norm_{i}")',
                f'w_qkv_{i}: bf16[{q + 2 * kv}, {m.width}] = param("qkv_{i}")',
                f"qkv_{i}: bf16[B, {q + 2 * kv}] = "
                f'fused({stream}, norm_{i}, w_qkv_{i}, body=qkv_body, kind="linear")',
            ]
            for name, start, count in parts:
                size = count * m.dim
                body += [
                    f"s{name}_{i}: bf16[B, {size}] = "
                    f"slice(qkv_{i}, dim=1, start={start}, step=1, stop={start + size})",
                    f"{name}_{i}: bf16[B, {count}, {m.dim}] = "
                    f"reshape(s{name}_{i}, shape=(B, {count}, {m.dim}))",
                ]
            body += [
                f"append_{i}: ({cache}, {cache}, bf16[B, {m.heads}, {m.dim}],) = append_kv(k_{i}, "
                f"v_{i}, k_cache_{i}, v_cache_{i}, slot_mapping, q_{i}, cos_1, sin_1, "
                'layout="half", stepwise=True)',
                f"q_out_{i}: bf16[B, {m.heads}, {m.dim}] = item(append_{i}, index=2)",
                f"k_out_{i}: {cache} = item(append_{i}, index=0)",
                f"v_out_{i}: {cache} = item(append_{i}, index=1)",
                f"attention_{i}: bf16[B, {m.heads}, {m.dim}] = paged_attention(q_out_{i}, "
                f"k_out_{i}, v_out_{i}, block_tables, seq_lens, causal=True, scale=0.25)",
                f"flat_{i}: bf16[B, {q}] = reshape(attention_{i}, shape=(B, {q}))",
                f'w_o_{i}: bf16[{m.width}, {q}] = param("o_{i}")',
                f"a_{i}: bf16[B, {m.width}] = "
                f'fused(flat_{i}, w_o_{i}, {stream}, body=o_body, kind="linear")',
                f'norm2_{i}: bf16[{m.width}] = param("norm2_{i}")',
                f'w_up_{i}: bf16[{2 * m.ffn}, {m.width}] = param("gate_up_{i}")',
                f"up_{i}: bf16[B, {m.ffn}] = "
                f'fused(a_{i}, norm2_{i}, w_up_{i}, body=gated_body, kind="linear")',
                f'w_down_{i}: bf16[{m.width}, {m.ffn}] = param("down_{i}")',
                f"h_{i}: bf16[B, {m.width}] = "
                f'fused(up_{i}, w_down_{i}, a_{i}, body=down_body, kind="linear")',
            ]
            stream = f"h_{i}"
        outputs = "".join(f', "{p}_cache_{i}": {p}_out_{i}' for i in range(m.layers) for p in "kv")
        body += [
            f'norm: bf16[{m.width}] = param("norm")',
            f'w_head: bf16[{m.vocab}, {m.width}] = param("lm_head")',
            f"logits_1: bf16[B, {m.vocab}] = "
            f'fused({stream}, norm, w_head, body=lm_head_body, kind="linear")',
            "sample_1: i64[B] = sample(logits_1, temperature, top_k, top_p, min_p, uniform)",
            f'return {{"logits": logits_1{outputs}, "tokens": sample_1}}',
        ]
        return [lines[0], *(f"    {line}" for line in (*lines[1:], *body))]


WHOLE = Model(width=1024, heads=16, kv_heads=4, dim=64, ffn=2048, vocab=2048, page=16)
RING_MODELS = {
    "rows without gaps": WHOLE,
    "gaps, groups of three": Model(
        width=576, heads=9, kv_heads=3, dim=64, ffn=1536, vocab=1024, page=16
    ),
    "long rows, heads of 128": Model(
        width=1024, heads=8, kv_heads=2, dim=128, ffn=14336, vocab=1024, page=16, layers=3
    ),
    "attention of another width": Model(
        width=1280, heads=16, kv_heads=8, dim=128, ffn=2560, vocab=1024, page=32, layers=1
    ),
}
"""Sizes that a ring of weights takes."""
RING_OF_CODES = Model(width=2048, heads=32, kv_heads=8, dim=64, ffn=7168, vocab=1024, page=16)
"""One that it takes with weights of 4 bits too, with gaps between long rows."""


def step_inputs(tables: list[int], length: int, token: int, page: int) -> dict[str, torch.Tensor]:
    """Inputs of a step of one sequence of ``length`` tokens, the new one included."""
    last = length - 1
    slot = tables[last // page] * page + last % page
    return {
        "token_ids": torch.tensor([token]),
        "positions": torch.tensor([last]),
        "seq_lens": torch.tensor([length], dtype=torch.int32),
        "slot_mapping": torch.tensor([slot]),
        "block_tables": torch.tensor([tables], dtype=torch.int32),
    }


def together(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Inputs of one step of several sequences, sampling included."""
    every = [{**GREEDY, **step} for step in steps]
    return {name: torch.cat([step[name] for step in every]) for name in every[0]}


def in_float32(
    graph: Graph, tensors: dict[str, torch.Tensor]
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """A model in bfloat16 without its roundings."""
    wide = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}
    return parse_graph(str(graph).replace("bf16", "f32")), wide


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The root of the mean square of what lies between."""
    return float((one.float() - other.float()).square().mean().sqrt())


def by_interpreter(
    graph: Graph, tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Outputs of a step by the ops' references; ``tensors`` are left as they are."""
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    given = {**own, **GREEDY, **inputs}
    weights = {param_name(node): own[param_name(node)] for node in graph.params}
    found = interpret(graph, [given[input_name(node)] for node in graph.inputs], weights)
    return dict(zip(graph.output_names, found, strict=True))


GREEDY = {
    "temperature": torch.zeros(1),
    "top_k": torch.zeros(1, dtype=torch.int32),
    "top_p": torch.ones(1),
    "min_p": torch.zeros(1),
    "uniform": torch.zeros(1),
    **{name: torch.zeros(1, dtype=dtype) for name, dtype in GROUPS.items()},
}
"""What the sampling of one sequence is told."""
_EMBED = """def embedding_1(weight: bf16[{v}, {d}], ids: i64[B]):
    embedding_0: bf16[B, {d}] = embedding(weight, ids)
    return {{"out0": embedding_0}}"""
_CAST = """def cast_body(x: i64[B]):
    cast_0: f32[B] = cast(x, dtype=f32)
    return {"out0": cast_0}"""
_ROPE = """def rope_body(x: f32[B], b: f32[{h}]):
    reshape_0: f32[B, 1] = reshape(x, shape=(B, 1))
    mul_0: f32[B, {h}] = mul(reshape_0, b)
    cos_0: f32[B, {h}] = cos(mul_0)
    cast_0: bf16[B, {h}] = cast(cos_0, dtype=bf16)
    sin_0: f32[B, {h}] = sin(mul_0)
    cast_1: bf16[B, {h}] = cast(sin_0, dtype=bf16)
    return {{"out0": cast_0, "out1": cast_1}}"""
_NORMED = """def {name}_body(x: bf16[B, {d}], weight: bf16[{d}], weight_1: bf16[{n}, {d}]):
    rms_norm_0: bf16[B, {d}] = rms_norm(x, weight, eps=1e-05, stepwise=True)
    linear_0: bf16[B, {n}] = linear(rms_norm_0, weight_1)
    return {{"out0": linear_0}}"""
_ADDED = """def {name}_body(x: bf16[B, {k}], weight: bf16[{n}, {k}], a: bf16[B, {n}]):
    linear_0: bf16[B, {n}] = linear(x, weight)
    add_0: bf16[B, {n}] = add(a, linear_0)
    return {{"out0": add_0}}"""
_GATED = """def gated_body(x: bf16[B, {d}], weight: bf16[{d}], weight_1: bf16[{n}, {d}]):
    rms_norm_0: bf16[B, {d}] = rms_norm(x, weight, eps=1e-05, stepwise=True)
    linear_0: bf16[B, {n}] = linear(rms_norm_0, weight_1)
    slice_0: bf16[B, {f}] = slice(linear_0, dim=1, start=0, step=1, stop={f})
    slice_1: bf16[B, {f}] = slice(linear_0, dim=1, start={f}, step=1, stop={n})
    gated_0: bf16[B, {f}] = gated(slice_0, slice_1, activation="silu", stepwise=True)
    return {{"out0": gated_0}}"""

__all__ = [
    "GREEDY",
    "RING_MODELS",
    "WHOLE",
    "Model",
    "by_interpreter",
    "replace",
    "step_inputs",
    "together",
]
