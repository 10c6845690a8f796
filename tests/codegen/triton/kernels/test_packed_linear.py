"""Decode products of 4-bit weights and rows rounded to int8, in Triton, against float64 over what
the codes of both stand for; and what they compile to.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tilewright as tw
from linear_forms import Form, assert_close
from quant_forms import QuantForm, packed_forms, packed_operands, quant_node, quant_operands
from tilewright.codegen.triton.kernels.linear_tiles import Cutting, GemmTiles, GemvTiles
from tilewright.codegen.triton.kernels.packed_linear import (
    emit_invariant_packed_linear,
    emit_packed_linear,
    packed_linear_source,
)
from tilewright.codegen.triton.kernels.packed_linear_tiles import Packed
from tilewright.codegen.triton.layout import located
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.targets import TARGETS
from tiny_models import PROMPTS, tiny_model
from triton_running import compile_for, run_interpreted, since

H100 = TARGETS["h100"]
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SMALL_GEMV, SMALL_GEMM = GemvTiles(2, 64, 1), GemmTiles(16, 16, 64, 2, 2)
PLAIN = QuantForm(Form(256, 24, DType.BF16), group=128, scale=DType.BF16, compute=DType.I8)


def layouts(node: Node):
    return tuple(located(operand)[1] for operand in node.operands)


def packed_of(form: QuantForm) -> Packed:
    node = quant_node(form)
    found = Packed.of(node, layouts(node))
    assert found is not None
    return found


def check(
    form: QuantForm, tokens: int, gemv: GemvTiles | None, gemms: list[GemmTiles], seed: int = 0
) -> None:
    """Holds the kernel's result against float64; several tokens of small groups stay floats."""
    packed = packed_of(form)
    source = packed_linear_source(packed, H100, gemv, gemms)
    assert source is not None
    if packed.by_matrix or (tokens == 1 and gemv is not None):
        bases, wanted = packed_operands(form, packed.group, tokens, seed)
    else:
        bases, wanted = quant_operands(form, tokens, seed)
    (found,) = run_interpreted(source, quant_node(form), bases, {"B": tokens})
    assert_close(form.form, found, wanted)


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(form=packed_forms(), block_n=st.sampled_from([1, 8]), block_k=st.sampled_from([32, 128]))
def test_one_token(form: QuantForm, block_n: int, block_k: int) -> None:
    check(form, 1, GemvTiles(block_n, block_k, 1), [SMALL_GEMM])


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(
    form=packed_forms(),
    tokens=st.integers(1, 40),
    block_n=st.sampled_from([16, 32]),
    splits=st.integers(1, 3),
)
def test_several_tokens(form: QuantForm, tokens: int, block_n: int, splits: int) -> None:
    tiles = GemmTiles(16, block_n, 64, 1, 2, splits, ahead=64)
    if not tiles.has_work(form.form.k):
        tiles = replace(tiles, splits=1)
    check(form, tokens, None, [tiles])


@pytest.mark.quick
@pytest.mark.parametrize("zero", [None, DType.U8])
def test_the_first_tiles_that_hold_all_tokens_are_taken(zero: DType | None) -> None:
    form = replace(PLAIN, form=Form(256, 24, DType.BF16, "weight", halves=True), zero=zero)
    gemms = [SMALL_GEMM, replace(SMALL_GEMM, block_m=32, block_k=128, splits=2)]
    for tokens in (1, 2, 17):
        check(form, tokens, SMALL_GEMV, gemms)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_nan_and_no_other(value: float, tokens: int) -> None:
    source = packed_linear_source(packed_of(PLAIN), H100, SMALL_GEMV, [SMALL_GEMM])
    assert source is not None
    bases, _ = packed_operands(PLAIN, 128, tokens)
    bases[0][0, 5] = value
    (found,) = run_interpreted(source, quant_node(PLAIN), bases, {"B": tokens})
    assert found[0].isnan().all() and not found[1:].isnan().any()


def test_a_row_of_zeros_gives_the_bias() -> None:
    form = replace(PLAIN, form=replace(PLAIN.form, bias=True), zero=DType.U8)
    source = packed_linear_source(packed_of(form), H100, SMALL_GEMV, [SMALL_GEMM])
    assert source is not None
    bases, _ = packed_operands(form, 128, 3)
    bases[0].zero_()
    (found,) = run_interpreted(source, quant_node(form), bases, {"B": 3})
    assert torch.equal(found, bases[-1].expand(3, -1))


