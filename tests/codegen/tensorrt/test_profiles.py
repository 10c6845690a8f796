"""Profiles: what an engine is for, and the refusal of sizes that none covers."""

from __future__ import annotations

import pytest

from tilewright.codegen.tensorrt.network import Network, Tensor
from tilewright.codegen.tensorrt.profiles import (
    Profile,
    Range,
    check_profiles,
    decoder_profiles,
)
from tilewright.errors import UsageError
from tilewright.ir.dtypes import DType

IDS = Tensor("input_ids", DType.I64, ("batch", "length"))
CACHE = Tensor("past", DType.F16, ("batch", 2, 64, 16))
NETWORK = Network((IDS, CACHE), {}, (), {})


def test_prefill_and_decode() -> None:
    prefill, decode = decoder_profiles(8, 64)
    assert prefill.shapes(IDS) == ((1, 1), (1, 64), (8, 64))
    assert decode.shapes(IDS) == ((1, 1), (8, 1), (8, 1))
    assert decode.shapes(CACHE) == ((1, 2, 64, 16), (8, 2, 64, 16), (8, 2, 64, 16))
    assert decode.to_json()["batch"] == [1, 8, 8]
    check_profiles(NETWORK, [prefill, decode])


@pytest.mark.parametrize(
    ("length", "together", "longest"), [(2048, 8, 2048), (8192, 2, 8192), (131072, 1, 16383)]
)
def test_a_run_is_bounded(length: int, together: int, longest: int) -> None:
    """Its memory is, and a mask of 2**31 elements has no kernel of attention."""
    prefill, decode = decoder_profiles(8, length)
    assert prefill.sizes["batch"].most == together and prefill.sizes["length"].most == longest
    assert together * longest * length < 2**31
    assert prefill.sizes["rows"].most == together * longest and decode.sizes["batch"].most == 8


def test_a_dynamic_size_without_a_profile() -> None:
    with pytest.raises(UsageError, match="batch, length, found none"):
        check_profiles(NETWORK, [])
    with pytest.raises(UsageError, match="profile 'p': expected a range for the dynamic size len"):
        check_profiles(NETWORK, [Profile("p", {"batch": Range(1, 1, 2)})])
    check_profiles(Network((), {}, (), {}), [])


@pytest.mark.parametrize("found", [Range(0, 1, 2), Range(1, 3, 2), Range(2, 1, 2)])
def test_a_range_out_of_order(found: Range) -> None:
    profile = Profile("p", {"batch": found, "length": Range(1, 1, 1)})
    with pytest.raises(UsageError, match="1 <= least <= usual <= most for batch"):
        check_profiles(NETWORK, [profile])
