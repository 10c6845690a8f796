"""Which calls the Hopper kernel of prefill takes, why not the others, and what else then changes.

It is in Gluon, which Triton's interpreter does not know: what it computes is tested on a GPU
(tests/gpu/test_hopper_attention.py), that it compiles without spills with the other defaults.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paged_forms import Shape, layouts_of, ragged_call, ragged_operands, truth
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.fresh import Fresh
from tilewright.codegen.triton.kernels.hopper_attention import (
    takes_tiles,
    why_not,
)
from tilewright.codegen.triton.kernels.paged_attention import (
    emit_invariant_attention,
    emit_paged_attention,
    prefill_source,
)
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem, Tiles, shared_bytes
from tilewright.codegen.triton.kernels.prefill_steps import (
    KINDS,
    WHOLE,
    default_prefill,
    shares_of,
    steps_at,
    steps_of,
)
from tilewright.codegen.triton.package import read_package
from tilewright.codegen.triton.tuning.attention import (
    config_of,
    lengths_of,
    prefill_sizes,
    step_sizes,
    tiles_of,
)
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
    assert ends[0] == "merge" and {"prefill"} < set(ends)
    assert set(ends[1:]) <= {"prefill", "prefill_plain", "prefill_any"}
    assert (ends[-1] == "prefill_any") != shape.paged


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
    (launch,) = next(v for v in source.variants if v.launches[0].function == "prefill").launches
    for tokens, sequences, programs in ((40, 2, 10), (8192, 8, 132)):
        sizes = {"T": tokens, "B": sequences}
        assert [evaluate(size, sizes) for size in launch.grid] == [programs, 1, 1]


PLAIN = Tiles(64, 128, 4, 2)
KEYS_64 = Tiles(128, 64, 8, 4, H100.sms)
BOTH_WAYS = replace(KEYS_64, both_ways=True)
KEYS_128 = Tiles(128, 128, 8, 2, H100.sms)
STAGES_4 = replace(KEYS_128, num_stages=4)
AT = [  # tokens and sequences of a step as they are padded; what heads of 128 have there, and of 64
    (16, 1, "few", KEYS_64, PLAIN),
    (256, 64, "mixed", BOTH_WAYS, STAGES_4),
    (256, 1, "few", KEYS_64, PLAIN),
    (512, 4, "few", KEYS_64, PLAIN),
    (576, 1, "usual", KEYS_64, KEYS_128),
    (576, 16, "mixed", BOTH_WAYS, STAGES_4),
    (2048, 1, "long", KEYS_128, STAGES_4),
    (2048, 4, "usual", KEYS_64, KEYS_128),
    (2048, 64, "mixed", BOTH_WAYS, STAGES_4),
    (8192, 1, "long", KEYS_128, STAGES_4),
    (8192, 4, "long", KEYS_128, STAGES_4),
    (8192, 16, "usual", KEYS_64, KEYS_128),
    (8192, 64, "usual", KEYS_64, KEYS_128),
    (8320, 128, "mixed", BOTH_WAYS, STAGES_4),
]


@pytest.mark.quick
@pytest.mark.parametrize("tokens, sequences, kind, wide, narrow", AT)
def test_the_default_of_a_step(tokens, sequences, kind, wide, narrow):
    sizes = {"T": tokens, "B": sequences, "M": 600, "N": 9000, "P": 16}
    for head_dim, wanted in ((128, wide), (64, narrow)):
        shape = replace(SHAPE, head_dim=head_dim, value_dim=head_dim)
        node, problem = ragged_call(shape), problem_of(shape)
        steps = steps_at(problem, H100, sizes)
        assert (steps.name, default_prefill(problem, H100, steps)) == (kind, wanted)
        source = emit_paged_attention(node, layouts_of(node), H100)
        assert source is not None
        variant = next(v for v in source.variants if min(at(v.guard, sizes), default=0) >= 0)
        (launch,) = variant.launches
        cut = launch.constexprs
        assert launch.function == ("prefill" if wanted.programs else "prefill_plain")
        assert cut["BLOCK_N"] == wanted.block_n
        assert cut.get("BOTH_WAYS", False) == wanted.both_ways
        stages = cut["STAGES"] if wanted.programs else launch.num_stages
        assert stages == wanted.num_stages
        other = {**sizes, "P": 32}  # of pages that are not usual
        (last,) = (v for v in source.variants if not v.guard)
        assert last.launches[0].function == "prefill_any"
        assert all(min(at(v.guard, other)) < 0 for v in source.variants if v is not last)


def at(guard, sizes):
    return [evaluate(size, sizes) for size in guard]


@pytest.mark.quick
def test_steps_of_a_known_size_have_one_cut():
    shape = replace(SHAPE, head_dim=128, value_dim=128, paged=True, page=16)
    for tokens, sequences, kind in ((16, 1, "few"), (4096, 1, "long"), (2048, 2, "usual")):
        node = ragged_call(shape, {"T": tokens, "B": sequences})
        problem = Problem.of(node, layouts_of(node))
        assert problem is not None
        assert steps_of(problem, H100)[-1].name == kind
        (share,) = shares_of(problem, H100, lambda steps: None)
        assert share.guard == () and share.tiles == default_prefill(
            problem, H100, steps_of(problem, H100)[-1]
        )
    assert steps_of(problem_of(replace(SHAPE, group=3)), H100) == (WHOLE,)
    assert steps_of(problem_of(), TARGETS["a100"]) == (WHOLE,)


@pytest.mark.quick
def test_each_kind_of_steps_is_tuned_as_one_of_them():
    node, problem = ragged_call(SHAPE), problem_of()
    template = template_named("paged_attention")
    keys = set()
    for steps in KINDS:
        sizes = step_sizes(node, steps)
        one = KernelTunable.of(template, node, sizes, H100)
        keys.add(one.key.digest)
        assert steps_at(problem, H100, sizes) is steps
        assert tiles_of(one.default) == default_prefill(problem, H100, steps)
        lengths = lengths_of(node, sizes)
        assert sum(now for _, now in lengths) == steps.tokens == sizes["T"]
        assert [now for _, now in lengths].count(1) == steps.decodes
        assert max(sum(step) for step in lengths) <= sizes["M"] * sizes["P"]
        for tiles in (PLAIN, KEYS_64, BOTH_WAYS, KEYS_128, STAGES_4):
            assert one.space.contains(config_of(tiles)), (steps, tiles)
        assert not one.space.contains(config_of(replace(PLAIN, both_ways=True)))
    assert len(keys) == len(KINDS)


@pytest.mark.quick
def test_a_cut_of_some_steps_is_theirs_alone():
    problem = problem_of(replace(SHAPE, head_dim=128, value_dim=128))
    found = shares_of(problem, H100, lambda steps: PLAIN if steps.name == "few" else None)
    assert [share.tiles for share in found] == [BOTH_WAYS, PLAIN, KEYS_128, KEYS_64]
    same = shares_of(problem, H100, lambda steps: KEYS_128)
    assert [(share.tiles, share.guard) for share in same] == [(KEYS_128, ())]


def test_the_default_of_most_steps_compiles_without_spills():
    shape = replace(SHAPE, kv_heads=8, head_dim=128, value_dim=128, page=16, paged=True)
    (package,) = compile_sources([prefill_source(problem_of(shape), BOTH_WAYS)], 90)
    (binary,) = package.binaries.values()
    taken = binary.resources
    assert taken.spills == 0 and taken.registers == 168
    assert taken.shared <= shared_bytes(problem_of(shape), BOTH_WAYS)
    assert binary.scratch_bytes == 0 and binary.parameters.count("b8") == 3
    assert read_package(package.files().__getitem__, package.id) == package


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


def test_a_cut_brings_whole_pages() -> None:
    shape = replace(SHAPE, head_dim=128, value_dim=128, page=128, paged=True)
    problem = problem_of(shape)
    assert takes_tiles(problem, KEYS_128, H100) and not takes_tiles(problem, KEYS_64, H100)
    node = ragged_call(shape)
    source = emit_paged_attention(node, layouts_of(node), H100)
    assert source is not None
    compile_sources([source], H100.arch)
