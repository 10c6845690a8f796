"""Which calls the Hopper kernel of prefill takes, why not the others, and what else then changes.

It is in Gluon, which Triton's interpreter does not know: what it computes is tested on a GPU
(tests/gpu/test_hopper_attention.py), that it compiles without spills with the other defaults.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paged_forms import Shape, layouts_of, ragged_call, ragged_operands, truth
from tilewright.codegen.triton.fresh import Fresh
from tilewright.codegen.triton.kernels.hopper_attention import (
    default_prefill,
    takes_tiles,
    why_not,
)
from tilewright.codegen.triton.kernels.paged_attention import (
    emit_invariant_attention,
    emit_paged_attention,
)
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem
from tilewright.codegen.triton.tuning.attention import prefill_sizes
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.errors import UnsupportedError
from tilewright.ir.build import input_node, item, make
from tilewright.ir.dims import evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS
from triton_running import run_interpreted

H100 = TARGETS["h100"]
SHAPE = Shape(group=4, kv_heads=2, head_dim=64, value_dim=64, dtype=DType.BF16)


def problem_of(shape: Shape = SHAPE, **attrs: object) -> Problem:
    node = ragged_call(shape, **attrs)
    problem = Problem.of(node, layouts_of(node))
    assert problem is not None
    return problem


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"head_dim": 128, "value_dim": 128},
        {"group": 1},
        {"group": 32},
        {"dtype": DType.F16},
        {"page": 128, "paged": True},
    ],
)
@pytest.mark.parametrize("attrs", [{}, {"window": 100}, {"causal": False}])
def test_it_is_the_default_where_it_takes_a_call(changed, attrs):
    shape = replace(SHAPE, **changed)
    node = ragged_call(shape, **attrs)
    problem = problem_of(shape, **attrs)
    assert why_not(problem, H100) is None
    tiles = default_prefill(problem, H100)
    assert tiles is not None and tiles.programs == H100.sms and takes_tiles(problem, tiles, H100)
    source = emit_paged_attention(node, layouts_of(node), H100)
    assert source is not None and source.text.count("@gluon.jit\ndef prefill(") == 1
    ends = [variant.launches[-1].function for variant in source.variants]
    assert ends == ["merge", "prefill"] + ([] if shape.paged else ["prefill_any"])


@pytest.mark.parametrize(
    "changed, attrs, said",
    [
        ({"dtype": DType.F32}, {}, "16 bits"),
        ({"sinks": True}, {}, "added"),
        ({"alibi": True}, {}, "added"),
        ({"first": 4}, {"window": 9}, "added"),
        ({}, {"softcap": 20.0}, "capped"),
        ({}, {"scale": -0.1}, "scale"),
        ({"head_dim": 96, "value_dim": 96}, {}, "heads of 96"),
        ({"head_dim": 128}, {}, "heads of 128"),
        ({"group": 3}, {}, "groups of 3"),
        ({"group": 128, "kv_heads": 1}, {}, "groups of 128"),
        ({"page": 12, "paged": True}, {}, "pages of 12"),
        ({"page": 256, "paged": True}, {}, "pages of 256"),
        ({"strided": True}, {}, "rows of q"),
    ],
)
def test_what_it_does_not_take(changed, attrs, said):
    problem = problem_of(replace(SHAPE, **changed), **attrs)
    assert said in str(why_not(problem, H100))
    tiles = default_prefill(problem, H100)
    assert tiles is not None and not tiles.programs


@pytest.mark.parametrize("name", ["a100", "b200"])
def test_other_architectures_have_other_products(name):
    assert "sm_90" in str(why_not(problem_of(), TARGETS[name]))


def test_a_device_without_the_shared_memory_keeps_the_plain_kernel():
    small = replace(H100, shared_memory_per_block=100 << 10)
    tiles = default_prefill(problem_of(replace(SHAPE, head_dim=128, value_dim=128)), small)
    assert tiles is not None and not tiles.programs


def test_codes_and_deterministic_programs_keep_the_plain_kernel():
    coded = replace(SHAPE, codes=DType.I8)
    assert "codes" in str(why_not(problem_of(coded), H100))
    node = ragged_call(SHAPE)
    source = emit_invariant_attention(node, layouts_of(node), H100)
    assert source is not None and "gluon" not in source.text


def test_programs_share_the_tiles_of_rows():
    node = ragged_call(SHAPE)
    source = emit_paged_attention(node, layouts_of(node), H100)
    assert source is not None
    (launch,) = source.variants[1].launches
    for tokens, sequences, programs in ((40, 2, 10), (8192, 8, 132)):
        sizes = {"T": tokens, "B": sequences}
        assert [evaluate(size, sizes) for size in launch.grid] == [programs, 1, 1]


def test_the_interpreter_takes_the_variant_that_it_knows():
    shape = replace(SHAPE, page=16)
    node = ragged_call(shape)
    source = emit_paged_attention(node, layouts_of(node), H100)
    operands, sizes = ragged_operands(shape, [(20, 9), (0, 3)])
    assert source is not None
    (found,) = run_interpreted(source, node, operands, sizes)
    torch.testing.assert_close(found.double(), truth(shape, node, operands), rtol=0.03, atol=0.03)
    node = ragged_call(replace(shape, paged=True))
    source = emit_paged_attention(node, layouts_of(node), H100)
    assert source is not None
    with pytest.raises(UnsupportedError, match="Gluon"):
        run_interpreted(source, node, operands, sizes)


def test_a_tuner_may_choose_either_kernel():
    tunable = KernelTunable.of(
        template_named("paged_attention"), (node := ragged_call(SHAPE)), prefill_sizes(node), H100
    )
    assert tunable.default["programs"] == H100.sms
    configs = list(tunable.space.configs())
    ours = [config for config in configs if config["programs"]]
    assert tunable.default in ours and len(ours) < len(configs)
    for config in ours:
        assert (config["block_m"], config["num_warps"]) == (128, 8)
    prior = [tunable.template.prior(tunable.node, c, tunable.sizes, H100) for c in configs]
    assert configs[prior.index(min(prior))]["programs"]
    plain = ragged_call(replace(SHAPE, group=3))
    other = KernelTunable.of(tunable.template, plain, prefill_sizes(plain), H100)
    assert "programs" not in other.space.names


def test_a_new_prompt_is_not_the_librarys_where_it_is_the_kernels():
    t, b, n, p = map(symbol, "TBNP")

    def attention(head_dim: int) -> Node:
        def tensor(name: str, *shape: object, of: DType = DType.BF16) -> Node:
            return input_node(name, TensorType(of, shape))

        q, k, v = (tensor(x, t, h, head_dim) for x, h in (("q", 4), ("k", 2), ("v", 2)))
        caches = [tensor(name, n, p, 2, head_dim) for name in ("kc", "vc")]
        slots = tensor("slots", t, of=DType.I64)
        appended = make("append_kv", k, v, *caches, slots, None, None, None, None, None)
        sizes = {"tables": (b, symbol("M")), "lens": (b,), "start": (b + 1,)}
        metadata = (tensor(name, *shape, of=DType.I32) for name, shape in sizes.items())
        after = (item(appended, 0), item(appended, 1))
        return make("paged_attention", q, *after, *metadata, None, None, scale=0.25)

    assert Fresh.of(attention(80), H100) is not None
    assert Fresh.of(attention(64), H100) is None
