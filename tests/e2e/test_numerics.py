"""Values where a compiler likes to differ from torch: edges of types, NaN, steps, empty rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Thread

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.errors import TilewrightError

INF, NAN = math.inf, math.nan
SPECIAL = torch.tensor([[0.0, -0.0, INF, 1.0], [-INF, NAN, INF, 3.0], [89.0, -89.0, 1e-30, 2.0]])
MASK = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])


class Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def _masked(q: Tensor, mask: Tensor) -> Tensor:
    lowest = torch.finfo(q.dtype).min
    return (q @ q.transpose(-1, -2) + torch.where(mask, 0.0, lowest)).softmax(-1) @ q


def _overlapping(x: Tensor) -> tuple[Tensor, ...]:
    return x[:, :2] * 2, x[:, 2:] * 3, x[:, ::2] - 1, x[:, 1::2] + 1


CASES: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
    "extremes keep NaN": (
        lambda x: (x.amax(-1), x.amin(-1), x.argmax(-1), x.argmin(-1), x.sign()),
        (SPECIAL,),
    ),
    "sinh and cosh to the end": (lambda x: (x.sinh(), x.cosh()), (SPECIAL,)),
    "constants that overflow together": (
        lambda x: ((x * 1e30) * 1e30, (x * 1e-30) * 1e-30, x / 1e-39),
        (SPECIAL,),
    ),
    "sums in their order": (
        lambda x: ((x + 8388608.0) - 8388608.0, (1 - x) + 1e-9, (x + 1e20) - 1e20),
        (torch.tensor([0.5, 1.5, 2.5, 1.0, -3.7]),),
    ),
    "floored quotients": (
        lambda x: (torch.floor(x / 41), (x / 41).long(), torch.ceil(-x / 47 + 1), x / 41 >= 3),
        (torch.arange(0.0, 41 * 300, 41),),
    ),
    "floored logarithms": (
        lambda x: (torch.floor(torch.log2(x)), torch.floor(torch.log10(x**2))),
        (2.0 ** torch.arange(-20, 40),),
    ),
    "round to decimals": (
        lambda x: (x.round(), x.round(decimals=1)),
        (torch.tensor([0.5, 1.5, -2.5, 0.26]),),
    ),
    "nearly one in bfloat16": (
        lambda x: x * 0.99609375,
        (torch.arange(128.0, 250.0).bfloat16(),),
    ),
    "halves that are large": (
        lambda x: (
            *(x.norm(dim=-1), x.norm(p=3, dim=-1), x.std(-1), x.var(-1, correction=0)),
            *(nn.functional.softplus(x), nn.functional.mish(x), x.sinh()),
        ),
        (torch.tensor([[1e3, 2e3, 300.0], [11.0, 12.0, 15.0], [-40.0, -9.0, 9.5]]).half(),),
    ),
    "products of integers": (lambda x: x.prod(), (torch.full((5,), 2**15, dtype=torch.int32),)),
    "reductions of nothing": (
        lambda x: (x.mean(0), x.sum(0), x.any(0), x.all(0), x.prod(0)),
        (torch.zeros(0, 4),),
    ),
    "a row of lowest scores": (_masked, (torch.linspace(0, 1, 24).reshape(1, 3, 8), MASK)),
    "slices that overlap": (_overlapping, (torch.randn(3, 4),)),
    "the integer without a negative": (lambda x: x - (-(2**63)), (torch.tensor([-1, -7]),)),
}


def _rtol(dtype: torch.dtype) -> float:
    return 4e-3 if dtype is torch.float16 else 1e-5


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.parametrize("case", CASES)
def test_edges(case: str, backend: str) -> None:
    function, inputs = CASES[case]
    engine = tw.compile(Function(function), inputs, backend=backend)
    found, wanted = engine(*inputs), function(*inputs)
    if isinstance(wanted, Tensor):
        found, wanted = (found,), (wanted,)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=_rtol(want.dtype), equal_nan=True)


LOOKUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "embedding": lambda x, i: torch.nn.functional.embedding(i, x),
    "index_select": lambda x, i: x.index_select(1, i),
    "gather": lambda x, i: x.gather(0, i[None].expand(2, 2)),
    "index": lambda x, i: x[i - 7],
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_onnxruntime_refuses_indices_that_torch_refuses(name: str) -> None:
    lookup, x, ids = LOOKUPS[name], torch.randn(7, 7), torch.tensor([1, 2])
    engine = tw.compile(Function(lookup), (x, ids), backend="onnxruntime")
    torch.testing.assert_close(engine(x, ids), lookup(x, ids))
    for wrong in (torch.tensor([-1, 2]), torch.tensor([14, 2])):
        with pytest.raises((IndexError, RuntimeError)):
            lookup(x, wrong)
        with pytest.raises(TilewrightError):
            engine(x, wrong)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_threads_may_share_an_engine(backend: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    engine = tw.compile(module, (torch.randn(4, 8),), backend=backend, dynamic_shapes=shapes)
    wrong: list[int] = []

    def work(size: int) -> None:
        for step in range(60):
            x = torch.full((size, 8), float(size + step))
            if not torch.allclose(engine(x), module(x), atol=1e-5):
                wrong.append(size)

    threads = [Thread(target=work, args=(size,)) for size in (3, 3, 5, 7)]
    with torch.no_grad():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_threads_may_generate_at_once(lm_engine: tw.Engine) -> None:
    params = tw.SamplingParams(max_new_tokens=12, ignore_eos=True)
    prompts = [[3 + i, 5, 7][: 1 + i % 3] for i in range(6)]
    wanted = [lm_engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    found: dict[int, object] = {}

    def work(index: int) -> None:
        found[index] = lm_engine.generate([prompts[index]], params)[0].token_ids

    threads = [Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(index) for index in range(6)] == wanted


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_calls_share_no_memory(backend: str) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()
    x = torch.randn(6, 8)
    engine = tw.compile(module, (x,), backend=backend)
    first, wanted = engine(x), module(x).detach()
    kept = first.clone()
    x.zero_()
    torch.testing.assert_close(engine(x), module(x).detach())
    assert torch.equal(first, kept)
    torch.testing.assert_close(first, wanted)
    first.fill_(NAN)
    for given in (x[:1].expand(6, 8), torch.randn(8, 6).T, torch.randn(6, 16)[:, ::2]):
        torch.testing.assert_close(engine(given), module(given).detach())
    trained = torch.randn(6, 8, requires_grad=True)
    torch.testing.assert_close(engine(trained), module(trained).detach())
