"""slot_attention on its own: ragged lengths, idle rows, and every form that the kernel declines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_running import Running, running

TEXT = """\
def g(q: f32[T, {H}, {D}], k: f32[T, {G}, {D}], v: f32[T, {G}, {E}], seq_lens: i32[B], {extra}
      k_cache_0: f32[B, {G}, L, {D}], v_cache_0: f32[B, {G}, L, {E}]):
    both: (f32[T, {H}, {E}], f32[B, {G}, L, {D}], f32[B, {G}, L, {E}],) = slot_attention(
        q, k, v, k_cache_0, v_cache_0, seq_lens, {operands} {attrs})
    out: f32[T, {H}, {E}] = item(both, index=0)
    k_new: f32[B, {G}, L, {D}] = item(both, index=1)
    v_new: f32[B, {G}, L, {E}] = item(both, index=2)
    return {{"out": out, "k_cache_0": k_new, "v_cache_0": v_new}}
"""
FORMS = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "all": {"window": 4, "softcap": 5.0, "sinks": True, "alibi": True},
}
SHAPES = {"gqa": (4, 2, 8, 8), "mha": (2, 2, 16, 16), "mqa": (4, 1, 24, 24), "odd": (4, 2, 6, 6),
          "mla": (2, 2, 12, 8)}  # fmt: skip


def engine(shape: tuple[int, ...], form: dict[str, object]) -> Running:
    heads, kv_heads, dim, value_dim = shape
    vectors = [name for name in ("sinks", "alibi") if form.get(name)]
    operands = ", ".join(name if name in vectors else "None" for name in ("sinks", "alibi"))
    attrs = {"scale": 0.3, **{n: form[n] for n in ("window", "softcap") if n in form}}
    text = TEXT.format(
        H=heads,
        G=kv_heads,
        D=dim,
        E=value_dim,
        extra="".join(f"{name}: f32[{heads}], " for name in vectors),
        operands=f"{operands}," if vectors else "",
        attrs=", ".join(f"{name}={value}" for name, value in attrs.items()),
    )
    return running(text)


def inputs(
    shape: tuple[int, ...], form: dict[str, object], lens: list[int], new: int, room: int = 12
) -> list[torch.Tensor]:
    """Caches hold NaN behind the sequences' ends: reading there would show."""
    heads, kv_heads, dim, value_dim = shape
    tokens = len(lens) * new
    fresh = [
        torch.randn(tokens, n, d) for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    ]
    caches = []
    for width in (dim, value_dim):
        cache = torch.full((len(lens), kv_heads, room, width), torch.nan)
        for row, length in enumerate(lens):
            cache[row, :, : max(length - new, 0)] = torch.randn(
                kv_heads, max(length - new, 0), width
            )
        caches.append(cache)
    vectors = [torch.randn(heads) for name in ("sinks", "alibi") if form.get(name)]
    return [*fresh, torch.tensor(lens, dtype=torch.int32), *vectors, *caches]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_prefill_decode_and_chunks(shape: tuple[int, ...], form: dict[str, object]) -> None:
    found = engine(shape, form)
    assert found.whole, found.lowered.notes
    for lens, new in (([5], 5), ([9], 4), ([7, 3, 12], 1), ([6, 4], 3), ([12], 12)):
        found.check(inputs(shape, form, lens, new))


@given(
    st.integers(1, 3).flatmap(
        lambda new: st.tuples(
            st.just(new),
            st.lists(st.one_of(st.just(0), st.integers(new, 12)), min_size=1, max_size=4),
        )
    )
)
@pytest.mark.parametrize("shape", ["gqa", "odd"])
def test_ragged_rows_some_of_them_idle(shape: str, step: tuple[int, list[int]]) -> None:
    new, lens = step
    found = _CACHED.setdefault(shape, engine(SHAPES[shape], {}))
    found.check(inputs(SHAPES[shape], {}, lens, new))


_CACHED: dict[str, Running] = {}


@pytest.mark.quick
def test_caches_are_written_in_place() -> None:
    found = engine(SHAPES["gqa"], {})
    (call,) = found.program.calls
    assert len(call.aliases) == 2
    given_ = inputs(SHAPES["gqa"], {}, [4, 7], 1)
    results = found.run(given_)
    assert results["k_cache_0"].data_ptr() == given_[-2].data_ptr()
    assert not given_[-2][0, :, 3].isnan().any()
    again = found.run(given_)
    assert again["out"].data_ptr() != results["out"].data_ptr(), (
        "a result must outlive the next run"
    )


def test_caches_that_are_views_of_a_larger_one() -> None:
    found = engine(SHAPES["gqa"], {})
    given_ = inputs(SHAPES["gqa"], {}, [4, 7], 1)
    wide = [torch.full((5, *cache.shape[1:]), torch.nan) for cache in given_[-2:]]
    for whole, cache in zip(wide, given_[-2:], strict=True):
        whole[2:4] = cache
    expected = found.run([x.clone() for x in given_])
    for _ in range(2):
        results = found.run([*given_[:-2], *(whole[2:4] for whole in wide)])
        torch.testing.assert_close(results["out"], expected["out"])
    torch.testing.assert_close(wide[0][2:4], expected["k_cache_0"], equal_nan=True)
    assert wide[0][:2].isnan().all() and wide[0][4:].isnan().all()
