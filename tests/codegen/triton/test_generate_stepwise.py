"""Generated kernels round stepwise norms and gates where the model does."""

from __future__ import annotations

import pytest
import torch

from rewriting import parse
from tilewright.ir.interpreter import interpret
from triton_bodies import call_of, emitted, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter

NORM = """
def body(x: bf16[T, {width}], w: bf16[{width}]):
    y: bf16[T, {width}] = rms_norm(x, w, eps=1e-05, stepwise=True)
    return {{"y": y}}
"""
GATED = """
def body(gate: bf16[T, 96], up: bf16[T, 96]):
    y: bf16[T, 96] = gated(gate, up, activation="{name}", stepwise=True)
    return {{"y": y}}
"""
TOKENS = 24


def results(text: str) -> tuple[torch.Tensor, ...]:
    """What the kernel of a body gives, what the IR's interpreter does, and that rounding once."""
    body, once = parse(text), parse(text.replace(", stepwise=True", ""))
    operands = [
        torch.randn([TOKENS, node.shape[-1]][-node.type.rank :]).to(node.dtype.torch)
        for node in body.inputs
    ]
    source = emitted(body)
    assert source is not None
    found = run(source, call_of(body), operands, {"T": TOKENS})
    return found[0], interpret(body, operands)[0], interpret(once, operands)[0]


def differing(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of elements that differ."""
    return (found != wanted).double().mean().item()


def steps_apart(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many 16-bit numbers lie from one to the other."""
    ours, theirs = (x.contiguous().view(torch.int16).int() for x in (found, wanted))
    assert (((ours ^ theirs) >= 0) | (found == wanted)).all()  # of one sign
    return (ours - theirs).abs()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("width", [64, 100, 5000])
def test_rms_norm(dtype: str, width: int) -> None:
    """Equal bits, but where a sum in another order rounds the normalised value otherwise."""
    found, wanted, once = results(NORM.format(width=width).replace("bf16", dtype))
    assert differing(found, wanted) < 0.01 and differing(once, wanted) > 0.1
    assert steps_apart(found, wanted).max() <= 2  # a step before the weight may be two after it


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_gated(dtype: str, name: str) -> None:
    found, wanted, once = results(GATED.format(name=name).replace("bf16", dtype))
    assert differing(found, wanted) < 0.01 and (differing(once, wanted) > 0.1) is (name != "relu")
    assert steps_apart(found, wanted).max() <= 2


def test_the_steps_stand_in_the_text() -> None:
    rounded = ".to(tl.bfloat16).to(tl.float32)"
    for text in (NORM.format(width=64), GATED.format(name="silu")):
        steps, once = emitted(parse(text)), emitted(parse(text.replace(", stepwise=True", "")))
        assert steps is not None and once is not None
        assert steps.text.count(rounded) == once.text.count(rounded) + 1
