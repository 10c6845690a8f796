"""Launches that overlap (programmatic dependent launch) in one CUDA graph: chains in which each
kernel reads what the one before wrote give the bits of the same chain run one launch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch

import append_forms
import linear_forms
import paged_forms
from gpu_kernels import CUDA, SteppedKernel, here, loaded
from linear_forms import Form
from tilewright.codegen.triton.kernels.linear import emit_linear
from tilewright.codegen.triton.kernels.paged_decode import emit_paged_decode
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.source import (
    HEADER,
    KernelSource,
    Launch,
    Pointer,
    Scalar,
    Variant,
    has_pdl,
)
from tilewright.ir.build import make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node

pytestmark = pytest.mark.gpu
Calls = dict[str, LaunchedKernel]
Run = Callable[[Calls, torch.Tensor], torch.Tensor]
BF16 = DType.BF16
RUNS = 5  # other inputs each time: what is read too early is another run's, and changes the bits


def linear_call(form: Form) -> tuple[KernelSource, Node]:
    node = linear_forms.node_of(form)
    source = emit_linear(node, tuple(located(o)[1] for o in node.operands), here())
    assert source is not None
    return source, node


def both_kinds(calls: Mapping[str, tuple[KernelSource, Node]]) -> tuple[Calls, Calls]:
    """Kernels that overlap, and kernels that do not."""
    launches = [u for source, _ in calls.values() for v in source.variants for u in v.launches]
    assert has_pdl(here()) and all(launch.pdl for launch in launches)
    pairs = loaded(list(calls.values()), LaunchedKernel, SteppedKernel)
    overlapping, stepped = ({n: p[i] for n, p in zip(calls, pairs, strict=True)} for i in (0, 1))
    return overlapping, stepped


def assert_same_bits(
    run: Run,
    calls: tuple[Calls, Calls],
    x: torch.Tensor,
    state: Sequence[torch.Tensor] = (),
) -> None:
    """The chain in a graph gives the bits of the chain in steps, whatever ran before it.

    Args:
        run: the chain, from x.
        calls: of `both_kinds`.
        x: the input's memory; values are drawn here.
        state: what the chain also writes; it starts as it is now.
    """
    overlapping, stepped = calls
    initial = [tensor.clone() for tensor in state]
    x.normal_()
    run(overlapping, x)  # everything is loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(overlapping, x)
    for _ in range(RUNS):
        x.normal_()
        found = []
        for replay in (False, True):
            for tensor, value in zip(state, initial, strict=True):
                tensor.copy_(value)
            if replay:
                graph.replay()
            output = result if replay else run(stepped, x)
            torch.cuda.synchronize()
            found.append([tensor.clone() for tensor in (output, *state)])
        assert found[0][0].isfinite().all()
        for one, other in zip(*found, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def weights_of(form: Form, seed: int) -> list[torch.Tensor]:
    """What the body reads beside x, and beside the residual behind it."""
    bases, _ = linear_forms.operands_of(form, 1, seed, "cuda")
    return bases[1 : len(bases) - len(form.behind)]


@pytest.mark.parametrize("tokens", [1, 2, 16, 40, 64, 130])
def test_products_of_their_own_results(tokens: int) -> None:
    """20 links: o with its residual, and gate and up behind a norm."""
    down = Form(1536, 1536, BF16, behind=("residual",))
    up = Form(1536, 1536, BF16, norm="weight", halves=True)
    calls = both_kinds({"up": linear_call(up), "down": linear_call(down)})
    weights = [(weights_of(up, i), weights_of(down, 100 + i)) for i in range(10)]

    def run(kernels: Calls, x: torch.Tensor) -> torch.Tensor:
        sizes = {"B": tokens}
        for first, second in weights:
            inner = kernels["up"]([x, *first], sizes)[0]
            x = kernels["down"]([inner, *second, x], sizes)[0]
        return x

    x = torch.empty(tokens, 1536, dtype=torch.bfloat16, device=CUDA)
    assert_same_bits(run, calls, x)


@pytest.mark.parametrize("tokens", [1, 8])
def test_one_kernel_behind_itself(tokens: int) -> None:
    form = Form(2048, 2048, BF16, behind=("residual",))
    calls = both_kinds({"o": linear_call(form)})
    weights = [weights_of(form, i) for i in range(20)]

    def run(kernels: Calls, x: torch.Tensor) -> torch.Tensor:
        for own in weights:
            x = kernels["o"]([x, *own, x], {"B": tokens})[0]
        return x

    x = torch.empty(tokens, 2048, dtype=torch.bfloat16, device=CUDA)
    assert_same_bits(run, calls, x)


HEADS, KV_HEADS, DIM, PAGE, LAYERS = 8, 2, 64, 16, 4
WIDTH = HEADS * DIM
FORMS = {
    "qkv": Form(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, BF16, norm="weight"),
    "o": Form(WIDTH, WIDTH, BF16, behind=("residual",)),
    "gate_up": Form(WIDTH, 1024, BF16, norm="weight", halves=True),
    "down": Form(1024, WIDTH, BF16, behind=("residual",)),
}
APPEND = append_forms.Form(
    *(HEADS, KV_HEADS, DIM, DIM, DIM // 2), dtype=BF16, tables=BF16, weights=BF16, steps=True
)
SHAPE = paged_forms.Shape(HEADS // KV_HEADS, KV_HEADS, DIM, DIM, PAGE, paged=True, dtype=BF16)


@dataclass
class Layers:
    """A few decoder layers over sequences of these lengths, each layer with a cache of its own.
    The place of each sequence's last token is NaN, until the step writes K and V there.
    """

    lengths: Sequence[int]

    def __post_init__(self) -> None:
        torch.manual_seed(len(self.lengths))
        operands, self.sizes = paged_forms.decode_operands(SHAPE, self.lengths)
        _, k, v, tables, lens, *_ = operands
        assert k is not None and v is not None and tables is not None and lens is not None
        last = [
            int(tables[b, (length - 1) // PAGE]) * PAGE + (length - 1) % PAGE
            for b, length in enumerate(self.lengths)
        ]
        for cache in (k, v):
            cache.flatten(0, 1)[last] = torch.nan
        self.slots = torch.tensor(last, device=CUDA)
        self.tables, self.lens = tables.to(CUDA), lens.to(CUDA)
        self.caches = [(k.to(CUDA, copy=True), v.to(CUDA, copy=True)) for _ in range(LAYERS)]
        angles = torch.rand(len(self.lengths), DIM // 2, device=CUDA) * 6
        self.rope = torch.cat([angles.cos(), angles.sin()], 1).bfloat16()
        self.weights = [
            {name: weights_of(form, 10 * i + j) for j, (name, form) in enumerate(FORMS.items())}
            for i in range(LAYERS)
        ]

    def run(self, kernels: Calls, x: torch.Tensor) -> torch.Tensor:
        """A step's layers: 6 calls each."""
        count = len(self.lengths)
        one, sizes = {"B": count}, {**self.sizes, "T": count}
        for weights, (k, v) in zip(self.weights, self.caches, strict=True):
            qkv = kernels["qkv"]([x, *weights["qkv"]], one)[0]
            given = [qkv, qkv, k, v, self.slots, qkv, self.rope, self.rope, None, None]
            q = kernels["append"](given, sizes)[2]
            rest = [k, v, self.tables, self.lens, None, None, None]
            attended = kernels["attend"]([q, *rest], sizes)[0]
            x = kernels["o"]([attended.view(count, WIDTH), *weights["o"], x], one)[0]
            inner = kernels["gate_up"]([x, *weights["gate_up"]], one)[0]
            x = kernels["down"]([inner, *weights["down"], x], one)[0]
        return x


