"""append_kv in Triton against the op's reference: every form, layout and element type, and not a
byte beside the rows of this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from append_forms import (
    PAGE,
    PAGES,
    REFERENCE,
    Form,
    N,
    P,
    T,
    assert_appended,
    bits,
    buffers_of,
    call,
    forms,
    problem_of,
    sizes_of,
    slot_lists,
    source_of,
    tensor,
)
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.append_kv import (
    SPACE,
    Tiles,
    default_tiles,
    emit_append_kv,
    fits,
)
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.package import Resources
from tilewright.ir.build import make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.targets import TARGETS
from triton_running import run_interpreted

H100 = TARGETS["h100"]


def check(form: Form, slots: list[int], tiles: Tiles | None = None) -> None:
    """The kernel leaves what the reference says, and nothing else."""
    node = call(form)
    buffers = buffers_of(node, slots)
    before = {base: tensor.clone() for base, tensor in buffers.items()}
    bases = [None if arg is None else buffers[located(arg)[0]] for arg in node.args]
    found = run_interpreted(source_of(node, tiles), node, bases, sizes_of(slots))
    caches = 2 if form.codes is None else 4
    assert all(found[index] is bases[2 + index] for index in range(caches))
    assert_appended(form, slots, before, found)


@given(forms(), slot_lists())
def test_every_form_is_the_reference(form: Form, slots: list[int]) -> None:
    check(form, slots)


CODES = ((DType.I8, None), (DType.F8E4M3, None), (DType.F8E4M3, 8))
BY_CODES = pytest.mark.parametrize(("codes", "tries"), CODES)


@settings(max_examples=16)
@given(forms(), st.sampled_from(CODES), slot_lists())
def test_every_form_as_codes_is_the_reference(
    form: Form, codes: tuple[DType, int | None], slots: list[int]
) -> None:
    """To the bit, also which scale is taken of those that are tried."""
    dtype = DType.F32 if form.dtype is DType.F64 else form.dtype
    narrow = {"tables": form.tables, "weights": form.weights}
    narrow = {name: dtype if d is DType.F64 else d for name, d in narrow.items()}
    check(replace(form, dtype=dtype, codes=codes[0], tries=codes[1], **narrow), slots)


@pytest.mark.parametrize("block_heads", [1, 8])
def test_a_scale_is_chosen_alike_however_the_heads_are_cut(block_heads: int) -> None:
    form = Form(kv_heads=8, head_dim=64, half=32, codes=DType.F8E4M3, tries=8, layout="interleaved")
    check(form, [3, 8], Tiles(block_heads, 4))


@given(forms(), st.sampled_from([1, 2, 4, 16]))
@settings(max_examples=10)
def test_any_number_of_heads_a_program(form: Form, block_heads: int) -> None:
    check(form, [3, 0], Tiles(block_heads, 1))


@pytest.mark.quick
@given(forms(), st.sampled_from([1, 40, 300]))
def test_defaults_lie_in_the_search_space_and_fit(form: Form, times: int) -> None:
    problem = problem_of(call(replace(form, heads=form.heads * times)))
    assert problem is not None
    tiles = default_tiles(problem)
    assert fits(problem, tiles)
    assert all(getattr(tiles, name) in allowed for name, allowed in SPACE.items())


def test_the_largest_tiles_that_fit_compile_and_larger_ones_do_not_fit() -> None:
    forms = [
        replace(LARGE["gptj 6b"], dtype=DType.F64, tables=DType.F64, heads=64, kv_heads=64),
        replace(LARGE["qwen3 8b"], heads=64),
    ]
    tiles = [Tiles(32, 8), Tiles(64, 8)]
    for form, most in zip(forms, tiles, strict=True):
        problem = problem_of(call(form))
        assert problem is not None and fits(problem, most)
        assert not fits(problem, Tiles(2 * most.block_heads, 8))
        assert not fits(problem, Tiles(most.block_heads, 4))
    sources = [source_of(call(form), most) for form, most in zip(forms, tiles, strict=True)]
    for package in compile_sources(sources, 89):
        assert package.resources[0].shared <= TARGETS["l4"].shared_memory_per_block


MODELS = {
    "llama": Form(dtype=DType.BF16, tables=DType.BF16, steps=True),
    "llama in half the heads": Form(
        half=4, dtype=DType.F16, tables=DType.F16, layout="interleaved", steps=True
    ),
    "qwen3": Form(
        *(4, 2, 16, 16, 8, "half", DType.BF16, DType.BF16, DType.BF16, True, True), steps=True
    ),
    "gemma3": Form(dtype=DType.BF16, q_norm=True, k_norm=True),
    "gpt_neox": Form(half=2, rows="by head"),
    "gptj": Form(half=4, layout="interleaved", dtype=DType.F16),
    "falcon": Form(kv_heads=1),
    "gpt2": Form(half=0),
    "k norm alone": Form(half=0, k_norm=True),
}


@pytest.mark.parametrize("model", MODELS)
def test_forms_of_models(model: str) -> None:
    check(MODELS[model], [5, -1, 14, 16, 0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_stays_in_its_head() -> None:
    node = call(replace(MODELS["qwen3"], rows="own"))
    buffers = buffers_of(node, [2])
    buffers[located(node.args[5])[0]][0, 1, 3] = torch.nan
    buffers[located(node.args[0])[0]][0, 0, 3] = torch.inf
    bases = [buffers[located(arg)[0]] for arg in node.operands]
    k_cache, _, q = run_interpreted(source_of(node), node, bases, {"T": 1, "N": PAGES, "P": PAGE})
    assert q[0].isnan().any(1).tolist() == [False, True, False, False]
    assert k_cache.flatten(0, 1)[2].isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("steps", [True, False])
def test_the_norm_rounds_before_the_rotation(steps: bool) -> None:
    """As when they are two kernels: a sum in another order moves a last bit here and there only."""
    node = call(replace(MODELS["qwen3"], rows="own", steps=steps))
    assert node.attr("stepwise") is (True if steps else None)
    buffers = buffers_of(node, [5, 1, 3])
    operands = [buffers[located(arg)[0]] for arg in node.operands]
    tables = [operands[6][:, :8], operands[6][:, 8:]]
    values = [*operands[:6], *tables, *operands[8:]]
    wanted = REFERENCE(*(value.clone() for value in values), **dict(node.attrs))
    found = run_interpreted(source_of(node), node, operands, {"T": 3, "N": PAGES, "P": PAGE})
    assert (bits(found[2]) != bits(wanted[2])).double().mean() < 0.01


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@BY_CODES
@pytest.mark.parametrize("row", ["zeros", "nan", "inf", "ties", "tiny", "least", "alone"])
def test_rows_that_are_no_usual_numbers(codes: DType, tries: int | None, row: str) -> None:
    """Bits are the reference's: a scale of 1 for zeros, halves to even, a NaN's row all NaN."""
    form = Form(half=0, rows="own", codes=codes, tries=tries)
    node = call(form)
    buffers = buffers_of(node, [2])
    v = buffers[located(node.args[1])[0]][0, 0]
    special = {"nan": torch.nan, "inf": torch.inf, "zeros": 0.0}
    if row == "ties":
        v[:] = torch.arange(16) / 2
        v[15] = 127.0 if codes is DType.I8 else 448.0
    elif row == "tiny":
        v[:] = torch.randn(16) * 1e-30
    elif row == "least":
        v[:] = torch.arange(16) * 1e-43
    elif row == "alone":
        v[:], v[5] = 0.0, -3.25
    else:
        v[:] = torch.randn(16) if row != "zeros" else 0.0
        v[3] = special[row]
    before = {base: tensor.clone() for base, tensor in buffers.items()}
    bases = [None if arg is None else buffers[located(arg)[0]] for arg in node.args]
    found = run_interpreted(source_of(node), node, bases, sizes_of([2]))
    assert_appended(form, [2], before, found)


def test_names_say_what_is_done() -> None:
    assert source_of(call(Form(codes=DType.I8))).name == "rope_append_kv_codes"
    names = [source_of(call(MODELS[model])).name for model in ("gpt2", "llama", "qwen3")]
    assert names == ["append_kv", "rope_append_kv", "qknorm_rope_append_kv"]
    assert source_of(call(MODELS["k norm alone"])).name == "qknorm_append_kv"


def test_sizes_that_are_known_are_no_arguments() -> None:
    (variant,) = source_of(call(MODELS["llama"])).variants
    (launch,) = variant.launches
    scalars = [argument.name for argument in launch.arguments if argument.name not in OPERANDS]
    assert scalars == ["q_out", "num_slots"]


OPERANDS = {"k", "v", "k_cache", "v_cache", "slot_mapping", "q", "cos", "sin"}


@pytest.mark.parametrize(
    "form", [Form(dtype=DType.F8E4M3, half=0), Form(kv_heads=0, half=0), Form(value_dim=0)]
)
def test_what_it_declines(form: Form) -> None:
    node = call(form)
    layouts = tuple(None if arg is None else located(arg)[1] for arg in node.args)
    assert emit_append_kv(node, layouts, H100) is None


def test_codes_need_a_target_and_numbers_that_have_them() -> None:
    for form, target, taken in (
        (Form(codes=DType.F8E4M3), "a100", False),
        (Form(codes=DType.F8E4M3), "l4", True),
        (Form(codes=DType.I8), "a100", True),
        (Form(codes=DType.I8, dtype=DType.F64, tables=DType.F64), "h100", False),
    ):
        node = call(form)
        layouts = tuple(None if arg is None else located(arg)[1] for arg in node.args)
        assert (emit_append_kv(node, layouts, TARGETS[target]) is not None) is taken


def test_a_cache_that_is_a_view_is_declined() -> None:
    node = call(Form())
    layouts = [None if arg is None else located(arg)[1] for arg in node.args]
    layouts[2] = replace(layouts[2], offset=64)
    assert emit_append_kv(node, tuple(layouts), H100) is None


def test_symbolic_heads_are_declined() -> None:
    G = symbol("G")
    k, cache = tensor("k", DType.F32, T, G, 8), tensor("c", DType.F32, N, P, G, 8)
    node = make(
        "append_kv", k, k, cache, tensor("d", DType.F32, N, P, G, 8), tensor("s", DType.I64, T)
    )
    assert problem_of(node) is None


LARGE = {
    "llama 8b": Form(32, 8, 128, 128, 64, "half", DType.BF16, DType.BF16, steps=True),
    "qwen3 8b": Form(
        *(32, 8, 128, 128, 64, "half", DType.BF16, DType.BF16, DType.BF16, True, True), steps=True
    ),
    "gemma3 4b": Form(8, 4, 256, 256, 128, dtype=DType.BF16, q_norm=True, k_norm=True),
    "gptj 6b": Form(16, 16, 256, 256, 32, "interleaved", DType.F16),
    "phi 2": Form(32, 32, 80, 80, 16, dtype=DType.F32, rows="by head"),
    "gpt2": Form(12, 12, 64, 64, 0, dtype=DType.F16),
    "qwen3 8b in fp8": Form(
        *(32, 8, 128, 128, 64, "half", DType.BF16, DType.BF16, DType.BF16, True, True),
        codes=DType.F8E4M3,
        tries=8,
        steps=True,
    ),
}


def compiled(models: Sequence[str], arch: int) -> dict[str, Resources]:
    packages = compile_sources([source_of(call(LARGE[model])) for model in models], arch)
    return {m: package.resources[0] for m, package in zip(models, packages, strict=True)}


DAILY = {"qwen3 8b", "qwen3 8b in fp8"}  # norms, and codes; the others do a part of it


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=() if m in DAILY else pytest.mark.nightly) for m in LARGE]
)
def test_no_spills_on_an_h100(model: str) -> None:
    (resources,) = compiled([model], 90).values()
    assert resources.spills == 0 and resources.registers <= 64
    # Nothing goes from thread to thread but the pairs of neighbours, and scales.
    alone = LARGE[model].layout == "half" and LARGE[model].codes is None
    assert resources.shared == 0 or not alone


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("arch", "model"),
    [(80, "gptj 6b"), (86, "qwen3 8b"), (89, "gptj 6b"), (100, "qwen3 8b"), (120, "gptj 6b")],
)
def test_every_architecture_compiles_it(arch: int, model: str) -> None:
    (resources,) = compiled([model], arch).values()
    assert resources.spills == 0
