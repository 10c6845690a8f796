"""SamplingParams: what is refused, and how it says so."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tilewright.errors import UsageError
from tilewright.runtime import SamplingParams

BAD = [
    ("temperature", [-0.1, math.nan, math.inf, "1", None, True]),
    ("top_p", [0.0, -0.5, 1.01, math.nan]),
    ("top_k", [-1, 1.5, True]),
    ("min_p", [-0.1, 1.1, math.nan]),
    ("repetition_penalty", [0.0, -1.0, math.nan, math.inf]),
    ("presence_penalty", [-2.1, 2.1, math.nan]),
    ("frequency_penalty", [-2.1, 2.1, math.nan]),
    ("max_new_tokens", [0, -1, 2.0, None]),
    ("min_new_tokens", [-1, 257]),
    ("stop", ["", ["a", ""], [1], 5]),
    ("stop_token_ids", [[-1], ["a"], "12", 7, [True]]),
    ("ignore_eos", [1, None]),
    ("seed", [1.5, "x", 2**64, -(2**63) - 1]),
    ("n", [0, -1, 1.0]),
    ("logprobs", [-1, 1.5, True]),
    ("cache_ttl", [-1.0, math.inf, "1"]),
    ("cache_namespace", [None, 3]),
    ("priority", [1.5, None, -(2**64)]),
    ("deadline", [-1.0, math.inf, math.nan]),
    ("prompt_logprobs", [-1, 1.5, True]),
    ("prompt_logprobs_start", [-1, 1.5, True, None]),
    ("logit_bias", [{0: 101}, {-1: 1}, {"0": 1.0}, {0: math.nan}, {0: True}, 3, "ab", [1, 2]]),
    ("allowed_token_ids", [[], [-1], "12", 5, [True]]),
]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD for value in values]
)
def test_a_bad_field_is_named_with_its_range(field, value):
    with pytest.raises(UsageError) as error:
        SamplingParams(**{field: value})
    assert error.value.culprit == f"SamplingParams.{field}"
    assert error.value.found == repr(value)
    assert error.value.exit_code == 2


@pytest.mark.quick
def test_the_edges_are_taken():
    SamplingParams(
        temperature=0, top_p=1e-9, min_p=1, presence_penalty=-2, frequency_penalty=2, n=1
    )
    SamplingParams(top_p=1, max_new_tokens=1, min_new_tokens=1, seed=2**64 - 1, logprobs=0)
    SamplingParams(seed=-(2**63), repetition_penalty=1e-3)


def test_stop_is_a_tuple_whatever_was_given():
    assert SamplingParams().stop == ()
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b", "a"]).stop_strings == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 1]).stop_token_ids == (3, 1)


def test_biases_are_pairs_in_the_order_of_their_tokens():
    params = SamplingParams(logit_bias={5: -100, 2: 1.5}, allowed_token_ids=[3, 1])
    assert params.logit_bias == params.biases == ((2, 1.5), (5, -100))
    assert params.allowed == (3, 1)
    assert params == dataclasses.replace(params)
    assert hash(params) == hash(SamplingParams(logit_bias=params.biases, allowed_token_ids=(3, 1)))
    assert SamplingParams().biases == () and SamplingParams(logit_bias={}).biases == ()


def test_defaults_are_greedy_and_hashable():
    params = SamplingParams()
    assert params.is_greedy and not params.penalises and not params.adjusts
    assert hash(params) == hash(SamplingParams())
    assert params.max_new_tokens == 256