@pytest.mark.parametrize("lengths", [[2000], [40, 1, 16, 17, 700], [33] * 40])
def test_layers_with_their_caches(lengths: list[int]) -> None:
    layers = Layers(lengths)
    append = append_forms.call(APPEND)
    attend = paged_forms.decode_call(SHAPE)
    attention = emit_paged_decode(attend, paged_forms.layouts_of(attend), here())
    assert attention is not None
    calls = {name: linear_call(form) for name, form in FORMS.items()}
    calls["append"] = (append_forms.source_of(append, pdl=has_pdl(here())), append)
    calls["attend"] = (attention, attend)
    x = torch.empty(len(lengths), WIDTH, dtype=torch.bfloat16, device=CUDA)
    state = [cache for pair in layers.caches for cache in pair]
    assert_same_bits(layers.run, both_kinds(calls), x, state)


COUNTS = """

@triton.jit
def counts(x_ptr, out_ptr, steps, WAITS: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if WAITS:
            tl.extra.cuda.gdc_wait()
    value = tl.load(x_ptr)
    for _ in range(steps):
        value += 1.0
    tl.store(out_ptr, value)
"""


def counting(waits: bool) -> tuple[KernelSource, Node]:
    """A kernel that takes its time between reading and writing."""
    one = linear_forms.tensor("x", DType.F32, 1)
    arguments = (
        Pointer("x_ptr", DType.F32, "operand", 0),
        Pointer("out_ptr", DType.F32, "result", 0),
        Scalar("steps", symbol("S")),
    )
    launch = Launch("counts", arguments, (1, 1, 1), {"WAITS": waits, "PDL": True}, 1)
    source = KernelSource("counts", "template", HEADER + COUNTS, (Variant((launch,)),))
    return source, make("neg", one)


@pytest.mark.parametrize("waits", [True, False])
def test_what_does_not_wait_is_seen(waits: bool) -> None:
    """The control: launches do overlap, and a kernel that does not wait reads too early."""
    kernels = both_kinds({"counts": counting(waits)})

    def run(kernels: Calls, x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = kernels["counts"]([x], {"S": 8000})[0]
        return x

    x = torch.empty(1, device=CUDA)
    if waits:
        assert_same_bits(run, kernels, x)
        return
    with pytest.raises(AssertionError):
        assert_same_bits(run, kernels, x)
