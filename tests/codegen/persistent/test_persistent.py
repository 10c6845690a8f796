"""One launch for all layers: what it computes, what stops it, who gets which tiles, and its end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persistent_forms import Model, by_interpreter, step_inputs, together
from tilewright.codegen.persistent.decode import PersistentDecode, in_interpreter
from tilewright.codegen.persistent.reading import Attention, Begin, Product, Shape, read_decode
from tilewright.codegen.persistent.source import persistent_source
from tilewright.codegen.persistent.table import make_calls, make_items, num_items, num_tiles
from tilewright.codegen.persistent.tiling import Tiling
from tilewright.errors import KernelError, UnsupportedError, UsageError
from tilewright.ir.parser import parse_graph

MODEL = Model()
GRAPH = MODEL.graph()
SHORT = read_decode(replace(MODEL, layers=1).graph())
ALONE = Tiling(rows=8, num_warps=1, ahead=1, splits=4, block_n=16, programs=1)
PAGES = [3, 1, 2, 5, 7, 9, 11, 4, 6, 8, 10, 12, 13, 14, 15, 0]
STEP = step_inputs(PAGES, 3, 1, MODEL.page)


def decoder(tensors: dict[str, torch.Tensor], shape: Shape = SHORT) -> PersistentDecode:
    launch = in_interpreter(persistent_source(shape, ALONE, device=False))
    return PersistentDecode(shape, ALONE, tensors, launch, torch.device("cpu"), limit=10)


def test_it_computes_what_the_graph_says() -> None:
    tensors = MODEL.tensors(1, len(PAGES))
    ours = decoder(tensors, read_decode(GRAPH))
    for length, token in ((1, 3), (61, 7)):  # alone; one behind a page, all splits in use
        inputs = step_inputs(PAGES, length, token, MODEL.page)
        expected = by_interpreter(GRAPH, tensors, inputs)
        ours.run(inputs, tensors)
        ours.check()
        logits = expected["logits"].float()
        torch.testing.assert_close(ours.logits.float(), logits, rtol=0.05, atol=0.06)
        assert ours.tokens == ours.logits.float().argmax()
        for layer in range(MODEL.layers):
            for name in (f"k_cache_{layer}", f"v_cache_{layer}"):
                torch.testing.assert_close(tensors[name], expected[name], rtol=0.02, atol=0.04)


def test_more_of_x_than_registers_hold_is_read_again_for_each_tile() -> None:
    model = Model(layers=1, width=520, vocab=40)  # three chunks, the last one short
    tensors, graph = model.tensors(6, 4), model.graph()
    ours = decoder(tensors, read_decode(graph))
    inputs = step_inputs([2, 1, 3], 6, 5, model.page)
    ours.run(inputs, tensors)
    logits = by_interpreter(graph, tensors, inputs)["logits"].float()
    torch.testing.assert_close(ours.logits.float(), logits, rtol=0.05, atol=0.06)


def test_several_sequences_are_computed_together() -> None:
    tensors, graph = MODEL.tensors(7, len(PAGES)), replace(MODEL, layers=1).graph()
    tiling = replace(ALONE, batch=3)
    launch = in_interpreter(persistent_source(SHORT, tiling, device=False))
    ours = PersistentDecode(SHORT, tiling, tensors, launch, torch.device("cpu"), limit=10)
    tables = [[3, 1, 2, 5, 7], [9, 11, 4, 6, 8], [10, 12, 13, 14, 15]]
    steps = zip(tables, (18, 1, 6), (3, 60, 9), strict=True)
    inputs = together([step_inputs(*step, MODEL.page) for step in steps])
    expected = by_interpreter(graph, tensors, inputs)
    for _ in range(2):  # the counters of a launch go on from those of the one before
        ours.run(inputs, tensors)
    ours.check()
    logits = expected["logits"].float()
    torch.testing.assert_close(ours.logits.float(), logits, rtol=0.05, atol=0.06)
    assert torch.equal(ours.tokens, ours.logits.float().argmax(1))
    for name in ("k_cache_0", "v_cache_0"):
        torch.testing.assert_close(tensors[name], expected[name], rtol=0.02, atol=0.04)


def test_logits_that_are_not_finite_have_no_token() -> None:
    tensors = MODEL.tensors(2, len(PAGES))
    tensors["norm"][5] = torch.nan
    ours = decoder(tensors)
    ours.run(STEP, tensors)
    assert ours.tokens == -1


def test_a_wait_in_vain_ends_and_says_what_for() -> None:
    tensors = MODEL.tensors(3, len(PAGES))
    ours = decoder(tensors)
    ours.memory["counters"][32 * 4] -= 1  # of the third call: someone never arrived
    ours.run(STEP, tensors)
    found = ours.diagnosis()
    assert found is not None
    assert (found.waits, found.call, found.program) == (1, 3, 0)
    assert found.expected - found.found == 1
    assert ours.logits.isnan().any()
    with pytest.raises(KernelError, match=r"call 3 of 7 .*Product of o_0.*expected 2 arrivals"):
        ours.check()
    ours.reset()
    ours.run(STEP, tensors)
    ours.check()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("causal=True, scale=0.25)", "causal=True, scale=0.25, window=8)", "paged_attention"),
        ('layout="half"', 'layout="interleaved"', "append_kv"),
        ('activation="silu"', 'activation="gelu"', "rms_norm . linear . gated"),
        ("mul(reshape_0, b)", "add(reshape_0, b)", "add . cos . cast . sin . cast"),
        ("sin(mul_0)", "cos(mul_0)", "mul . cos . cast"),
        ("fused(positions,", "fused(slot_mapping,", "cast"),
        ("add(a, linear_0)", "mul(a, linear_0)", "linear . mul"),
    ],
)
def test_what_it_does_not_know_stops_it_by_name(old: str, new: str, named: str) -> None:
    text = str(GRAPH)
    assert old in text
    names = {"mul(reshape_0, b)": ("mul_0", "add_0"), "add(a, linear_0)": ("add_0", "mul_0")}
    before, after = names.get(old, ("", ""))
    lines = text.replace(old, new)
    if before:
        lines = lines.replace(f" {before}: ", f" {after}: ")
        for user in ("cos(", "sin(", '"out0": '):
            lines = lines.replace(f"{user}{before}", f"{user}{after}")
    with pytest.raises(UnsupportedError, match=f"one launch for all layers: {named}"):
        read_decode(parse_graph(lines))


@pytest.mark.parametrize(
    "changes",
    [
        # transformers before 5.20 multiplies frequencies with positions
        (
            ("x: f32[B], b: f32[8]", "b: f32[8], x: f32[B]"),
            ("mul(reshape_0, b)", "mul(b, reshape_0)"),
            ("fused(fused_2, inv_freq, body=rope", "fused(inv_freq, fused_2, body=rope"),
        ),
        # casts within the group
        (
            ("x: f32[B], b: f32[8]", "y: i64[B], b: f32[8]"),
            ("    reshape_0: f32", "    x: f32[B] = cast(y, dtype=f32)\n        reshape_0: f32"),
            ("fused(fused_2, inv_freq, body=rope", "fused(positions, inv_freq, body=rope"),
        ),
    ],
)
def test_rope_is_read_however_it_is_spelled(changes: tuple[tuple[str, str], ...]) -> None:
    text = str(GRAPH)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    assert text != str(GRAPH)
    assert read_decode(parse_graph(text)) == read_decode(GRAPH)


def test_memory_that_is_missing_or_lies_elsewhere_is_refused() -> None:
    tensors = MODEL.tensors(4, len(PAGES))
    missing = {name: tensor for name, tensor in tensors.items() if name != "qkv_0"}
    with pytest.raises(UsageError, match="qkv_0"):
        decoder(missing)
    with pytest.raises(UsageError, match="down_0"):
        decoder({**tensors, "down_0": tensors["down_0"].T.contiguous().T})


@given(
    rows=st.sampled_from([2, 4, 8]),
    num_warps=st.sampled_from([1, 2]),
    programs=st.integers(1, 9),
    ahead=st.integers(0, 3),
)
@settings(max_examples=8)
def test_each_weight_is_read_once_by_whoever_has_its_tile(
    rows: int, num_warps: int, programs: int, ahead: int
) -> None:
    tiling = Tiling(rows, num_warps, ahead, 4, 16, programs)
    model = replace(MODEL, ffn=1040, vocab=100)  # chunks, and tiles, that do not come out even
    shape = read_decode(model.graph())
    names = {name for s in shape.calls for name in (s.weight, s.norm, s.x, s.out, *s.caches)}
    where = {name: (index + 1) << 32 for index, name in enumerate(sorted(names | {"inv_freq"}))}
    calls, items = make_calls(shape, tiling, where), make_items(shape, tiling, where)
    assert items.shape == (programs, num_items(shape, tiling), 4)
    at = [0] * programs
    for step, row in zip(shape.calls, calls.tolist(), strict=True):
        form = shape.form(step)
        assert row[:2] == [step.form, num_tiles(form, tiling)]
        if not isinstance(form, Product):
            assert isinstance(form, Attention | Begin)
            continue
        read = torch.zeros(form.n, form.k, dtype=torch.int64)
        for program in range(programs):
            for _ in range((program - row[2]) % programs, row[1], programs):
                for _ in range(2 * -(-form.k // tiling.columns)):
                    address, step_8, left, _ = items[program, at[program]].tolist()
                    at[program] += 1
                    first, column = divmod((address - where[step.weight]) // 2, form.k)
                    assert 8 * step_8 == form.k
                    read[first : first + rows, column : column + left] += 1
        assert read.min() == 1
        assert (read > 1).sum() <= 2 * rows * form.k  # the last tile lies over the one before
