"""Tier 3 of regress on a device: old and new in one process, kernels and phases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tilewright as tw
from tilewright.compiler.regress.checkout import Checkout
from tilewright.compiler.regress.timing.pairs import EnginePair, TimedPairs

pytestmark = pytest.mark.gpu
HERE = Checkout.running()
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}


def test_every_kernel_and_phase_of_an_engine_is_timed_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    engine = tw.compile(tmp_path, dtype="bfloat16", random_weights=0, max_batch_size=32)
    engine.save(tmp_path / "engine", weights="reference")
    folder = str(tmp_path / "engine")
    pair = EnginePair("tiny", engine.target.name, "kernels", folder, folder)
    with TimedPairs([pair], HERE, HERE, seed=1) as timed:
        assert timed.skipped == {}
        measured = timed.measure(list(timed.series))
    subjects = {series.subject for series in timed.series.values()}
    assert {"paged_attention", "rope_append_kv", "linear", "decode step", "prefill"} <= subjects
    assert set(measured) == set(timed.series)
    for name, (old, new) in measured.items():
        assert 0.2 < old / new < 5, name  # the same code; one pair alone may be far off
