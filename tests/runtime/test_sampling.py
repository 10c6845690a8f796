"""Sampling against Hugging Face's logits processors, float64, and the chi-square test."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tilewright.errors import VerificationError
from tilewright.runtime import Sampler, SamplingParams, filters
from tilewright.runtime.filters import keep_top_p, penalise
from tilewright.runtime.sampling import BROKEN, SamplingState, check_finite, filtered_logits

V = 40


def state_of(prompt=(), output=(), stop_ids=(), index=0, **params):
    state = SamplingState(SamplingParams(**params), prompt, frozenset(stop_ids), index)
    for token in output:
        state.commit(token)
    return state


def sample(logits, *states):
    return [one.token_id for one in Sampler().sample(logits, states)]


def draw(rows, *states):
    """Samples, and commits what each draws."""
    tokens = sample(rows, *states)
    for state, token in zip(states, tokens, strict=True):
        state.commit(token)
    return tokens


@st.composite
def logits_rows(draw):
    """Distinct logits, shuffled: where equal ones are cut is Hugging Face's accident."""
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    spread = draw(st.sampled_from([0.02, 0.2, 1.0]))
    order = torch.randperm(V, generator=generator)
    return ((order - V / 2) * spread + 0.003)[None].float()


@given(
    logits=logits_rows(),
    temperature=st.floats(0.05, 3),
    top_k=st.integers(0, V + 5),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_the_filtered_distribution_is_hugging_faces(logits, temperature, top_k, top_p, min_p):
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    ordered = expected.double().softmax(-1).sort(descending=True).values
    assume((ordered.cumsum(-1) - top_p).abs().min() > 1e-5 or top_p == 1)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ratios = ordered / ordered.max()
    assume((ratios - min_p).abs().min() > 1e-5 or min_p in (0, 1))
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = filtered_logits(logits, [params])
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-7)


@given(
    logits=logits_rows(), tokens=st.lists(st.integers(0, V - 1), min_size=1), p=st.floats(0.5, 2)
)
def test_repetition_penalty_is_hugging_faces(logits, tokens, p):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    expected = RepetitionPenaltyLogitsProcessor(p)(torch.tensor([tokens]), logits.clone())
    split = len(tokens) // 2
    state = state_of(tokens[:split], tokens[split:], repetition_penalty=p)
    torch.testing.assert_close(state.penalised(logits[0]), expected[0])
    late = state_of(tokens[:split], repetition_penalty=p)
    late.penalised(logits[0])
    for token in tokens[split:]:
        late.commit(token)  # kept up to date from then on
    torch.testing.assert_close(late.penalised(logits[0]), expected[0])


