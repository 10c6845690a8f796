"""How far the outputs of an engine are from those of its graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..ir.graph import Graph
from .driver import PASS_TOLERANCE, engine_tolerance, largest_error

MOST_GAIN = 0.08
"""What two roundings of a cache may make of its size as a whole. Scales that are wrong by a step of
those that are tried change it by more; a row alone may come out with a few hundredths."""


def engine_error(
    culprit: str,
    graph: Graph,
    wanted: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
) -> float:
    """The largest error of any of the ``wanted`` outputs, by name, as ``largest_error`` has it.

    A cache of e4m3 counts by the numbers that it stands for, without what two roundings of one
    number can be apart: where a row moved by a last bit, another scale may be the best that is
    tried, by which its codes are other ones, and as near. Its numbers may have moved like those of
    the engine's element type.

    Raises:
        VerificationError: as ``largest_error``, within ``engine_tolerance`` of the graph.
    """
    expected, outputs = dict(wanted), {name: found[name] for name in wanted}
    floats = [x.dtype for x in wanted.values() if x.dtype in PASS_TOLERANCE]
    element = max(floats, key=PASS_TOLERANCE.__getitem__, default=torch.float32)
    for name, codes in wanted.items():
        scale = name.replace("_cache_", "_scale_")
        if codes.dtype == torch.float8_e4m3fn and scale in expected:
            theirs = _numbers(codes, expected.pop(scale))
            ours = _numbers(outputs[name], outputs.pop(scale))
            expected[name] = theirs.to(element)
            outputs[name] = _without_rounding(theirs, ours).to(element)
    pairs = list(expected.values()), list(outputs.values())
    return largest_error(culprit, *pairs, engine_tolerance(graph))


def _numbers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes.float() * scales.float()


def _without_rounding(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """``found``, nearer to ``wanted`` by what two roundings to four bits can be apart, if it is as
    large on the whole.
    """
    if wanted.shape != found.shape:
        return found
    ours, theirs = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (found, wanted))
    size = theirs.square().sum()
    if ((ours * theirs).sum() - size).abs() > MOST_GAIN * size:
        return found
    rounding = (wanted.abs() + found.abs()) / 15  # a half step is a sixteenth, or less
    apart = found - wanted
    near = wanted + apart.sign() * (apart.abs() - rounding).clamp_min(0.0)
    return torch.where(near.isnan(), found, near)
