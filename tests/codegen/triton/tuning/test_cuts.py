"""What a tuner may choose beside products: any cut gives the reference, and what a store knows is
in the kernel, for the steps that it was measured for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import paged_forms
import walk_forms
from paged_forms import layouts_of
from tilewright.autotune.key import Conditions
from tilewright.autotune.record import Record
from tilewright.autotune.space import Config
from tilewright.autotune.store import Store
from tilewright.codegen.base import CHOICES
from tilewright.codegen.triton.backend import BACKEND
from tilewright.codegen.triton.candidates import kernels_for
from tilewright.codegen.triton.generate import emit_fused
from tilewright.codegen.triton.invocation import plan_call
from tilewright.codegen.triton.kernels.linear_tiles import Cutting
from tilewright.codegen.triton.kernels.paged_attention import emit_paged_attention
from tilewright.codegen.triton.kernels.paged_decode import buckets, emit_paged_decode
from tilewright.codegen.triton.kernels.paged_decode_tiles import BUCKETS
from tilewright.codegen.triton.layout import dense
from tilewright.codegen.triton.source import KernelSource
from tilewright.codegen.triton.tuning.attention import prefill_sizes
from tilewright.codegen.triton.tuning.choices import Choices
from tilewright.codegen.triton.tuning.conditions import conditions_here
from tilewright.codegen.triton.tuning.decode import CAPACITIES, FULL, mixed_sizes, sizes_of
from tilewright.codegen.triton.tuning.problems import problems_of
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.template import Sizes
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.codegen.triton.tuning.walks import row_sizes
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.widen import widened
from tilewright.targets import TARGETS, Target
from triton_running import compile_for, run_interpreted
from tuning_records import choice_of

H100 = TARGETS["h100"]
FEW = H100.override(sms=4)  # fewer splits: the interpreter takes a program at a time
HERE = Conditions("3.7.1", None, "0.1.0")
DECODE, PREFILL, ROWS, ELEMENTWISE = map(
    template_named, ("paged_decode", "paged_attention", "rows", "elementwise")
)
SHAPE = paged_forms.Shape(group=2, kv_heads=1, paged=True)
RAGGED = paged_forms.Shape(group=2, kv_heads=1)


def changed(tunable: KernelTunable, **values: object) -> Config:
    """The default with other values; a config of the space."""
    config = Config(tuple({**tunable.default.as_dict(), **values}.items()))
    assert tunable.space.why_not(config) is None
    return config


def record(tunable: KernelTunable, config: Config) -> Record:
    return choice_of(tunable, config, conditions=HERE)


def choices(path: Path, *records: Record, target: Target = FEW, **limits: int) -> Choices:
    store = Store(path / "tuning.jsonl")
    for one in records:
        store.add(one)
    return Choices(store, target, HERE, **limits)


def held_to(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other.double(), one.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "values", [{"block_n": 16, "waves": 6}, {"block_n": 64}, {"min_keys": 128, "waves": 3}]
)
def test_any_cut_of_decode_attention_gives_the_reference(values) -> None:
    node = paged_forms.decode_call(SHAPE)
    tunable = KernelTunable.of(DECODE, node, mixed_sizes(node, 8, 256), FEW)
    source = DECODE.source(tunable.node, changed(tunable, **values), tunable.sizes, FEW)
    operands, sizes = paged_forms.decode_operands(SHAPE, [1, 5, 300])
    assert source is not None
    held_to(
        [paged_forms.truth(SHAPE, node, operands)], run_interpreted(source, node, operands, sizes)
    )


@pytest.mark.parametrize(
    "values",
    [{"block_m": 16, "block_n": 64}, {"block_m": 64}, {"block_m": 64, "block_n": 16}],
)
def test_any_cut_of_prefill_attention_gives_the_reference(values) -> None:
    node = paged_forms.ragged_call(RAGGED, window=20)
    tunable = KernelTunable.of(PREFILL, node, prefill_sizes(node), FEW)
    source = PREFILL.source(tunable.node, changed(tunable, **values), tunable.sizes, FEW)
    operands, sizes = paged_forms.ragged_operands(RAGGED, [(0, 40), (30, 5), (70, 1)])
    assert source is not None
    cuts = [variant.launches[0].constexprs for variant in source.variants]
    assert len(cuts) == 2 and cuts[0] == cuts[1]  # pages of 16, and any others
    held_to(
        [paged_forms.truth(RAGGED, node, operands)], run_interpreted(source, node, operands, sizes)
    )


WALKED = [
    (ROWS, walk_forms.norm_call(5000, DType.F32), {"columns": 2048, "num_warps": 8}),
    (ROWS, walk_forms.norm_call(5000, DType.F32), {"rows": 2, "columns": 4096}),
    (ROWS, walk_forms.norm_call(1000, DType.F32), {"rows": 4, "num_warps": 4}),
    (ELEMENTWISE, walk_forms.gated_call(3000, DType.F32), {"rows": 2, "columns": 512}),
    (ELEMENTWISE, walk_forms.gated_call(96, DType.F32), {"rows": 2, "num_warps": 1}),
]


@pytest.mark.parametrize("template, node, values", WALKED)
def test_any_cut_of_a_generated_kernel_gives_the_reference(template, node, values) -> None:
    tunable = KernelTunable.of(template, node, row_sizes(node, None), H100)
    config = changed(tunable, **values)
    source = template.source(tunable.node, config, tunable.sizes, H100)
    sizes = {"T": 5}
    operands = template.operands(tunable.node, sizes, torch.device("cpu"), 0)
    wide = [None if x is None else x.double() for x in operands]
    wanted = interpret(widened(tunable.graph, DType.F64), wide)
    assert source is not None and source.variants[0].launches[0].num_warps == config["num_warps"]
    held_to(wanted, run_interpreted(source, tunable.node, operands, sizes))


def decode_records(node: Node, target: Target = FEW, **cuts: dict[str, object]) -> list[Record]:
    """Records of buckets, called ``b8`` and so on, for a capacity of 64 tokens."""
    found = []
    for name, values in cuts.items():
        sizes = mixed_sizes(node, int(name[1:]), 64)
        tunable = KernelTunable.of(DECODE, node, sizes, target)
        found.append(record(tunable, changed(tunable, **values)))
    return found


def block_n(source: KernelSource, sizes: dict[str, int]) -> object:
    (launch, *_) = (launch for launch, _, _ in plan_call(source, [], sizes).launches)
    return launch.constexprs["BLOCK_N"]


def test_each_bucket_of_sequences_has_its_own_cut_of_decode_attention(tmp_path) -> None:
    node = paged_forms.decode_call(SHAPE)
    known = decode_records(node, b8={"block_n": 16}, b128={"block_n": 64, "prefetch": 2})
    made = choices(tmp_path, *known, max_model_len=64)
    source = emit_paged_decode(node, layouts_of(node), FEW, made, None)
    assert source is not None
    names = [launch.function for v in source.variants for launch in v.launches]
    assert names[:2] == ["decode", "merge"] and len(source.variants) == len(BUCKETS)
    assert source.text.count("def decode") == 3  # of 1 and of 32 sequences they are the same
    assert len(made.found) == len(made.lines().splitlines()) == len(BUCKETS)
    for batch, wanted in ((1, 32), (8, 16), (9, 32), (32, 32), (128, 64), (200, 64)):
        lengths = [1 + 7 * index % 60 for index in range(batch)]
        operands, sizes = paged_forms.decode_operands(SHAPE, lengths)
        assert block_n(source, sizes) == wanted, batch
        if batch not in (32, 200):
            found = run_interpreted(source, node, operands, sizes)
            held_to([paged_forms.truth(SHAPE, node, operands)], found)


def test_all_buckets_of_a_source_compile(tmp_path) -> None:
    shape = paged_forms.Shape(head_dim=64, value_dim=64, page=16, paged=True, dtype=DType.BF16)
    node = paged_forms.decode_call(shape)
    known = decode_records(node, H100, b8={"block_n": 32}, b32={"prefetch": 0})
    made = choices(tmp_path, *known, target=H100, max_model_len=64)
    source = emit_paged_decode(node, layouts_of(node), H100, made, 32)
    assert source is not None and len(source.variants) == 3
    assert all(one.spills == 0 for one in compile_for(source, 90))


@pytest.mark.quick
def test_buckets_end_with_the_one_that_holds_a_step() -> None:
    ends = {most: buckets(most)[-1] for most in (1, 2, 8, 9, 20, 32, 33, 1000, None)}
    assert ends == {1: 1, 2: 8, 8: 8, 9: 32, 20: 32, 32: 32, 33: 128, 1000: 128, None: 128}


@pytest.mark.quick
def test_without_records_a_source_is_the_default_one(tmp_path) -> None:
    made = choices(tmp_path)
    decode, ragged = paged_forms.decode_call(SHAPE), paged_forms.ragged_call(RAGGED)
    assert emit_paged_decode(decode, layouts_of(decode), FEW, made) == emit_paged_decode(
        decode, layouts_of(decode), FEW
    )
    assert emit_paged_attention(ragged, layouts_of(ragged), FEW, made) == emit_paged_attention(
        ragged, layouts_of(ragged), FEW
    )
    for node in (walk_forms.norm_call(512), walk_forms.looked_up_call(64)):
        layouts = layouts_of(node)
        assert emit_fused(node, layouts, FEW, made) == emit_fused(node, layouts, FEW)
    assert {found.how for found in made.found.values()} == {"miss"}
    assert len(made.found) == len(BUCKETS) + 2  # what an index picks is not looked up


@pytest.mark.quick
def test_one_cut_for_all_buckets_is_one_variant(tmp_path) -> None:
    node = paged_forms.decode_call(SHAPE)
    cuts = {f"b{size}": {"block_n": 64} for size in BUCKETS}
    made = choices(tmp_path, *decode_records(node, **cuts), max_model_len=64)
    source = emit_paged_decode(node, layouts_of(node), FEW, made)
    assert source is not None and len(source.variants) == 1 and source.variants[0].guard == ()
    assert block_n(source, {"B": 3, "M": 2, "N": 9}) == 64


@pytest.mark.quick
def test_a_cut_that_does_not_fit_is_not_taken(tmp_path) -> None:
    node = paged_forms.decode_call(SHAPE)
    tunable = KernelTunable.of(DECODE, node, mixed_sizes(node, 8, 64), FEW)
    values = tunable.default.as_dict()
    odd = Config(tuple({**values, "block_n": 1 << 14, "num_stages": 5}.items()))
    assert not tunable.space.contains(odd)
    made = choices(tmp_path, record(tunable, odd), max_model_len=64)
    default = emit_paged_decode(node, layouts_of(node), FEW)
    assert emit_paged_decode(node, layouts_of(node), FEW, made) == default


@pytest.mark.quick
def test_a_record_of_another_room_or_of_full_lengths_is_not_taken(tmp_path) -> None:
    node = paged_forms.decode_call(SHAPE)
    wide = KernelTunable.of(DECODE, node, mixed_sizes(node, 8, 8000), FEW)
    full = KernelTunable.of(DECODE, node, sizes_of(node, 8, 2048), FEW)
    known = [record(one, changed(one, block_n=16)) for one in (wide, full)]
    default = emit_paged_decode(node, layouts_of(node), FEW)
    made = choices(tmp_path, *known, max_model_len=2048)
    assert emit_paged_decode(node, layouts_of(node), FEW, made) == default
    taken = choices(tmp_path, max_model_len=100_000)
    assert emit_paged_decode(node, layouts_of(node), FEW, taken) != default


def sequences_of(node: Node, sequences: int, capacity: int | None) -> tuple[Sizes, int]:
    sizes = mixed_sizes(node, sequences, capacity)
    page = node.operands[1].shape[1]
    return sizes, int(str(page)) * sizes["M"]


@pytest.mark.quick
def test_rooms_are_told_apart_by_powers_of_two_and_caches_stay_within_4_gb() -> None:
    node = paged_forms.decode_call(SHAPE)
    rooms = {room: sequences_of(node, 8, room)[1] for room in (1, 2048, 2049, 8192, 1 << 17, None)}
    assert rooms == {1: 2048, 2048: 2048, 2049: 4096, 8192: 8192, 1 << 17: 8192, None: 8192}
    huge = paged_forms.Shape(
        group=1, kv_heads=128, head_dim=128, value_dim=128, page=16, paged=True, dtype=DType.BF16
    )
    node = paged_forms.decode_call(huge)
    sizes, room = sequences_of(node, 128, 8192)
    assert room in CAPACITIES[:-1] and FULL not in sizes
    assert sizes["N"] * 16 * 128 * 256 * 2 <= 4 << 30


def test_a_program_takes_what_a_store_knows_of_its_steps(tmp_path) -> None:
    """Rows of the general Program are tuned for 2048 tokens, those of decode steps for theirs."""
    node = walk_forms.norm_call(512)
    layouts = tuple(dense(operand.shape) for operand in node.operands)
    tunable = KernelTunable.of(ROWS, node, row_sizes(node, None), H100)
    store = Store(tmp_path / "tuning.jsonl")
    made = record(tunable, changed(tunable, num_warps=4))
    store.add(Record(**{**_fields(made), "conditions": conditions_here()}))
    graph = Graph("general", tunable.graph.inputs, tunable.graph.outputs)
    warps = {}
    for most in (None, 32):
        lowered = BACKEND.lower(graph, Target.parse("cpu"), max_sequences=most, tuning=store)
        (line,) = map(json.loads, lowered.files[CHOICES].splitlines())
        (meta,) = (json.loads(f) for name, f in lowered.files.items() if "meta" in name)
        warps[most] = meta["variants"][0]["launches"][0]["num_warps"]
        assert line["key"]["problem"]["rows"] == (2048 if most is None else 32)
        assert line["used"] == (most is None)
    default = emit_fused(node, layouts, H100)
    assert default is not None
    assert warps == {None: 4, 32: default.variants[0].launches[0].num_warps}


def _fields(made: Record) -> dict[str, object]:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}


@pytest.mark.quick
def test_the_problems_of_a_graph_are_what_compiling_it_looks_up(tmp_path) -> None:
    decode, ragged = paged_forms.decode_call(SHAPE), paged_forms.ragged_call(RAGGED)
    norm = walk_forms.norm_call(512)
    cases = (
        (decode, 20, ["paged_decode"] * 3),
        (ragged, None, ["paged_attention"]),
        (norm, 20, ["rows"]),
        (norm, None, ["rows"]),
    )
    for node, most, wanted in cases:
        graph = KernelTunable.of(DECODE, node, {}, FEW).graph
        problems = problems_of(graph, FEW, most, 64)
        assert [one.template.name for one in problems] == wanted
        made = Choices(Store(tmp_path / "none.jsonl"), FEW, HERE, most, 64)
        for emit in kernels_for(Cutting(most), made)[node.op]:
            emit(node, layouts_of(node), FEW)
        assert set(made.found) == {one.key.digest for one in problems}
