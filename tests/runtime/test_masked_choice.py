"""What a warm-up captures of the sampling under masks, where a device only seems to be a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fake_decode import LazyExecutor
from fake_executor import VOCAB
from tilewright.runtime.grammar import Grammars

pytestmark = pytest.mark.quick
WORDS = -(-VOCAB // 32)


class Seen:
    """Stands for a TokenChooser, and for a pool of graphs."""

    def __init__(self, able: bool) -> None:
        self.able = able
        self.chosen: list[tuple[int, bool]] = []  # rows, and whether none has a mask
        self.bytes = self.captured = 0

    def captures(self, logits: torch.Tensor) -> bool:
        return self.able

    def choose_masked(self, logits, tokens, words, fields, params) -> None:
        assert words.shape == (len(tokens), WORDS) and len(logits) == len(tokens)
        self.chosen.append((len(tokens), bool((words == -1).all())))

    def capture(self, work):
        self.captured += 1
        return SimpleNamespace(replay=work), None


@pytest.mark.parametrize("able, words", [(True, WORDS), (True, None), (False, WORDS)])
def test_each_bucket_has_its_sampling_before_a_form_comes(monkeypatch, able, words) -> None:
    monkeypatch.setattr(LazyExecutor, "_shared_tokens", lambda self: None)
    fake, seen = LazyExecutor(8, 48), Seen(able)
    fake.allocate(9, 16)
    graphs = fake.graphs
    masked = graphs._masked
    masked._chooser = masked._graphs = seen
    masked._words = torch.zeros(8, WORDS, dtype=torch.int32)  # which would be on the GPU
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(fake.runner, "device", torch.device("cuda"))
        on_a_gpu.setattr(graphs.runner, "device", torch.device("cuda"))
        on_a_gpu.setattr(fake, "_rehearse", lambda: None)
        fake.warm_up(words)
        fake.warm_up(words)  # of what is there nothing is captured again
    graphs.queue.record(None).synchronize()
    made = able and words is not None
    assert graphs.captured.keys() == {1, 2, 4, 8}
    assert all((one.choice is not None) == made for one in graphs.captured.values())
    assert seen.captured == (4 if made else 0)
    assert seen.chosen == ([(rows, True) for rows in (8, 4, 2, 1)] if made else [])


@pytest.mark.parametrize("model, tokenizer, words", [(100, 90, 4), (None, 96, 3), (5, 97, 4)])
def test_a_mask_has_a_bit_for_each_token_of_either(model, tokenizer, words) -> None:
    found = Grammars(SimpleNamespace(vocab_size=tokenizer), [], model)
    assert found.words == words
    assert np.zeros(words, np.int32).nbytes * 8 >= max(model or 0, tokenizer)
