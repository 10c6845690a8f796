"""append_kv against what it stands for: norms and rope of Hugging Face, rows written by hand."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tilewright.errors import GraphError
from tilewright.ir.build import input_node, make
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.ops.append_kv import append_rows
from tilewright.ir.schema import Sample, schema
from tilewright.ir.types import TensorType

pytestmark = pytest.mark.quick

APPEND = schema("append_kv")
T, H, G, D, E = 3, 4, 2, 8, 6
SLOTS = [9, 2, 4]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def new_rows(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """k, v, both caches of 3 pages of 4, slots, q."""
    k, v, q = (draw(T, heads, n, dtype=dtype) for heads, n in ((G, D), (G, E), (H, D)))
    caches = (draw(3, 4, G, width, dtype=dtype) for width in (D, E))
    return [k, v, *caches, torch.tensor(SLOTS), q]


def angles(half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(T)[:, None] * 0.3 ** torch.arange(half)
    return angle.cos(), angle.sin()


def written(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    wanted = cache.clone()
    for row, slot in zip(rows, SLOTS, strict=True):
        wanted[slot // 4, slot % 4] = row
    return wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rope_are_hugging_faces(dtype: torch.dtype) -> None:
    k, v, k_cache, v_cache, slots, q = new_rows(dtype)
    norms = [Qwen3RMSNorm(D, eps=1e-5).to(dtype) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    cos, sin = (x.to(dtype) for x in angles(D // 2))
    full = [torch.cat([x, x], -1)[None] for x in (cos, sin)]
    with torch.no_grad():
        normed = (norm(x).transpose(0, 1)[None] for norm, x in zip(norms, (q, k), strict=True))
        turned = modeling_llama.apply_rotary_pos_emb(*normed, *full)
        weights = [norm.weight for norm in norms]
        found = APPEND.reference(*(k, v, k_cache, v_cache, slots, q, cos, sin, *weights), eps=1e-5)
    q_wanted, k_wanted = (x[0].transpose(0, 1) for x in turned)
    rtol, atol = APPEND.tolerance[DType.from_torch(dtype)]
    wanted = (written(k_cache, k_wanted), written(v_cache, v), q_wanted)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def test_without_tables_and_weights_the_rows_are_written_as_they_are() -> None:
    k, v, k_cache, v_cache, slots, _ = new_rows()
    found = APPEND.reference(k, v, k_cache, v_cache, slots)
    assert len(found) == 2
    assert torch.equal(found[0], written(k_cache, k))
    assert torch.equal(found[1], written(v_cache, v))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_it_is_the_composition_of_its_parts(layout: str) -> None:
    """Each part rounds to the element type, as when it stands alone."""
    k, v, k_cache, v_cache, slots, q = new_rows(torch.bfloat16)
    cos, sin = angles(2)
    weight = draw(D)
    norm, rope, write = (schema(op).reference for op in ("rms_norm", "rope", "kv_write"))
    args = (k, v, k_cache, v_cache, slots, q, cos, sin, None, weight)
    found = APPEND.reference(*args, layout=layout, eps=1e-3)
    tables = (cos[:, None], sin[:, None])
    turned = rope(norm(k, weight, eps=1e-3), *tables, layout=layout)
    assert torch.equal(found[0], write(k_cache, turned, slots))
    assert torch.equal(found[1], write(v_cache, v, slots))
    assert torch.equal(found[2], rope(q, *tables, layout=layout))


def test_only_the_form_in_place_writes_what_it_is_given() -> None:
    k, v, k_cache, v_cache, slots, q = new_rows()
    copies = k_cache.clone(), v_cache.clone()
    args = (slots, q, *angles(4))
    wanted = APPEND.reference(k, v, k_cache, v_cache, *args)
    assert torch.equal(k_cache, copies[0]) and torch.equal(v_cache, copies[1])
    found = append_rows(k, v, k_cache, v_cache, *args)
    assert found[0] is k_cache and found[1] is v_cache
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("slot", [-1, 12])
def test_slots_outside_are_refused(slot: int) -> None:
    k, v, k_cache, v_cache, slots, _ = new_rows()
    slots[1] = slot
    with pytest.raises((IndexError, RuntimeError)):
        APPEND.reference(k, v, k_cache, v_cache, slots)


def node(name: str, *shape: int, dtype: DType = DType.F32) -> Node:
    return input_node(name, TensorType(dtype, shape))


K, V, Q = node("k", T, G, D), node("v", T, G, E), node("q", T, H, D)
CACHES = node("kc", 3, 4, G, D), node("vc", 3, 4, G, E)
WHERE = node("slots", T, dtype=DType.I64)
NEW = (K, V, *CACHES, WHERE)
COS, SIN, WEIGHT = node("cos", T, 4), node("sin", T, 4), node("w", D)


def test_result_types() -> None:
    caches = tuple(cache.type for cache in CACHES)
    assert make("append_kv", *NEW).types == caches
    assert make("append_kv", *NEW, None, COS, SIN).types == caches
    assert make("append_kv", *NEW, Q, COS, SIN).types == (*caches, Q.type)
    assert APPEND.aliases == ((0, 2), (1, 3))


ILL_TYPED = {
    "pages of other sizes": lambda: make(
        "append_kv", K, V, CACHES[0], node("c", 4, 4, G, E), WHERE
    ),
    "v of other heads": lambda: make("append_kv", K, node("v", T, H, E), *CACHES, WHERE),
    "slots of other rows": lambda: make("append_kv", K, V, *CACHES, node("s", 4, dtype=DType.I64)),
    "float slots": lambda: make("append_kv", K, V, *CACHES, node("s", T)),
    "cache of another type": lambda: make(
        "append_kv", node("k", T, G, D, dtype=DType.F16), V, *CACHES, WHERE
    ),
    "cos without sin": lambda: make("append_kv", *NEW, Q, COS),
    "tables by head": lambda: make("append_kv", *NEW, Q, *[node("c", T, 1, 4)] * 2),
    "tables of other rows": lambda: make("append_kv", *NEW, Q, *[node("c", 2, 4)] * 2),
    "tables wider than a head": lambda: make("append_kv", *NEW, Q, *[node("c", T, 5)] * 2),
    "no such layout": lambda: make("append_kv", *NEW, Q, COS, SIN, layout="quarter"),
    "a layout without tables": lambda: make("append_kv", *NEW, layout="interleaved"),
    "eps without a weight": lambda: make("append_kv", *NEW, Q, COS, SIN, eps=1e-5),
    "a weight without eps": lambda: make("append_kv", *NEW, Q, COS, SIN, WEIGHT),
    "a weight of q without q": lambda: make("append_kv", *NEW, None, COS, SIN, WEIGHT, eps=1e-5),
    "a weight of another width": lambda: make(
        "append_kv", *NEW, None, None, None, None, node("w", E), eps=1e-5
    ),
    "q of other rows": lambda: make("append_kv", *NEW, node("q", 2, H, D), COS, SIN),
    "q of another width": lambda: make("append_kv", *NEW, node("q", T, H, E), COS, SIN),
}


@pytest.mark.parametrize("case", ILL_TYPED)
def test_ill_typed_calls_are_refused(case: str) -> None:
    with pytest.raises(GraphError):
        ILL_TYPED[case]()


def test_costs_are_of_the_new_rows_alone() -> None:
    whole = make("append_kv", *NEW, Q, COS, SIN, WEIGHT, WEIGHT, eps=1e-5)
    rows = (K.type.nbytes + V.type.nbytes + Q.type.nbytes) * 2
    others = COS.type.nbytes * 2 + WEIGHT.type.nbytes * 2 + WHERE.type.nbytes
    cost = APPEND.cost(whole)
    assert cost.bytes == rows + others
    assert cost.flops == (K.type.numel + Q.type.numel) * 9
    assert APPEND.cost(make("append_kv", *NEW)).flops == 0


def test_samples_cover_the_forms() -> None:
    samples: list[Sample] = list(APPEND.samples(torch.Generator()))
    forms = {tuple(x is not None for x in (*s.args, *[None] * 5)[5:10]) for s in samples}
    assert len(forms) == 6
