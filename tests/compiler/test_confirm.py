"""Confirming choices: the verdicts over steps whose true ratio is known, and what they put back."""

from __future__ import annotations

import math
import random

import pytest
import torch

import tilewright as tw
from paged_forms import Shape, ragged_call
from tilewright.autotune.key import Conditions
from tilewright.autotune.lookup import lookup
from tilewright.autotune.record import Record
from tilewright.autotune.store import Store
from tilewright.autotune.verdicts import Interval, Verdict
from tilewright.codegen.triton.kernels.prefill_steps import KINDS
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.tuning.attention import step_sizes
from tilewright.codegen.triton.tuning.conditions import conditions_here
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.compiler.confirm import (
    BatchVerdict,
    batches_of,
    confirm,
    judge,
    put_back,
    recut,
    used_by,
)
from tilewright.compiler.tuning import problems_of_image
from tilewright.errors import UnsupportedError, UsageError
from tilewright.ir.dtypes import DType
from tilewright.targets import TARGETS
from tiny_models import tiny_model
from tuning_players import Clock, gemm_problems
from tuning_records import choice_of

HERE = Conditions("3.6", None, "0.1")


class Played:
    """Steps of 5 ms that drift; the new ones take `ratios[batch]` times as long.

    Args:
        ratios: true ones, by batch.
        noise: of each block, relative.
        drift: of each block after the one before, relative.
        after: true ratios once both sides are loaded anew.
    """

    def __init__(self, ratios, *, noise=0.002, drift=0.0, after=None, seed=0):
        self.ratios, self.after = ratios, after or ratios
        self.noise, self.drift, self.dice = noise, drift, random.Random(seed)
        self.blocks, self.loads, self.order = 0, 1, []

    def seconds(self, side, batch):
        self.blocks += 1
        self.order.append(side)
        ratio = self.ratios[batch] if side == "new" else 1.0
        return (
            5e-3 * ratio * (1 + self.drift * self.blocks) * math.exp(self.dice.gauss(0, self.noise))
        )

    def reload(self):
        self.loads += 1
        self.ratios = self.after


RATIOS = {1: 0.97, 8: 1.0, 32: 1.03, 128: 0.996}
WORDS = {1: "faster", 8: "same within 1%", 32: "slower", 128: "same within 1%"}


@pytest.mark.parametrize("seed", range(3))
def test_each_batch_gets_the_verdict_of_its_true_ratio(seed):
    steps = Played(RATIOS, seed=seed)
    found = judge(steps, list(RATIOS), seconds=math.inf)
    assert {one.batch: one.words for one in found} == WORDS
    for one in found:
        assert one.ratio.low <= RATIOS[one.batch] <= one.ratio.high
        assert one.old == pytest.approx(5e-3, rel=0.01)
    assert steps.loads == 2  # only what was slower, anew


def test_a_drift_in_time_is_nobodys(monkeypatch):
    (one,) = judge(Played({8: 1.0}, noise=1e-4, drift=0.005), [8], seconds=math.inf)
    assert one.verdict is Verdict.NO_CHANGE and one.ratio.value == pytest.approx(1, abs=1e-3)


def test_blocks_are_abba_and_then_baab():
    steps = Played({8: 1.0}, noise=1e-4)
    judge(steps, [8], seconds=math.inf)
    assert steps.order[:8] == ["old", "new", "new", "old", "new", "old", "old", "new"]


def test_what_a_second_load_does_not_confirm_is_not_slower():
    steps = Played({8: 1.02}, noise=5e-4, after={8: 1.0})
    (one,) = judge(steps, [8], seconds=math.inf)
    assert one.words == "same within 1%" and not one.is_slower
    assert "not confirmed" in one.note


def test_less_than_half_a_percent_is_never_slower():
    for seed in range(5):
        (one,) = judge(Played({8: 1.003}, noise=1e-3, seed=seed), [8], seconds=math.inf)
        assert not one.is_slower


def test_without_time_nothing_is_decided_and_nothing_is_slower():
    clock = Clock()
    steps = Played({8: 1.5})
    (one,) = judge(steps, [8], seconds=0.0, clock=clock.monotonic)
    assert (one.words, one.ratio, one.rounds, steps.blocks) == ("not decidable", None, 0, 0)
    assert one.to_json()["interval"] is None


def made(tunable, config, **changes) -> Record:
    runners_up = ((tunable.default, 1e-5),)
    return choice_of(tunable, config, **{"conditions": HERE, "runners_up": runners_up, **changes})


def other(tunable):
    """Some config that is not the default."""
    return next(c for c in tunable.space.configs() if c != tunable.default)


def verdict(batch, slower=True):
    kind = Verdict.REGRESSION if slower else Verdict.IMPROVEMENT
    return BatchVerdict(batch, kind, Interval(1.02, 1.01, 1.03), 1e-3, 1.02e-3, 12)


