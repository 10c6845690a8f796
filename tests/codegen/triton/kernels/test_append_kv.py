"""append_kv in Triton against the op's reference: every form, layout and element type, and not a
byte beside the rows of this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.append_kv import (
    Problem,
    Tiles,
    append_kv_source,
    default_tiles,
    emit_append_kv,
)
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.package import Resources
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import input_node, make, permute, reshape
from tilewright.ir.dims import Size, evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.schema import TOLERANCE, schema
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS
from triton_running import run_interpreted

H100 = TARGETS["h100"]
T, N, P = map(symbol, "TNP")
PAGES, PAGE = 4, 4
REFERENCE = schema("append_kv").reference


@dataclass(frozen=True)
class Form:
    """What is static in a call. ``rows`` says where q, k and v lie: in buffers of their own, as
    slices of one product, in parts of each head, or with the heads first.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    half: int = 8
    layout: str = "half"
    dtype: DType = DType.F32
    tables: DType = DType.F32
    weights: DType = DType.F32
    q_norm: bool = False
    k_norm: bool = False
    rows: str = "merged"
    slots: DType = DType.I64
    steps: bool = False

    @property
    def has_q(self) -> bool:
        return self.half > 0 or self.q_norm

    @property
    def stepwise(self) -> bool:
        """Whether the op can be: it does something, in one element type."""
        alike = self.tables is self.dtype or not self.half
        alike = alike and (self.weights is self.dtype or not (self.q_norm or self.k_norm))
        return self.steps and alike and (self.half > 0 or self.q_norm or self.k_norm)


def tensor(name: str, dtype: DType, *shape: Size) -> Node:
    return input_node(name, TensorType(dtype, shape))


def rows_of(form: Form) -> list[Node]:
    """q, k and v."""
    widths = {"q": form.head_dim, "k": form.head_dim, "v": form.value_dim}
    heads = {"q": form.heads, "k": form.kv_heads, "v": form.kv_heads}
    total = sum(heads[name] * width for name, width in widths.items())
    merged = tensor("qkv", form.dtype, T, total)
    found, start = [], 0
    for name, width in widths.items():
        count = heads[name]
        if form.rows == "own":
            x = tensor(name, form.dtype, T, count, width)
        elif form.rows == "heads first":
            x = permute(tensor(name, form.dtype, count, width, T), 2, 0, 1)
        elif form.rows == "by head":
            x = make(
                "slice",
                tensor(name, form.dtype, T, count, 2 * width),
                dim=2,
                start=width,
                stop=2 * width,
            )
        else:
            x = make("slice", merged, dim=1, start=start, stop=start + count * width)
            x = reshape(x, T, count, width)
        start += count * width
        found.append(x)
    return found


def call(form: Form) -> Node:
    """The call's node, over symbols T, N and P."""
    q, k, v = rows_of(form)
    caches = (
        tensor("k_cache", form.dtype, N, P, form.kv_heads, form.head_dim),
        tensor("v_cache", form.dtype, N, P, form.kv_heads, form.value_dim),
    )
    table = tensor("table", form.tables, T, 2 * form.half)  # cos and sin side by side
    cos, sin = (
        make("slice", table, dim=1, start=i * form.half, stop=(i + 1) * form.half) for i in range(2)
    )
    weights = [tensor(name, form.weights, form.head_dim) for name in ("q_weight", "k_weight")]
    return make(
        "append_kv",
        *(k, v, *caches, tensor("slots", form.slots, T)),
        q if form.has_q else None,
        *((cos, sin) if form.half else (None, None)),
        weights[0] if form.has_q and form.q_norm else None,
        weights[1] if form.k_norm else None,
        layout=form.layout if form.half else "half",
        eps=1e-5 if form.k_norm or (form.has_q and form.q_norm) else None,
        stepwise=True if form.stepwise else None,
    )


def problem_of(node: Node) -> Problem | None:
    return Problem.of(node, tuple(None if arg is None else located(arg)[1] for arg in node.args))


def source_of(node: Node, tiles: Tiles | None = None) -> KernelSource:
    problem = problem_of(node)
    assert problem is not None
    return append_kv_source(problem, tiles or default_tiles(problem))


def any_bits(type_: TensorType, sizes: dict[str, int]) -> torch.Tensor:
    """Random bytes, NaN among them."""
    shape = [evaluate(size, sizes) for size in type_.shape]
    noise = torch.randint(0, 256, (*shape[:-1], shape[-1] * type_.dtype.bytes))
    return noise.to(torch.uint8).view(type_.dtype.torch)


def buffers_of(node: Node, slots: list[int]) -> dict[Node, torch.Tensor]:
    """A tensor for each buffer that the operands lie in."""
    sizes = {"T": len(slots), "N": PAGES, "P": PAGE}
    found = {}
    for base in dict.fromkeys(located(arg)[0] for arg in node.operands):
        shape = [evaluate(size, sizes) for size in base.shape]
        if base.dtype.is_integer:
            found[base] = torch.tensor(slots).to(base.dtype.torch)
        elif N in base.shape:
            found[base] = any_bits(base.type, sizes)
        else:
            found[base] = torch.randn(shape, dtype=torch.float64).to(base.dtype.torch)
    return found