@given(
    logits=logits_rows(),
    biases=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100, width=32), min_size=1),
    seen=st.integers(0, V - 1),
    p=st.floats(0.5, 2),
)
def test_bias_is_hugging_faces_and_comes_before_the_penalties(logits, biases, seen, p):
    from transformers.generation.logits_process import (
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    ids = torch.tensor([[seen]])
    expected = SequenceBiasLogitsProcessor([[[t], b] for t, b in biases.items()])(ids, logits)
    expected = RepetitionPenaltyLogitsProcessor(p)(ids, expected)
    state = state_of([seen], logit_bias=biases, repetition_penalty=p)
    torch.testing.assert_close(state.adjusted(logits[0]), expected[0])


def test_allowed_tokens_and_biases_change_their_own_row_alone():
    logits = torch.zeros(3, V)
    logits[:, 7], logits[:, 9] = 5.0, 4.0
    only = state_of(allowed_token_ids=[9, 11, V + 3])
    pushed = state_of(logit_bias={7: -100, 3: 100, V: 100})
    assert sample(logits, only, pushed, state_of()) == [9, 3, 7]
    assert sample(logits, state_of(logit_bias={3: 4.5}), only, only) == [7, 9, 9]
    drawn = {sample(logits[:1], state_of(allowed_token_ids=[9, 11], temperature=9.0))[0]}
    assert drawn <= {9, 11}


def test_rows_whose_logits_are_changed_need_the_host():
    for params in ({"logit_bias": {1: 1.0}}, {"allowed_token_ids": [1]}, {"presence_penalty": 1.0}):
        state = state_of(**params)
        assert not state.plain and not state.samples_in_step, params
    assert state_of(logit_bias={}).plain and state_of(logit_bias={}).samples_in_step


def test_presence_and_frequency_penalties_look_at_the_output_alone():
    logits = torch.arange(6.0)
    state = state_of([0, 1], [2, 2, 3], presence_penalty=0.5, frequency_penalty=0.25)
    expected = torch.tensor([0, 1, 2 - 0.5 - 0.5, 3 - 0.5 - 0.25, 4, 5])
    torch.testing.assert_close(state.penalised(logits), expected)
    seen, counts = torch.zeros(6, dtype=torch.bool), torch.zeros(6, dtype=torch.int32)
    assert torch.equal(penalise(logits, seen, counts, 2.0, 1.0, 1.0), logits)


@pytest.mark.quick
def test_greedy_takes_the_first_of_equals_with_and_without_the_fast_path():
    logits = torch.zeros(2, V)
    logits[:, [7, 3, 30]] = 5.0
    assert sample(logits, state_of(), state_of()) == [3, 3]
    assert sample(logits, state_of(logprobs=1), state_of(temperature=0.0)) == [3, 3]
    assert sample(logits, state_of(output=[3], presence_penalty=1.0), state_of()) == [7, 3]


def test_sampling_leaves_the_logits_as_they_are():
    logits = torch.randn(2, V)
    kept = logits.clone()
    sample(
        logits, state_of([1], repetition_penalty=2.0), state_of(temperature=1.0, top_k=3, seed=1)
    )
    assert torch.equal(logits, kept)


def frequencies(logits, count, **params):
    state = state_of(seed=11, **params)
    drawn = [draw(logits, state)[0] for _ in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=logits.shape[-1])


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_tokens_come_as_often_as_they_should(params):
    logits, count = torch.randn(1, 12), 4000
    observed = frequencies(logits, count, **params)
    expected = filtered_logits(logits, [SamplingParams(**params)])[0].double().softmax(-1) * count
    kept = expected > 0
    assert observed[~kept].sum() == 0
    chi_square = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)  # 4 standard deviations


@pytest.mark.quick
def test_a_seed_gives_the_same_tokens_in_any_batch():
    logits = torch.randn(20, 4, V)
    params = {"temperature": 1.1, "top_p": 0.9, "seed": 42}

    def run(*others):
        state = state_of(**params)
        return [draw(rows[: 1 + len(others)], state, *others)[0] for rows in logits]

    alone = run()
    others = (state_of(), state_of(temperature=2.0, top_k=3), state_of(logprobs=2))
    assert run(*others) == alone
    assert len(set(alone)) > 5


def test_streams_of_samples_and_seeds_differ():
    logits = torch.zeros(30, 1, V)

    def run(**params):
        state = state_of(temperature=1.0, **params)
        return tuple(draw(rows, state)[0] for rows in logits)

    streams = {run(seed=s, index=i) for s in (0, 1, 2, -1, 2**64 - 1) for i in range(3)}
    assert len(streams) == 15
    assert run() != run()  # without a seed


@pytest.mark.quick
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=120))
def test_a_number_belongs_to_a_token_however_often_it_is_asked_for(turns):
    """Against the bare generator: what was drawn ahead, and given up, takes nothing away."""
    seed = 77
    key = hashlib.sha256(f"{seed}:0".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
    numbers = torch.rand(200, dtype=torch.float64, generator=generator).tolist()
    state, committed = state_of(temperature=1.0, seed=seed), 0
    for commits, ahead in turns:
        if commits:
            state.commit(0)
            committed += 1
        found = state.uniform(ahead)
        assert numbers[committed + ahead] - 2**-24 < found <= numbers[committed + ahead]
        assert float(torch.tensor(found, dtype=torch.float32)) == found < 1


def test_what_a_program_can_sample():
    assert state_of(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1).samples_in_step
    assert state_of().samples_in_step and state_of(min_new_tokens=2).samples_in_step
    early = state_of(stop_ids=[1], min_new_tokens=1)
    assert not early.samples_in_step
    early.commit(3)
    assert early.samples_in_step
    for params in ({"logprobs": 0}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}):
        assert not state_of(**params).samples_in_step


