"""``deterministic=True`` on a GPU: a sequence alone and in a batch of 64 gives the same tokens and
the same bits of logits; by default it gives nearly the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pytest
import torch

import tilewright as tw
from tiny_models import VOCAB, tiny_model

pytestmark = pytest.mark.gpu
BATCH, COUNT = 64, 24
# Lengths from 1 to 190, so that prompts end in every place of a tile and of a page.
PROMPTS = [[(37 * i + 11 * n + 3) % VOCAB for i in range(1 + 3 * n)] for n in range(BATCH)]
ALONE = (0, 1, 5, 6, 11, 21, 22, 37, 43, 53, 60, 63)
# Of the largest logit: two layers in that type, and what they keep of the tokens before.
CLOSE = {"float32": 1e-4, "bfloat16": 0.1}
Logits = Mapping[int, torch.Tensor]


def params(index: int, **given: object) -> tw.SamplingParams:
    """Greedy; the seed says which sequence it is."""
    return tw.SamplingParams(max_new_tokens=COUNT, ignore_eos=True, seed=index, **given)


def engine_of(dtype: str, deterministic: bool) -> tw.Engine:
    return tw.compile(
        tiny_model("llama"),
        backend="triton",
        dtype=dtype,
        max_batch_size=BATCH,
        deterministic=deterministic,
    )


def generated(
    engine: tw.Engine, indices: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, list[int]], Logits]:
    """Tokens, and the logits f32[COUNT, V] of each, of these prompts in one batch.

    Logprobs are asked for, so that the logits come to the sampler.
    """
    found: dict[int, list[torch.Tensor]] = defaultdict(list)
    sampler = engine.loop.sampler
    sample = sampler.sample

    def recorded(logits, states):
        for row, state in zip(logits.cpu(), states, strict=True):
            found[state.params.seed].append(row)
        return sample(logits, states)

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "sample", recorded)
        completions = engine.generate(
            [PROMPTS[index] for index in indices], [params(index, logprobs=0) for index in indices]
        )
    tokens = {i: c.token_ids for i, c in zip(indices, completions, strict=True)}
    return tokens, {index: torch.stack(rows) for index, rows in found.items()}


def alone(
    engine: tw.Engine, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, list[int]], Logits]:
    tokens: dict[int, list[int]] = {}
    logits: dict[int, torch.Tensor] = {}
    for index in ALONE:
        own, rows = generated(engine, [index], monkeypatch)
        tokens |= own
        logits |= rows
    return tokens, logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_alone_and_in_a_batch_gives_the_same_bits(dtype, monkeypatch) -> None:
    engine = engine_of(dtype, deterministic=True)
    together, rows = generated(engine, range(BATCH), monkeypatch)
    assert all(logits.shape == (COUNT, VOCAB) for logits in rows.values())
    apart, own_rows = alone(engine, monkeypatch)
    assert {1, BATCH} <= engine.executor.graphs.captured.keys()
    assert apart == {index: together[index] for index in ALONE}
    for index in ALONE:
        assert torch.equal(own_rows[index], rows[index]), index
    # Without logprobs tokens are chosen another way.
    plain = engine.generate(PROMPTS, [params(index) for index in range(BATCH)])
    assert [completion.token_ids for completion in plain] == list(together.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_default_it_is_close(dtype, monkeypatch) -> None:
    engine = engine_of(dtype, deterministic=False)
    together, rows = generated(engine, range(BATCH), monkeypatch)
    apart, own_rows = alone(engine, monkeypatch)
    differ = 0
    for index in ALONE:
        pairs = zip(apart[index], together[index], strict=True)
        parted = next((t for t, (a, b) in enumerate(pairs) if a != b), COUNT - 1)
        here, there = own_rows[index][: parted + 1], rows[index][: parted + 1]
        off = CLOSE[dtype] * float(there.abs().max())
        torch.testing.assert_close(here, there, rtol=0, atol=off)
        differ += int((here != there).sum())
    assert differ > 0  # else the test above shows nothing


def test_only_kernels_of_ours_can_promise_it() -> None:
    with pytest.raises(tw.errors.UnsupportedError, match="deterministic=True with backend 'eager'"):
        tw.compile(tiny_model("llama"), backend="eager", deterministic=True)
