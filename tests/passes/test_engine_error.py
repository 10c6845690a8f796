"""Errors of an engine whose cache holds codes: by what the codes stand for."""

from __future__ import annotations

import pytest
import torch

from ragged_oracle import DECODER
from rewriting import parse
from tilewright.errors import VerificationError
from tilewright.ir.dtypes import DType
from tilewright.ir.schema import schema
from tilewright.passes.engine_error import engine_error
from tilewright.passes.kv_cache import paged_cache_pass

pytestmark = pytest.mark.quick

GRAPH = paged_cache_pass(DType.F8E4M3).run(parse(DECODER))
Outputs = dict[str, torch.Tensor]


def cache(x: torch.Tensor, tries: int) -> Outputs:
    """The outputs of a layer whose keys are these rows."""
    made = schema("quantize_rows").reference(x, dtype=DType.F8E4M3, tries=tries)
    return dict(zip(("k_cache_0", "k_scale_0"), made, strict=True))


def error(wanted: Outputs, found: Outputs) -> float:
    return engine_error("it", GRAPH, wanted, found)


def test_another_scale_is_no_error_where_its_codes_are_as_near() -> None:
    x = torch.randn(3, 4, 2, 64)
    one, other = cache(x, 1), cache(x * (1 + 1e-3), 8)
    assert (one["k_scale_0"] * 1.05 < other["k_scale_0"]).any()
    assert error(one, other) < 1e-3 and error(one, one) == 0.0


def test_numbers_may_move_as_those_of_the_engine_do() -> None:
    """A row of a later layer of a bfloat16 engine, by a few hundredths."""
    x = torch.randn(3, 4, 2, 64)
    one, other = cache(x, 8), cache(x + 0.03 * x.abs().max() * torch.rand(x.shape), 8)
    logits = {"logits": torch.zeros(2, 16, dtype=torch.bfloat16)}
    assert 1e-2 < error(logits | one, logits | other) < 8e-2
    with pytest.raises(VerificationError):
        error(one, other)


def test_infinities_and_nan_agree_with_themselves_alone() -> None:
    x = torch.randn(3, 4, 2, 64)
    odd, usual = cache(x.index_fill(0, torch.tensor([1]), torch.nan), 8), cache(x, 8)
    assert error(odd, odd) == 0.0
    for one, other in ((odd, usual), (usual, odd)):
        with pytest.raises(VerificationError, match="NaN"):
            error(one, other)
    odd["k_scale_0"] = usual["k_scale_0"].clone()
    odd["k_scale_0"][2, 1] = torch.inf
    odd["k_cache_0"] = usual["k_cache_0"]
    assert error(odd, odd) == 0.0
    with pytest.raises(VerificationError):
        error(odd, usual)


@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["scale", "row", "logits"])
def test_what_is_wrong_is_found(wrong: str, element: torch.dtype) -> None:
    x = torch.randn(3, 4, 2, 64)
    wanted = {"logits": torch.randn(2, 16).to(element), **cache(x, 8)}
    found = dict(wanted)
    if wrong == "row":
        found |= cache(x.roll(1, 1), 8)
    else:
        name = "k_scale_0" if wrong == "scale" else wrong
        found[name] = wanted[name] * 1.2
    with pytest.raises(VerificationError, match="it"):
        error(wanted, found)