@pytest.mark.quick
def test_stop_tokens_are_masked_before_the_minimum():
    logits = torch.arange(float(V))[None]
    state = state_of(stop_ids=[V - 1, V - 2, V + 7], min_new_tokens=2)
    tokens = []
    for _ in range(3):
        tokens += sample(logits, state)
        state.commit(tokens[-1])
    assert tokens == [V - 3, V - 3, V - 1]


def test_logprobs_are_those_of_the_unmodified_logits():
    logits = torch.randn(2, V)
    states = (
        state_of([1], temperature=3.0, top_k=2, repetition_penalty=1.8, seed=0, logprobs=3),
        state_of(logprobs=0),
    )
    expected = logits.double().log_softmax(-1)
    for row, one in enumerate(Sampler().sample(logits, states)):
        assert one.logprobs.token_id == one.token_id
        assert one.logprobs.logprob == pytest.approx(float(expected[row, one.token_id]))
    top = Sampler().sample(logits, states)[0].logprobs.top
    values, indices = expected[0].topk(3)
    assert [token for token, _ in top] == indices.tolist()
    assert [value for _, value in top] == pytest.approx(values.tolist())
    assert Sampler().sample(logits, states)[1].logprobs.top == ()
    assert Sampler().sample(logits, [state_of(), state_of()])[0].logprobs is None


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 1e300])
def test_extreme_temperatures(temperature):
    logits = torch.randn(1, V) * 50
    token = sample(logits, state_of(temperature=temperature, seed=1))[0]
    assert temperature > 1 or token == int(logits.argmax())


def test_top_p_over_a_flat_vocabulary_sorts_it_whole():
    logits = torch.linspace(0, 0.01, 5000)[torch.randperm(5000)][None]
    kept = int(keep_top_p(logits, torch.tensor([[0.5]]).double()).isfinite().sum())
    assert 2480 <= kept <= 2500
    both = keep_top_p(logits.expand(2, -1), torch.tensor([[1.0], [1e-9]]).double())
    assert both.isfinite().sum(-1).tolist() == [5000, 1]


@pytest.mark.quick
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"logprobs": 1}])
def test_a_broken_row_is_marked_and_changes_no_other(bad, params):
    logits = torch.randn(3, V)
    each = [{**params, "seed": seed} for seed in range(3)]
    expected = sample(logits, *(state_of(**one) for one in each))
    logits[1, 5] = bad
    found = Sampler().sample(logits, [state_of(**one) for one in each])
    assert [one.token_id for one in found] == [expected[0], BROKEN, expected[2]]
    assert found[1].logprobs is None
    with pytest.raises(VerificationError, match="finite"):
        check_finite(logits.amax(-1).tolist())


def test_a_row_without_an_allowed_token_is_broken():
    none = state_of(stop_ids=[0, 1, 2], min_new_tokens=1)
    assert sample(torch.randn(2, 3), none, state_of())[0] == BROKEN


@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 257, 1000])
def test_draws_invert_the_distribution_function(vocab) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(64, vocab, generator=generator)
    if vocab > 1:  # half of them have no mass, whole blocks too
        logits[:, : vocab // 4] = logits[:, -(vocab // 4) :] = -torch.inf
    uniform = torch.randint(2**24, (64, 1), generator=generator).double() / 2**24
    uniform[:2, 0] = torch.tensor([0.0, 1 - 2.0**-24])
    ends = logits.double().softmax(-1).cumsum(-1)
    expected = [int((row <= at * row[-1]).sum()) for row, at in zip(ends, uniform, strict=True)]
    found = filters.draw(logits, uniform).tolist()
    assert found == expected
    assert logits.gather(1, torch.tensor(found)[:, None]).isfinite().all()
