"""One token of each row of logits: the likeliest, or one drawn from what temperature, top-k, top-p
and min-p leave.

Every cut is a threshold on the logit, so tokens of equal probability stay or go together, and the
draw inverts the distribution function in the order of token ids: no sort's order matters.
"""

from __future__ import annotations

import torch

from ..dims import is_nonnegative
from ..dtypes import DType
from ..schema import TOLERANCE, OpSchema, Sample, ill_typed, register
from ..types import TensorType

_PARAMETERS = {
    "temperature": DType.F32,
    "top_k": DType.I32,
    "top_p": DType.F32,
    "min_p": DType.F32,
    "uniform": DType.F32,
}
COLDEST = 1e-30
"""The least temperature that a logit is divided by: float32 has no inverse of much smaller ones,
and any difference of logits is decisive by then.
"""
LAST_UNIFORM = 1 - 2**-24
"""The largest float32 below 1."""


def _sample_type(
    logits: TensorType,
    temperature: TensorType,
    top_k: TensorType,
    top_p: TensorType,
    min_p: TensorType,
    uniform: TensorType,
) -> TensorType:
    floats = logits.dtype.is_float and not logits.dtype.is_float8
    if logits.rank != 2 or not floats or is_nonnegative(-logits.shape[1]):
        raise ill_typed("sample", "logits [R, V] of floats, V at least 1", logits)
    given = (temperature, top_k, top_p, min_p, uniform)
    for (name, dtype), found in zip(_PARAMETERS.items(), given, strict=True):
        widened = dtype is DType.F32 and found.dtype is logits.dtype is DType.F64
        if found != TensorType(DType.F64 if widened else dtype, logits.shape[:1]):
            raise ill_typed("sample", f"{name} {dtype}[{logits.shape[0]}]", found)
    return TensorType(DType.I64, logits.shape[:1])


def _sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """In float64, and without a wait for the device, so that CUDA graphs can hold it."""
    x = logits.double()
    best = x.amax(-1, keepdim=True)
    scaled = (x - best) / temperature.double().clamp(min=COLDEST)[:, None]
    threshold = _threshold(scaled, top_k[:, None], top_p.double()[:, None], min_p.double()[:, None])
    mass = scaled.masked_fill(scaled < threshold, -torch.inf).softmax(-1).cumsum(-1)
    goal = uniform.double().nan_to_num(0.0).clamp(0.0, LAST_UNIFORM)[:, None] * mass[:, -1:]
    # Behind all that is not above the goal stands a token that adds something: one that was kept.
    drawn = torch.searchsorted(mass, goal, right=True).squeeze(-1)
    token = torch.where(temperature > 0, drawn, x.argmax(-1))
    return torch.where(best.squeeze(-1).isfinite(), token, -1)


def _threshold(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """What a scaled logit has to reach. Of those that top-k leaves, top-p takes the fewest that
    hold its share of their probability; min-p compares with the largest.
    """
    vocab = scaled.shape[-1]
    ordered = scaled.sort(-1, descending=True).values
    kept = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long()
    kth = ordered.gather(-1, kept - 1)
    mass = ordered.masked_fill(ordered < kth, -torch.inf).softmax(-1).cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=vocab - 1)
    nucleus = torch.where(top_p < 1, ordered.gather(-1, last), -torch.inf)
    relative = torch.where(min_p > 0, min_p.clamp(max=1.0).log(), -torch.inf)
    return torch.maximum(torch.maximum(kth, nucleus), relative)


def _samples(g: torch.Generator) -> list[Sample]:
    logits = torch.randn((6, 11), generator=g, dtype=torch.float64)
    logits[1, 3] = logits[1, 7] = 4.0  # equal logits: the first is taken
    logits[2, ::2] = -torch.inf
    logits[5, 4] = torch.nan
    return [
        Sample(
            (
                logits,
                torch.tensor([1.0, 0.0, 0.75, 2.0, 1.0, 0.0]),
                torch.tensor([0, 0, 3, 0, 5, 0], dtype=torch.int32),
                torch.tensor([1.0, 1.0, 1.0, 0.75, 0.5, 1.0]),
                torch.tensor([0.0, 0.0, 0.0, 0.0, 0.125, 0.0]),
                torch.tensor([0.5, 0.25, 0.75, 0.0, 0.875, 0.5]),
            )
        )
    ]


SAMPLE = register(
    OpSchema(
        "sample",
        ("logits", *_PARAMETERS),
        _sample_type,
        _sample,
        (),
        lambda node: node.operands[0].type.numel * 12,  # as softmax: sorts are no part of it
        _samples,
        tolerance=dict.fromkeys(TOLERANCE, (0.0, 0.0)),
    )
)
"""``tokens: i64[R]`` of logits [R, V]. A row of temperature 0 (or less) gives the first of its
largest logits; another is cut to top_k (0: none), top_p (1: none) and min_p (0: none), in this
order, and inverts its distribution function at ``uniform`` in [0, 1). A row whose largest logit is
not finite (any is NaN or infinite, or all are -inf) gives -1.
"""
