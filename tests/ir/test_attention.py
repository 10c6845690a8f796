"""Attention against torch's SDPA and Hugging Face's eager formulas; caches against dense."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from tilewright.ir.schema import schema

H, G, D = 4, 2, 8
attention = schema("attention").reference
paged_attention = schema("paged_attention").reference
slot_attention = schema("slot_attention").reference
kv_write = schema("kv_write").reference
SDPA = torch.nn.functional.scaled_dot_product_attention


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def qkv(queries=5, keys=5, batch=2):
    return draw(batch, H, queries, D), draw(batch, G, keys, D), draw(batch, G, keys, D)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def additive(visible):
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)


def banded(queries, keys, window=None):
    """Causal visibility of the last ``queries`` of ``keys`` positions, by its definition."""
    rows = range(keys - queries, keys)
    return torch.tensor(
        [[j <= i and (window is None or j > i - window) for j in range(keys)] for i in rows]
    )


@pytest.mark.quick
def test_full_and_causal():
    q, k, v = qkv()
    close(attention(q, k, v, scale=0.3), SDPA(q, k, v, scale=0.3, enable_gqa=True))
    close(
        attention(q, k, v, scale=0.3, causal=True),
        SDPA(q, k, v, scale=0.3, is_causal=True, enable_gqa=True),
    )


@pytest.mark.quick
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("queries", [1, 3, 7])
def test_windows_and_cached_prefixes(window, queries):
    q, k, v = qkv(queries, 7)
    mask = banded(queries, 7, window)
    wanted = SDPA(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    close(attention(q, k, v, scale=0.3, causal=True, window=window), wanted)


@pytest.mark.quick
def test_masks():
    q, k, v = qkv()
    seen = torch.rand(2, 1, 5, 5) > 0.3
    seen |= torch.eye(5, dtype=torch.bool)
    bias = draw(1, H, 5, 5)
    for mask in (seen, bias):
        wanted = SDPA(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        close(attention(q, k, v, mask, scale=0.3), wanted)
    both = additive(banded(5, 5) & seen)
    wanted = SDPA(q, k, v, attn_mask=both, scale=0.3, enable_gqa=True)
    close(attention(q, k, v, seen, scale=0.3, causal=True), wanted)


@pytest.mark.quick
def test_a_row_that_sees_nothing_gives_zero():
    q, k, v = qkv()
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out = attention(q, k, v, mask, scale=0.3)
    assert torch.equal(out[:, :, 2], torch.zeros(2, H, D, dtype=torch.float64))
    assert out.isfinite().all()


@pytest.mark.quick
def test_softcap_is_gemma2s():
    q, k, v = qkv()
    module = SimpleNamespace(num_key_value_groups=H // G, training=False)
    mask = additive(banded(5, 5, 3)).expand(2, 1, 5, 5)
    wanted, _ = modeling_gemma2.eager_attention_forward(
        module, q, k, v, mask, scaling=0.7, softcap=2.0
    )
    found = attention(q, k, v, scale=0.7, causal=True, window=3, softcap=2.0)
    torch.testing.assert_close(found, wanted.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("level", [-50.0, 0.0, 50.0])
def test_sinks_are_gpt_oss(level):
    q, k, v = qkv()
    sinks = draw(H) + level
    module = SimpleNamespace(num_key_value_groups=H // G, training=False, sinks=sinks)
    mask = additive(banded(5, 5)).expand(2, 1, 5, 5)
    wanted, _ = modeling_gpt_oss.eager_attention_forward(module, q, k, v, mask, scaling=0.3)
    found = attention(q, k, v, None, sinks, scale=0.3, causal=True)
    close(found, wanted.transpose(1, 2))


@pytest.mark.quick
def test_alibi_is_blooms():
    q, k, v = qkv(5, 5, 1)
    bias = build_alibi_tensor(torch.ones(1, 5), H, torch.float64).view(1, H, 1, 5)
    slopes = torch.tensor([2.0 ** (-8 * (i + 1) / H) for i in range(H)], dtype=torch.float64)
    mask = bias + additive(banded(5, 5))
    wanted = SDPA(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    close(attention(q, k, v, None, None, slopes, scale=0.3, causal=True), wanted)


@pytest.mark.quick
def test_alibi_distances_are_not_rounded():
    # In bfloat16 256 and 257 are one number: slopes times distances must be taken wider.
    q, k, v = (x.bfloat16() * 0 for x in qkv(1, 400, 1))
    v = torch.arange(400).view(1, 1, 400, 1).expand(1, G, 400, D).bfloat16()
    slopes = torch.full((H,), 0.5, dtype=torch.bfloat16)
    exact = attention(q.double(), k.double(), v.double(), None, None, slopes.double(), scale=1.0)
    found = attention(q, k, v, None, None, slopes, scale=1.0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=0)


FEATURES = st.fixed_dictionaries(
    {
        "window": st.sampled_from([None, 1, 3]),
        "softcap": st.sampled_from([None, 2.0]),
    }
)
SEQUENCES = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=4
)  # (new tokens, tokens before them)


def vectors(flag):
    return (draw(H), draw(H).abs()) if flag else (None, None)


@settings(max_examples=60)
@given(SEQUENCES, st.integers(1, 5), FEATURES, st.booleans(), st.randoms(use_true_random=False))
def test_paged_is_dense_attention_of_each_sequence(sequences, page, features, extra, random):
    sinks, alibi = vectors(extra)
    lengths = [new + old for new, old in sequences]
    counts = [-(-length // page) for length in lengths]
    pool = list(range(sum(counts) + 3))
    random.shuffle(pool)
    # Whatever no sequence owns is poison: reading it would show.
    k_cache, v_cache = (torch.full((len(pool), page, G, D), torch.nan).double() for _ in "kv")
    tables = torch.full((len(sequences), max(counts) + 1), pool[-1], dtype=torch.int32)
    starts, wanted, queries, rest = [0], [], [], list(pool[:-1])
    for b, ((new, _), length) in enumerate(zip(sequences, lengths, strict=True)):
        tables[b, : counts[b]] = torch.tensor([rest.pop() for _ in range(counts[b])])
        k, v, q = draw(length, G, D), draw(length, G, D), draw(new, H, D)
        slots = [int(tables[b, t // page]) * page + t % page for t in range(length)]
        k_cache = kv_write(k_cache, k, torch.tensor(slots, dtype=torch.int64))
        v_cache = kv_write(v_cache, v, torch.tensor(slots, dtype=torch.int64))
        starts.append(starts[-1] + new)
        queries.append(q)
        dense = [x.transpose(0, 1)[None] for x in (q, k, v)]
        if new:
            out = attention(*dense, None, sinks, alibi, scale=0.3, causal=True, **features)
            wanted.append(out[0].transpose(0, 1))
    padding = draw(2, H, D)
    found = paged_attention(
        torch.cat([*queries, padding]),
        k_cache,
        v_cache,
        tables,
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        sinks,
        alibi,
        scale=0.3,
        **features,
    )
    close(found, torch.cat([*wanted, torch.zeros_like(padding)]))


@settings(max_examples=60)
@given(
    st.lists(st.integers(-1, 6), min_size=1, max_size=4), st.integers(1, 4), FEATURES, st.booleans()
)
def test_slots_are_dense_attention_of_each_sequence(before, count, features, extra):
    sinks, alibi = vectors(extra)
    size = 12
    k_cache, v_cache = (torch.full((len(before), G, size, D), torch.nan).double() for _ in "kv")
    lengths = [0 if old < 0 else old + count for old in before]
    q, k, v = (draw(len(before) * count, heads, D) for heads in (H, G, G))
    for b, old in enumerate(before):
        k_cache[b, :, : max(old, 0)] = draw(G, max(old, 0), D)
        v_cache[b, :, : max(old, 0)] = draw(G, max(old, 0), D)
    found, k_after, v_after = slot_attention(
        q,
        k,
        v,
        k_cache,
        v_cache,
        torch.tensor(lengths, dtype=torch.int32),
        sinks,
        alibi,
        scale=0.3,
        **features,
    )
    for b, old in enumerate(before):
        rows = slice(b * count, (b + 1) * count)
        if old < 0:  # an idle slot
            assert not found[rows].any() and k_after[b].isnan().all()
            continue
        keys, values = (
            torch.cat([cache[b, :, :old], new[rows].transpose(0, 1)], 1)
            for cache, new in ((k_cache, k), (v_cache, v))
        )
        dense = (q[rows].transpose(0, 1)[None], keys[None], values[None])
        wanted = attention(*dense, None, sinks, alibi, scale=0.3, causal=True, **features)
        close(found[rows], wanted[0].transpose(0, 1))
        assert torch.equal(k_after[b, :, : old + count], keys)
        assert v_after[b, :, old + count :].isnan().all()


@pytest.mark.quick
def test_kv_write_takes_layouts_as_they_are_and_refuses_slots_outside():
    cache = draw(4, 2, 3, D).transpose(0, 2).contiguous().transpose(0, 2)
    new = draw(2, 3, D)
    written = kv_write(cache, new, torch.tensor([7, 0]))
    flat = written.reshape(8, 3, D)
    assert torch.equal(flat[[7, 0]], new)
    assert torch.equal(flat[1:7], cache.reshape(8, 3, D)[1:7])
    for slot in (-1, 8):
        with pytest.raises(IndexError):
            kv_write(cache, new, torch.tensor([0, slot]))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_kv_write_of_8_bit_caches(dtype):
    cache, new = torch.zeros(2, 2, 1, 4).to(dtype), (draw(2, 1, 4) * 4).to(dtype)
    written = kv_write(cache, new, torch.tensor([3, 1])).float().view(4, 1, 4)
    assert torch.equal(written[[3, 1]], new.float()) and not written[[0, 2]].any()