@pytest.mark.quick
@pytest.mark.parametrize(("batch", "tokens"), [(2, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_a_step_uses_the_next_size_up(batch, tokens):
    (used,) = used_by(gemm_problems(4), batch)
    assert dict(used.key.problem)["tokens"] == tokens
    assert used_by([], batch) == []


@pytest.mark.parametrize("batch, tokens", [(1, 16), (8, 16), (32, 32), (129, 128), (256, 128)])
def test_attention_over_prompts_is_not_in_a_decode_step(batch, tokens):
    node = ragged_call(Shape(head_dim=64, value_dim=64, dtype=DType.BF16))
    prefill = template_named("paged_attention")
    others = [
        KernelTunable.of(prefill, node, step_sizes(node, steps), TARGETS["h100"]) for steps in KINDS
    ]
    (used,) = used_by([*others, *gemm_problems(4)], batch)
    assert dict(used.key.problem)["tokens"] == tokens
    assert used_by(others, batch) == []


def test_only_products_of_slower_steps_go_back_and_the_reason_is_kept(tmp_path):
    problems = gemm_problems(4)
    store = Store(tmp_path / "own.jsonl")
    for tunable in problems[:3]:
        store.add(made(tunable, other(tunable)))
    store.add(made(problems[3], problems[3].default))
    verdicts = [verdict(8, slower=False), verdict(32), verdict(128)]
    (back,) = put_back(store, problems, verdicts, HERE)  # of 128 it is the default already
    tunable = problems[1]
    assert (back.key, back.config, back.seconds) == (tunable.key, tunable.default, 1e-5)
    assert back.numerics == tunable.numerics(tunable.default)
    config, reason = back.failed[-1]
    assert config == other(tunable)
    assert "decode step of 32 takes 1.0200 times as long [1.0100, 1.0300]" in reason
    assert lookup(store, tunable.key, HERE).record == back
    for untouched in (problems[0], problems[2]):
        assert lookup(store, untouched.key, HERE).record.config == other(untouched)
    assert put_back(store, problems, verdicts, HERE) == []


def test_a_shipped_choice_is_overruled_and_its_table_left_alone(tmp_path):
    (tunable,) = gemm_problems(1)
    table = tmp_path / "shipped.jsonl"
    table.write_text(made(tunable, other(tunable)).line + "\n")
    before = table.read_bytes()
    store = Store(tmp_path / "own.jsonl", shipped=[table])
    put_back(store, [tunable], [verdict(8)], HERE)
    found = lookup(store, tunable.key, HERE)
    assert (found.how, found.record.config) == ("exact", tunable.default)
    assert table.read_bytes() == before


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """Kernels as sources alone: nothing here launches one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tilewright.codegen.triton.aot.compile_sources",
            lambda sources, arch: [KernelPackage(source, {}) for source in sources],
        )
        yield


@pytest.fixture(scope="module")
def image(uncompiled):
    """Of one layer that is wide enough for its products to have a choice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return tw.compile(
        model, target="h100", max_batch_size=20, max_model_len=64, tune="none", verify="structure"
    ).image


def test_an_engine_is_cut_anew_by_its_graph_and_nothing_else_changes(image, tmp_path):
    assert recut(image, None) == image
    store = Store(tmp_path / "own.jsonl")
    problems = problems_of_image(image)
    tunable = next(p for p in problems if p.space.count() > 1 and p in used_by(problems, 20))
    store.add(made(tunable, other(tunable), conditions=conditions_here(driver=True)))
    new = recut(image, store)
    assert new.decode.program != image.decode.program
    assert new.program == image.program and new.weights == image.weights
    assert set(image.files) < set(new.files)
    steps = Played({1: 1.0, 20: 1.05}, noise=1e-3)
    found = confirm(image, new, problems, store, [1, 20], start=lambda *_: steps)
    assert [one.words for one in found.verdicts] == ["same within 1%", "slower"]
    assert [record.key for record in found.put_back] == [tunable.key] and found.is_slower
    assert recut(image, store).decode.program == image.decode.program


def test_the_same_kernels_are_not_measured(image, tmp_path):
    def never(*given):
        pytest.fail("measured")

    store = Store(tmp_path / "own.jsonl")
    found = confirm(image, recut(image, store), [], store, [1], start=never)
    assert found.verdicts == () and not found.is_slower


def test_batches_are_those_that_the_engine_takes(image):
    assert batches_of(image) == [1, 8, 20]
    assert batches_of(image, (20, 2)) == [2, 20]
    for wrong in ((0,), (21,), (1, 64)):
        with pytest.raises(UsageError, match="from 1 to 20"):
            batches_of(image, wrong)


def test_another_kind_of_engine_is_refused():
    engine = tw.compile(tiny_model("llama"), target="cpu", backend="eager", verify="structure")
    with pytest.raises(UnsupportedError, match="Triton backend"):
        recut(engine.image, None)
