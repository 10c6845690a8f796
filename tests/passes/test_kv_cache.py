"""KV-cache insertion: goldens, and numbers of ragged steps against the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragged_oracle import DECODER, PagedRun
from rewriting import parse
from tilewright.errors import UnsupportedError
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.verifier import verify
from tilewright.passes.kv_cache import PAGED_CACHE, SLOT_CACHE

PAGED = """
def decoder(token_ids: i64[T], positions: i64[T], query_start: i32[B + 1], seq_lens: i32[B],
            slot_mapping: i64[T], block_tables: i32[B, M], logits_indices: i64[R],
            k_cache_0: f32[N, P, 2, 4], v_cache_0: f32[N, P, 2, 4]):
    embed: f32[16, 8] = param("embed")
    words: f32[T, 8] = embedding(embed, token_ids)
    table: f32[32, 8] = param("table")
    rows: f32[T, 8] = index_select(table, positions, dim=0)
    x: f32[T, 8] = add(words, rows)
    gain: f32[8] = param("gain")
    n: f32[T, 8] = rms_norm(x, gain, eps=1e-05)
    wq: f32[16, 8] = param("wq")
    q: f32[T, 16] = linear(n, wq)
    q3: f32[T, 4, 4] = reshape(q, shape=(T, 4, 4))
    pf: f32[T] = cast(positions, dtype=f32)
    column: f32[T, 1] = reshape(pf, shape=(T, 1))
    angle: f32[T, 2] = expand(column, shape=(T, 2))
    c: f32[T, 2] = cos(angle)
    c3: f32[T, 1, 2] = reshape(c, shape=(T, 1, 2))
    s: f32[T, 2] = sin(angle)
    s3: f32[T, 1, 2] = reshape(s, shape=(T, 1, 2))
    qr: f32[T, 4, 4] = rope(q3, c3, s3, layout="half")
    wk: f32[8, 8] = param("wk")
    k: f32[T, 8] = linear(n, wk)
    k3: f32[T, 2, 4] = reshape(k, shape=(T, 2, 4))
    kr: f32[T, 2, 4] = rope(k3, c3, s3, layout="half")
    k_new: f32[N, P, 2, 4] = kv_write(k_cache_0, kr, slot_mapping)
    wv: f32[8, 8] = param("wv")
    v: f32[T, 8] = linear(n, wv)
    v3: f32[T, 2, 4] = reshape(v, shape=(T, 2, 4))
    v_new: f32[N, P, 2, 4] = kv_write(v_cache_0, v3, slot_mapping)
    a: f32[T, 4, 4] = paged_attention(q3r, k_new, v_new, block_tables, seq_lens, query_start,
                                      causal=True, scale=0.5, window=6)
    flat: f32[T, 16] = reshape(a, shape=(T, 16))
    wo: f32[8, 16] = param("wo")
    heard: f32[R, 16] = index_select(flat, logits_indices, dim=0)
    o: f32[R, 8] = linear(heard, wo)
    wanted: f32[R, 8] = index_select(x, logits_indices, dim=0)
    y: f32[R, 8] = add(wanted, o)
    final: f32[R, 8] = rms_norm(y, gain, eps=1e-05)
    logits: f32[R, 16] = linear(final, embed)
    return {"logits": logits, "k_cache_0": k_new, "v_cache_0": v_new}
""".replace("q3r", "qr")


@pytest.mark.quick
def test_paged_golden() -> None:
    assert PAGED_CACHE.run(parse(DECODER)) == parse_graph(PAGED)


@pytest.mark.quick
def test_slot_golden() -> None:
    text = str(SLOT_CACHE.run(parse(DECODER)))
    assert "seq_lens: i32[B], logits_indices: i64[R], k_cache_0: f32[B, 2, L, 4]" in text
    assert (
        "slot_attention_0: (f32[T, 4, 4], f32[B, 2, L, 4], f32[B, 2, L, 4],) = slot_attention("
        "rope_0, rope_1, reshape_" in text
    )
    assert text.count("slot_attention(") == 1 and "paged" not in text and "iota" not in text


@pytest.mark.parametrize("step", [PAGED_CACHE, SLOT_CACHE], ids=lambda step: step.name)
def test_a_prefill_gives_the_logits_of_the_whole_sequence(step) -> None:
    before = parse(DECODER)
    after = verify(step.run(before))
    ids = torch.randint(16, (1, 9))
    inputs = step.adapt_inputs(before, after, [ids])
    logits = step.adapt_outputs(after, inputs, interpret(after, inputs))
    torch.testing.assert_close(logits, interpret(before, [ids]), rtol=1e-6, atol=1e-6)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    page_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_mix_of_chunks_gives_the_logits_of_each_sequence_alone(
    lengths: list[int], cuts: list[int], page_size: int, seed: int
) -> None:
    """Sequences of different lengths advance by different chunks in shared steps."""
    before = parse(DECODER)
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(16, (n,), generator=generator) for n in lengths]
    needed = [-(-n // page_size) for n in lengths]
    free = (torch.randperm(sum(needed), generator=generator) + 1).tolist()
    tables = [[free.pop() for _ in range(count)] for count in needed]
    run = PagedRun(PAGED_CACHE.run(before), sum(needed) + 1, page_size)
    done, found = [0] * len(lengths), [[] for _ in lengths]
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        active = [i for i, n in enumerate(lengths) if done[i] < n]
        chunks = [(sequences[i][done[i] : done[i] + cuts[i]], done[i], tables[i]) for i in active]
        for i, logits in zip(active, run.step(chunks), strict=True):
            found[i].append(logits)
            done[i] += len(logits)
    for ids, parts in zip(sequences, found, strict=True):
        (expected,) = interpret(before, [ids[None]])
        torch.testing.assert_close(torch.cat(parts), expected[0], rtol=1e-5, atol=1e-5)


def test_rows_are_picked_before_the_final_norm() -> None:
    after = PAGED_CACHE.run(parse(DECODER))
    norms = [node for node in after.nodes if node.op == "rms_norm"]
    assert [str(node.shape[0]) for node in norms] == ["T", "R"]


@pytest.mark.parametrize(
    ("signature", "found"),
    [
        ("x: f32[1, S, 16]", "i64"),
        ("input_ids: i64[1, 5]", "i64"),
        ("input_ids: i64[S]", "i64"),
    ],
)
def test_a_graph_that_is_no_causal_lm_is_refused(signature: str, found: str) -> None:
    name = signature.split(":")[0]
    graph = parse(f'def g({signature}):\n    return {{"y": {name}}}')
    with pytest.raises(UnsupportedError, match="causal LM"):
        PAGED_CACHE.run(graph)
