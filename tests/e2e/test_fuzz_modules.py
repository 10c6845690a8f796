"""Random modules against themselves: whatever torch computes, an engine computes too, or says no.

Nothing is verified at compile time here, so that no check can stand in for a right answer. A
result may differ from torch's by rounding: by how much is read from the same module in float64.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import tilewright as tw
from tilewright.errors import CaptureError

BATCH, LENGTH, WIDTH = 3, 5, 8
Step = Callable[[random.Random, list[Tensor]], Tensor]


def _pick(rng: random.Random, values: list[Tensor]) -> Tensor:
    return values[-1] if rng.random() < 0.6 else rng.choice(values)


def _number(rng: random.Random) -> float:
    return rng.choice([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 3.0, -7.0, 41.0, 1e-6, 0.7071067811865476])


UNARY = (
    *(torch.exp, torch.tanh, torch.sigmoid, torch.erf, torch.relu, F.silu, F.gelu, F.softplus),
    *(torch.floor, torch.round, torch.trunc, torch.sign, torch.abs, torch.neg, torch.sin, F.elu),
    *(torch.sinh, torch.square, F.hardswish, F.leaky_relu, torch.expm1, F.mish, F.logsigmoid),
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: 0.5 * x * (1 + torch.erf(x * 0.7071)),
    lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.0447 * x**3))),
    lambda x: x * torch.sigmoid(1.702 * x),
    lambda x: x / (1 + torch.exp(-x)),
    lambda x: 3 * torch.tanh(x / 3),
    lambda x: x.clamp(-1, 2),
    lambda x: x.bfloat16().to(x.dtype),
    lambda x: x.long().to(x.dtype),
    lambda x: (x > 0).to(x.dtype) * x,
    lambda x: torch.where(x > 0.5, -math.inf, x).softmax(-1).nan_to_num(0.25),
)
ROWS = (
    lambda x: x.softmax(-1),
    lambda x: x.softmax(1),
    lambda x: x.log_softmax(-1),
    lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-3),
    lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-3),
    lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1),
    lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 0.1),
    lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.1),
    lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 0.1).sqrt(),
    lambda x: (x - x.mean(1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 0.1).sqrt(),
    lambda x: x.cumsum(1),
    lambda x: x - x.amax(-1, keepdim=True),
    lambda x: x.topk(3, -1).values.sum(-1, keepdim=True) + x,
    lambda x: x.gather(-1, x.argmax(-1, keepdim=True)) * x,
    lambda x: x[..., x.shape[-1] // 2 :].repeat(1, 1, 2),
    lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1),
    lambda x: torch.cat([x[..., 4:], -x[..., :4]], -1),
    lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2),
    lambda x: x.flip(1),
    lambda x: x.roll(1, 1),
    lambda x: x[:, -1:] + x,
    lambda x: F.pad(x[:, :-1], (0, 0, 1, 0)),
    lambda x: x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1).transpose(1, 2),
    lambda x: torch.einsum("bij,bkj->bik", x, x) @ x,
    lambda x: x.sum(-1, keepdim=True).expand_as(x),
    lambda x: x.index_select(1, torch.tensor([4, 0, 0, 2, 1])),
)
BINARY = (
    *(torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum),
    lambda a, b: a / (b.abs() + 1),
    lambda a, b: torch.where(a > b, a, b * 2),
    lambda a, b: torch.where(a.isnan(), b, a),
    lambda a, b: a + b[:, :1],
    lambda a, b: a * b.mean((0, 1)) if b.shape[0] == a.shape[0] else a,
    lambda a, b: torch.remainder(a, b.abs() + 1),
)


def _attention(rng: random.Random, values: list[Tensor]) -> Tensor:
    """Attention by hand, or nearly so: masks off by one, windows, slopes, caps, heads repeated."""
    x = _pick(rng, values)
    heads = rng.choice([1, 2, 4])
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (x, x * 0.5, x + 1))
    if heads > 1 and rng.random() < 0.5:
        half, copies = heads // 2, rng.random() < 0.5
        k, v = (
            t[:, :half].repeat_interleave(2, 1) if copies else t[:, :half].repeat(1, 2, 1, 1)
            for t in (k, v)
        )
    scores = q @ k.transpose(-1, -2) * rng.choice([1.0, 0.25, -0.5, 1 / 3])
    if rng.random() < 0.3:
        scores = torch.tanh(scores / 2) * rng.choice([2.0, 3.0])
    i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    if rng.random() < 0.3:
        slopes = torch.tensor([0.5, -0.25, 0.0, 0.125])[:heads, None, None]
        distance = rng.choice([j, j - i, (j - i).abs(), i * j])
        scores = scores + slopes.to(x.dtype) * distance
    shown = rng.choice([j <= i, j <= i + 1, j < i + 2, j >= i, (j <= i) & (i - j < 2), i - j < 1])
    hidden = rng.choice([-math.inf, -1e9, -1e4, -5.0])
    if rng.random() < 0.7:
        scores = scores.masked_fill(~shown, hidden)
    out = scores.softmax(rng.choice([-1, -1, -1, -2])) @ v
    return out.transpose(1, 2).flatten(-2)


def _step(rng: random.Random, values: list[Tensor]) -> Tensor:
    x = _pick(rng, values)
    kind = rng.randrange(7)
    if kind == 0:
        return _attention(rng, values)
    if kind <= 2:
        return rng.choice(UNARY)(x)
    if kind <= 4:
        return rng.choice(ROWS)(x)
    if kind == 5:
        return rng.choice(BINARY)(x, _pick(rng, values))
    number, op = _number(rng), rng.choice(["+", "-", "*", "/", "r", "**", "%"])
    match op:
        case "+":
            return x + number
        case "-":
            return x - number
        case "*":
            return x * number
        case "/":
            return x / (number or 1)
        case "r":
            return number - x
        case "%":
            return x % (number or 3)
    return x ** rng.choice([0, 1, 2, 3])


class Random(nn.Module):
    """A module of ``depth`` steps that ``seed`` draws, the same at each call."""

    def __init__(self, seed: int, depth: int) -> None:
        super().__init__()
        self.seed, self.depth = seed, depth
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rng = random.Random(self.seed)
        values = [x, self.first(x) if rng.random() < 0.7 else x * 2]
        for _ in range(self.depth):
            y = _step(rng, values)
            values.append(y if y.shape == x.shape else y + x)
        out = values[-1]
        return self.last(out), out, out.argmax(-1), out > 0.1, out.sum(-1)


def check(seed: int, depth: int, backend: str, dynamic: bool) -> None:
    module = Random(seed, depth).eval()
    example = torch.randn(BATCH, LENGTH, WIDTH)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    # Without a GPU Triton's kernels run in its interpreter.
    target = "auto" if torch.cuda.is_available() else "cpu"
    try:
        engine = tw.compile(
            module,
            (example,),
            backend=backend,
            target=target,
            verify="off",
            dynamic_shapes=shapes,
        )
    except CaptureError:
        assert dynamic  # the module itself fixed its batch
        return
    wide = Random(seed, depth).double().eval()
    for size in (BATCH, 1, 7) if dynamic else (BATCH,):
        x = torch.randn(size, LENGTH, WIDTH)
        kept = x.clone()
        with torch.no_grad():
            wanted, exact = module(x), wide(x.double())
        found = engine(x)
        assert torch.equal(x, kept)
        for got, want, ideal in zip(found, wanted, exact, strict=True):
            _agree(got, want, ideal)


def _agree(got: Tensor, want: Tensor, ideal: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want) or not torch.equal(want, ideal)
        return
    apart = (want.double() - ideal).abs()
    # Where torch's own rounding crosses a step, float64 says nothing about what is right.
    if not bool((apart <= 1e-2 * (1 + ideal.abs())).all()):
        return
    scale = ideal.abs().nan_to_num(0, 0, 0).amax()
    close = (got.double() - want.double()).abs() <= 2e-5 * (1 + scale) + 20 * apart.amax()
    assert bool((close | (got == want) | (got.isnan() & want.isnan())).all()), (got, want)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "triton"])
@given(seed=st.integers(0, 10**9), depth=st.integers(1, 6), dynamic=st.booleans())
@settings(max_examples=settings.default.max_examples // 2)  # each compiles
def test_random_modules(backend: str, seed: int, depth: int, dynamic: bool) -> None:
    check(seed, depth, backend, dynamic)
