"""Experts by descriptors against float64: every form and routing, what they compile to, and where
they are taken.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from experts_forms import (
    H100,
    Form,
    assert_near,
    layouts_of,
    node_of,
    operands_of,
    problem_of,
    routed,
    source_of,
)
from tilewright.codegen.triton.kernels.experts import emit_experts, emit_invariant_experts
from tilewright.codegen.triton.kernels.experts_tiles import PRODUCTS
from tilewright.codegen.triton.kernels.wide_experts_tiles import (
    WideTiles,
    default_tiles,
    takes_tiles,
    takes_wide,
    wide_shared_bytes,
)
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.ir.dtypes import DType
from tilewright.targets import TARGETS, Target
from triton_bodies import run
from triton_running import compile_for

# A rest of a tile is whatever its memory held, and is read by no one.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SMALL = WideTiles(16, 16, 16, 4, 2, 2)


def check(form: Form, ids: torch.Tensor, tiles: WideTiles, sms: int) -> None:
    """The kernel is as near to float64 as torch, where so many multiprocessors share the tiles."""
    node = node_of(form)
    target = replace(H100, sms=sms)
    source = source_of(node, None, (((replace(tiles, shared=False), tiles), None),), target)
    operands = operands_of(form, ids)
    (found,) = run(source, node, operands, {"T": len(ids)})
    assert_near(form, node, operands, found)


@settings(max_examples=4, phases=PHASES)
@given(
    form=st.builds(
        Form,
        experts=st.sampled_from([8, 11]),
        slots=st.sampled_from([1, 2, 3, 8]),
        inner=st.sampled_from([8, 24]),
        width=st.sampled_from([16, 40]),
        dtype=st.sampled_from([DType.F16, DType.BF16]),
        activation=st.sampled_from(["silu", "gelu_tanh", "gpt_oss"]),
        biases=st.booleans(),
        wide=st.booleans(),
    ),
    kind=st.sampled_from(["any", "the same", "not the first"]),
    tokens=st.sampled_from([1, 7, 40]),
    sms=st.integers(1, 3),
    group=st.integers(1, 3),
    shared=st.booleans(),
)
def test_it_is_the_op_in_float64(form, kind, tokens, sms, group, shared) -> None:
    check(form, routed(form, tokens, kind), replace(SMALL, group=group, shared=shared), sms)


def test_places_are_found_by_several_programs_of_several_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "tilewright.codegen.triton.kernels.experts_entries"
    monkeypatch.setattr(f"{module}._CHUNK", 16)
    monkeypatch.setattr(f"{module}._SHARERS", 3)
    form = Form(experts=5, slots=2, inner=8, dtype=DType.BF16)
    for kind in ("any", "the same"):
        check(form, routed(form, 53, kind), SMALL, 2)


def is_taken(form: Form, target: Target = H100) -> bool:
    return takes_wide(problem_of(node_of(form)), target)


MIXTRAL = Form(8, 2, 14336, 4096, DType.BF16)


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": DType.F32},
        {"transposed": True},
        {"inner": 14340},  # rows of down that are not 16 bytes apart
        {"width": 4092},
    ],
)
def test_other_experts_are_declined(changed: dict[str, object]) -> None:
    assert is_taken(MIXTRAL) and not is_taken(replace(MIXTRAL, **changed))


def test_weights_that_begin_elsewhere_than_descriptors_can_are_declined() -> None:
    problem = problem_of(node_of(MIXTRAL))
    layouts = list(problem.layouts)
    for operand in (3, 4):
        layout = layouts[operand]
        assert layout is not None
        moved = [*layouts[:operand], replace(layout, offset=4), *layouts[operand + 1 :]]
        assert not takes_wide(replace(problem, layouts=tuple(moved)), H100)


def test_targets_where_it_was_not_measured_are_declined() -> None:
    assert not any(is_taken(MIXTRAL, TARGETS[name]) for name in ("a100", "b200", "cpu"))


def test_cuts_that_no_block_holds_are_declined() -> None:
    problem = problem_of(node_of(MIXTRAL))
    gate_up, down = default_tiles(problem, H100, 128) or (None, None)
    assert isinstance(gate_up, WideTiles) and isinstance(down, WideTiles)
    assert takes_tiles(problem, "gate_up", gate_up, H100)
    assert takes_tiles(problem, "down", down, H100)
    assert not takes_tiles(problem, "down", replace(down, num_stages=4), H100)
    assert not takes_tiles(problem, "gate_up", replace(gate_up, num_warps=4), H100)
    assert not takes_tiles(problem, "gate_up", replace(gate_up, block_m=32), H100)
    small = replace(H100, shared_memory_per_block=100_000)
    assert not any(isinstance(x, WideTiles) for x in default_tiles(problem, small, 128) or ())


def test_experts_of_few_pairs_and_any_where_order_matters_keep_the_pointers() -> None:
    node = node_of(MIXTRAL)
    source = emit_experts(node, layouts_of(node), H100)
    assert source is not None
    wide = ["wide" in " ".join(x.function for x in v.launches) for v in source.variants]
    assert wide == [*[False] * (len(wide) - 1), True]
    invariant = emit_invariant_experts(node, layouts_of(node), H100)
    assert invariant is not None and "wide" not in invariant.text


def test_cuts_of_both_forms_are_configs_of_one_space() -> None:
    node = node_of(MIXTRAL)
    one = KernelTunable.of(template_named("expert_groups"), node, {"T": 4096}, H100)
    configs = list(one.space.configs())
    wide = [config for config in configs if config["wide"]]
    assert one.default in wide and len(wide) < len(configs)
    for config in wide[::97]:
        assert one.template.source(node, config, one.sizes, H100) is not None
        assert 1e-3 < one.prior(config) < 1e-1
    by_pointers = [config for config in configs if not config["wide"]]
    assert one.prior(one.default) < min(map(one.prior, by_pointers))


def test_defaults_compile_ahead_of_time_and_do_not_spill() -> None:
    form = replace(MIXTRAL, biases=True)
    problem = problem_of(node_of(form))
    tiles = default_tiles(problem, H100, 128)
    assert tiles is not None
    source = source_of(node_of(form), None, ((tiles, None),))
    names = [launch.function for launch in source.variants[0].launches]
    taken = dict(zip(names, compile_for(source, 90), strict=True))
    for product, cut in zip(PRODUCTS, tiles, strict=True):
        assert isinstance(cut, WideTiles)
        shared = taken[f"experts_wide_{product}"].shared
        assert shared <= wide_shared_bytes(problem, product, cut)
    assert not any(resources.spills for resources in taken.values())
