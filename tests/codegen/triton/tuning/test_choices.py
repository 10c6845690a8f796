"""What a compile takes from the store: records of the very problem, and of nothing near it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import experts_forms
from canned_binaries import canned_binaries
from linear_forms import Form
from linear_forms import node_of as linear_node
from tilewright.autotune.key import Conditions
from tilewright.autotune.record import Record
from tilewright.autotune.space import Config
from tilewright.autotune.store import Store
from tilewright.codegen.base import CHOICES
from tilewright.codegen.triton import aot
from tilewright.codegen.triton.backend import BACKEND
from tilewright.codegen.triton.kernels.experts import emit_experts
from tilewright.codegen.triton.package import KernelPackage, kernel_id
from tilewright.codegen.triton.tuning.choices import Choices
from tilewright.codegen.triton.tuning.expert_spaces import groups_of, rows_of
from tilewright.codegen.triton.tuning.experts import group_sizes, row_sizes
from tilewright.codegen.triton.tuning.problem import problem_graph
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.errors import UnsupportedError
from tilewright.ir.dtypes import DType
from tilewright.targets import TARGETS
from tuning_records import choice_of

H100 = TARGETS["h100"]
GEMM = template_named("linear_gemm")
NODE = linear_node(Form(k=512, n=256, norm="weight", dtype=DType.BF16))
HERE = Conditions("3.7.1", None, "0.1.0")
TUNABLE = KernelTunable.of(GEMM, NODE, {"B": 64}, H100)
OTHER = Config(tuple({**TUNABLE.default.as_dict(), "num_stages": 3, "block_n": 32}.items()))


def record(tunable: KernelTunable = TUNABLE, config: Config = OTHER, **changes: object) -> Record:
    return choice_of(tunable, config, **{"conditions": HERE, **changes})


def choices(path: Path, *records: Record) -> Choices:
    store = Store(path / "tuning.jsonl")
    for one in records:
        store.add(one)
    return Choices(store, H100, HERE)


def test_the_record_of_a_problem_is_taken(tmp_path) -> None:
    assert TUNABLE.space.contains(OTHER)
    made = choices(tmp_path, record())
    assert made.config(GEMM, NODE, {"B": 64}) == OTHER
    (line,) = map(json.loads, made.lines().splitlines())
    assert line["used"] and line["how"] == "exact"
    assert [found.how for found in made.found.values()] == ["exact"]


def test_an_empty_store_leaves_the_default(tmp_path) -> None:
    made = choices(tmp_path)
    assert made.config(GEMM, NODE, {"B": 64}) is None
    assert [found.how for found in made.found.values()] == ["miss"]


@pytest.mark.parametrize("sizes", [{"B": 32}, {"B": 128}, {"B": 16}])
def test_a_record_of_other_sizes_is_not_taken(tmp_path, sizes) -> None:
    made = choices(tmp_path, record())
    assert made.config(GEMM, NODE, sizes) is None


def test_a_record_of_another_device_is_not_taken(tmp_path) -> None:
    made = choices(tmp_path, record(replace(TUNABLE, target=TARGETS["h200"])))
    assert made.config(GEMM, NODE, {"B": 64}) is None
    assert [found.how for found in made.found.values()] == ["neighbour"]


def test_other_conditions_warn_and_are_on_trial(tmp_path) -> None:
    old = record(conditions=Conditions("3.0.0", "13.0", "0.1.0"))
    made = choices(tmp_path, old)
    assert made.config(GEMM, NODE, {"B": 64}) == OTHER
    (line,) = map(json.loads, made.lines().splitlines())
    assert line["used"] and line["how"] == "stale" and "triton" in line["differs"]
    assert made.on_trial == set(made.found)
    assert made.without_trials().config(GEMM, NODE, {"B": 64}) is None
    assert not choices(tmp_path, record()).on_trial


@pytest.fixture
def _canned():
    with canned_binaries():
        yield


@pytest.mark.usefixtures("_canned")
@pytest.mark.parametrize("how", ["spills", "does not compile"])
def test_what_is_on_trial_is_dropped_where_a_kernel_is_not_sound(
    tmp_path, monkeypatch, how: str
) -> None:
    store = Store(tmp_path / "tuning.jsonl")
    store.add(record(conditions=Conditions("3.0.0", "13.0", "0.1.0")))
    graph, h100 = problem_graph(NODE), TARGETS["h100"]
    plain = BACKEND.lower(graph, h100, max_sequences=64)
    tried = BACKEND.lower(graph, h100, max_sequences=64, tuning=store)
    assert tried.program != plain.program
    compiled = aot.compile_sources

    def unsound(sources, arch):
        if any(kernel_id(one) in str(tried.program.calls) for one in sources):
            if how == "does not compile":
                raise UnsupportedError("kernel", expected="one", found="none", remedy="none")
            return [spilling(package) for package in compiled(sources, arch)]
        return compiled(sources, arch)

    monkeypatch.setattr(aot, "compile_sources", unsound)
    dropped = BACKEND.lower(graph, h100, max_sequences=64, tuning=store)
    assert dropped.program == plain.program
    lines = map(json.loads, dropped.files[CHOICES].splitlines())
    assert not any(line["used"] for line in lines)


def spilling(package: KernelPackage) -> KernelPackage:
    binaries = {
        key: replace(binary, resources=replace(binary.resources, spills=64))
        for key, binary in package.binaries.items()
    }
    return replace(package, binaries=binaries)


def test_a_config_outside_of_the_space_is_not_taken(tmp_path) -> None:
    odd = Config(tuple({**OTHER.as_dict(), "num_stages": 100}.items()))
    assert choices(tmp_path, record(config=odd)).config(GEMM, NODE, {"B": 64}) is None


def test_other_code_is_another_key(tmp_path, monkeypatch) -> None:
    kept = choices(tmp_path, record())
    monkeypatch.setitem(vars(GEMM), "code_hash", "0" * 64)
    assert kept.config(GEMM, NODE, {"B": 64}) is None
    (found,) = kept.found.values()
    assert found.how == "miss" and "template_hash" in found.differs


def test_experts_take_the_cuts_of_few_tokens_and_of_each_bucket(tmp_path) -> None:
    node = experts_forms.node_of(experts_forms.Form(32, 4, 512, 256, DType.BF16))
    (first, sizes), (second, _) = list(group_sizes(node, None))[:2]
    wanted = {}
    for name, of, change in (
        ("expert_groups", sizes, {"down_num_warps": 8}),
        ("expert_rows", row_sizes(node), {"gate_up_block_n": 4}),
    ):
        tunable = KernelTunable.of(template_named(name), node, of, H100)
        config = Config(tuple({**tunable.default.as_dict(), **change}.items()))
        assert tunable.space.contains(config)
        wanted[name] = record(tunable, config)
    made = choices(tmp_path, *wanted.values())
    assert made.expert_groups(node, first) == groups_of(wanted["expert_groups"].config)
    assert made.expert_rows(node) == rows_of(wanted["expert_rows"].config)
    assert made.expert_groups(node, second) is None
    source = emit_experts(node, experts_forms.layouts_of(node), H100, made)
    assert source is not None
    in_rows, grouped = source.variants[:2]
    assert in_rows.launches[0].constexprs["BLOCK_N"] == 4 and grouped.launches[2].num_warps == 8