def check(form: Form, slots: list[int], tiles: Tiles | None = None) -> None:
    """The kernel leaves the rows of the reference in the slots that there are, q for all tokens,
    and each other byte of the caches as it was.
    """
    node, count = call(form), len(slots)
    buffers = buffers_of(node, slots)
    before = {base: tensor.clone() for base, tensor in buffers.items()}
    viewed = interpret(Graph("g", (*buffers,), node.operands), [*before.values()])
    values = dict(zip(node.operands, viewed, strict=True))
    operands = [None if arg is None else values[arg] for arg in node.args]
    # A cache of one page, large enough for all, shows the rows; the op refuses slots outside.
    page = [cache.new_zeros(1, count, *cache.shape[2:]) for cache in operands[2:4]]
    wanted = REFERENCE(*operands[:2], *page, torch.arange(count), *operands[5:], **dict(node.attrs))
    bases = [None if arg is None else buffers[located(arg)[0]] for arg in node.args]
    sizes = {"T": count, "N": PAGES, "P": PAGE}
    found = run_interpreted(source_of(node, tiles), node, bases, sizes)
    assert found[0] is bases[2] and found[1] is bases[3]
    there = [t for t, slot in enumerate(slots) if 0 <= slot < PAGES * PAGE]
    written = torch.zeros(PAGES * PAGE, dtype=torch.bool)
    written[[slots[t] for t in there]] = True
    for cache, old, rows in zip(found[:2], operands[2:4], wanted[:2], strict=True):
        got, was = cache.flatten(0, 1), old.flatten(0, 1)
        assert torch.equal(bits(got[~written]), bits(was[~written]))
        same(got[[slots[t] for t in there]], rows[0, there], form.k_norm and rows is wanted[0])
    if form.has_q:
        same(found[2], wanted[2], form.q_norm)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def same(found: torch.Tensor, wanted: torch.Tensor, normed: bool) -> None:
    """Equal bits; where sums come in another order than torch's, within the op's tolerance."""
    if not normed:
        assert torch.equal(bits(found), bits(wanted))
        return
    rtol, atol = TOLERANCE[DType.from_torch(wanted.dtype)]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


FLOATS = (DType.F32, DType.BF16, DType.F16)


@st.composite
def forms(draw: st.DrawFn) -> Form:
    dim = draw(st.sampled_from([1, 2, 6, 16, 20, 64, 80]))
    dtype = draw(st.sampled_from([*FLOATS, DType.F64]))
    return Form(
        heads=draw(st.integers(1, 9)),
        kv_heads=draw(st.integers(1, 5)),
        head_dim=dim,
        value_dim=draw(st.sampled_from([dim, 24])),
        half=draw(st.integers(0, dim // 2)),
        layout=draw(st.sampled_from(["half", "interleaved"])),
        dtype=dtype,
        tables=draw(st.sampled_from([dtype, *FLOATS])),
        weights=draw(st.sampled_from([dtype, *FLOATS])),
        q_norm=draw(st.booleans()),
        k_norm=draw(st.booleans()),
        rows=draw(st.sampled_from(["merged", "own", "heads first", "by head"])),
        slots=draw(st.sampled_from([DType.I64, DType.I32])),
        steps=draw(st.booleans()),
    )


@st.composite
def slot_lists(draw: st.DrawFn) -> list[int]:
    """Distinct slots of the cache, and some below and beyond it."""
    end = PAGES * PAGE
    there = draw(st.lists(st.integers(0, end - 1), max_size=4, unique=True))
    outside = draw(st.lists(st.sampled_from([-1, -end, end, end + 1, 2**31 - 1]), max_size=2))
    return draw(st.permutations(there + outside))


@given(forms(), slot_lists())
def test_every_form_is_the_reference(form: Form, slots: list[int]) -> None:
    check(form, slots)


@given(forms(), st.sampled_from([1, 2, 4, 16]))
@settings(max_examples=10)
def test_any_number_of_heads_a_program(form: Form, block_heads: int) -> None:
    check(form, [3, 0], Tiles(block_heads, 1))


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


def test_names_say_what_is_done() -> None:
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
}


def compiled(models: Sequence[str], arch: int) -> dict[str, Resources]:
    packages = compile_sources([source_of(call(LARGE[model])) for model in models], arch)
    return {m: package.resources[0] for m, package in zip(models, packages, strict=True)}


def test_no_spills_on_an_h100() -> None:
    for model, resources in compiled([*LARGE], 90).items():
        assert resources.spills == 0 and resources.registers <= 64, model
        # Nothing goes from thread to thread but the pairs of neighbours.
        assert resources.shared == 0 or LARGE[model].layout == "interleaved", model


@pytest.mark.parametrize(
    ("arch", "model"),
    [(80, "gptj 6b"), (86, "qwen3 8b"), (89, "gptj 6b"), (100, "qwen3 8b"), (120, "gptj 6b")],
)
def test_every_architecture_compiles_it(arch: int, model: str) -> None:
    (resources,) = compiled([model], arch).values()
    assert resources.spills == 0