def test_sums_of_codes_are_exact() -> None:
    # Rows whose codes are themselves, against the largest sums that there are.
    form = QuantForm(Form(128, 4, DType.F32), group=128, compute=DType.I8)
    source = packed_linear_source(packed_of(form), H100, SMALL_GEMV, [SMALL_GEMM])
    assert source is not None
    x = torch.full((2, 128), 127.0)
    x[1, ::2] = -127.0
    codes, scale = torch.full((4, 64), 0x0F, dtype=torch.uint8), torch.ones(4, 1)
    for tokens in (1, 2):
        operands = [x[:tokens], codes, scale]
        (found,) = run_interpreted(source, quant_node(form), operands, {"B": tokens})
        wanted = torch.tensor([64 * 127.0 * (7 - 8), 64 * 127.0 * (-7 - 8)])[:tokens]
        assert torch.equal(found, wanted[:, None].expand(-1, 4))


def emitted(form: QuantForm, arch: str = "h100", most: int | None = None):
    node = quant_node(form)
    return emit_packed_linear(node, layouts(node), TARGETS[arch], Cutting(most))


def test_what_is_taken_and_what_is_declined() -> None:
    node = quant_node(PLAIN)
    assert emit_packed_linear(node, layouts(node), H100) is not None
    assert emit_invariant_packed_linear(node, layouts(node), H100) is not None
    assert emitted(PLAIN, "a100") is not None
    assert emit_packed_linear(node, (None, *layouts(node)[1:]), H100) is None
    assert emitted(replace(PLAIN, compute=None)) is None
    assert emitted(replace(PLAIN, codes=DType.I8)) is None
    assert emitted(replace(PLAIN, group=16)) is None
    assert emitted(replace(PLAIN, group=48)) is None
    assert emitted(replace(PLAIN, group=0, form=Form(260, 24, DType.BF16))) is None  # half a word
    assert emitted(replace(PLAIN, group=0, form=Form(264, 24, DType.BF16))) is not None
    wide = replace(SMALL_GEMM, block_k=256)  # two groups a step
    assert packed_linear_source(packed_of(PLAIN), H100, SMALL_GEMV, [wide]) is None


def test_several_tokens_of_small_groups_are_not_rounded() -> None:
    source = emitted(replace(PLAIN, group=32), most=16)
    assert source is not None
    one, several = source.variants
    assert [len(variant.launches) for variant in (one, several)] == [2, 1]


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(
            replace(PLAIN, form=Form(4096, 14336, DType.BF16, "weight", halves=True)),
            id="gate_up",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            replace(PLAIN, form=Form(14336, 4096, DType.BF16, behind=("residual",)), zero=DType.U8),
            id="zero",
        ),
        pytest.param(
            replace(PLAIN, form=Form(4096, 4096, DType.BF16), group=0, scale=DType.F32),
            id="rows",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_defaults_compile_ahead_of_time_and_do_not_spill(form: QuantForm) -> None:
    source = emitted(form, most=32)
    assert source is not None
    found = compile_for(source, H100.arch)
    assert all(one.shared <= H100.shared_memory_per_block for one in found)
    more = since("3.9") and form.zero is not None
    most = 160 if more else 128  # of one token: enough programs at once
    assert all(one.registers <= most for one in found[:2])
    assert [one.spills for one in found] == [0] * len(found)


def test_decode_steps_of_a_quantized_model_round_rows() -> None:
    model, config = tiny_model("llama"), tw.QuantConfig("int4", group=32, compute="int8")
    options = {"target": "cpu", "max_model_len": 64, "verify": "off", "quantize": config}
    engine = tw.compile(model, backend="triton", **options)
    decode = engine.image.decode
    assert decode is not None
    products = [call for call in decode.program.calls if "dequantize" in call.origin]
    texts = [
        engine.image.files[f"kernels/{call.kernel.rsplit('/', 1)[1]}/kernel.py"]
        for call in products
    ]
    assert len(texts) == 8 and all(b"_one_token_of_words" in text for text in texts)
    params = tw.SamplingParams(max_new_tokens=2, ignore_eos=True)
    ours = engine.generate(PROMPTS[:1], params)
    eager = tw.compile(model, backend="eager", **options).generate(PROMPTS[:1], params)
    assert [c.token_ids for c in ours] == [c.token_ids for c in eager]
