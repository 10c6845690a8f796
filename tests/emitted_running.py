"""Emitted ONNX folders in stock onnxruntime, held against Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator
from transformers import PreTrainedModel

STEPS, ROOM = 32, 64
# Prompts of two lengths, one of them beyond the windows of 8.
LENGTHS = (13, 5)


class Running:
    """A folder in onnxruntime, its caches of a batch in place."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.facts = json.loads((folder / "generation.json").read_text())
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(
            folder / self.facts["model"], options, providers=["CPUExecutionProvider"]
        )
        sizes = {"batch": batch, "cache_length": ROOM}
        self.caches = {
            cache["past"]: np.zeros([sizes.get(s, s) for s in cache["shape"]], cache["dtype"])
            for cache in self.facts["caches"]
        }

    def __call__(self, ids: np.ndarray, starts: list[int]) -> np.ndarray:
        """Logits of all of the new tokens, [batch, length, vocabulary]."""
        rows = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        positions = np.array(starts)[:, None] + rows
        feeds = {"input_ids": ids, "position_ids": positions, "logits_indices": rows.copy()}
        logits, *new = self.session.run(None, {**feeds, **self.caches})
        self.caches = dict(zip(self.caches, new, strict=True))
        return logits


def agrees_with_hugging_face(folder: Path, model: PreTrainedModel) -> None:
    """A prefill of two prompts and ``STEPS`` steps with the cache give the model's logits within
    1e-4, and its greedy tokens.
    """
    running = Running(folder, len(LENGTHS))
    generator = np.random.default_rng(0)
    tokens = [generator.integers(model.config.vocab_size, size=n).tolist() for n in LENGTHS]
    prompts = np.array([row + [0] * (max(LENGTHS) - len(row)) for row in tokens])
    logits = [list(row) for row in running(prompts, [0, 0])]
    logits = [row[:n] for row, n in zip(logits, LENGTHS, strict=True)]
    for _ in range(STEPS):
        new = [[int(row[-1].argmax())] for row in logits]
        step = running(np.array(new), [len(row) for row in tokens])
        for index, token in enumerate(new):
            tokens[index] += token
            logits[index].append(step[index, 0])
    for row, found in zip(tokens, logits, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(np.array(found), wanted, atol=1e-4, rtol=0)
        # What was appended are the likeliest tokens of Hugging Face's logits too.
        prompt = len(row) - STEPS
        assert row[prompt:] == wanted[prompt - 1 : -1].argmax(-1).tolist()


def nearly_as_good_in_bfloat16(folder: Path, model: PreTrainedModel) -> None:
    """A prefill by onnx's own reference evaluator (onnxruntime's CPU has no bfloat16) is no
    further from the model than twice what the model is in bfloat16 itself.

    Args:
        folder: of ops of the standard alone.
        model: in float32; it is left in bfloat16.
    """
    facts = json.loads((folder / "generation.json").read_text())
    ids = np.array([[3, 50, 7, 21, 9, 120, 64]])
    every = np.arange(ids.shape[1])[None]
    feeds = {"input_ids": ids, "position_ids": every, "logits_indices": every}
    sizes = {"batch": 1, "cache_length": ROOM}
    for cache in facts["caches"]:
        assert cache["dtype"] == "bfloat16"
        shape = [sizes.get(size, size) for size in cache["shape"]]
        feeds[cache["past"]] = np.zeros(shape, ml_dtypes.bfloat16)
    logits = ReferenceEvaluator(onnx.load(folder / facts["model"])).run(None, feeds)[0]
    assert logits.dtype == ml_dtypes.bfloat16
    with torch.no_grad():
        truth = model(torch.from_numpy(ids)).logits
        theirs = model.bfloat16()(torch.from_numpy(ids)).logits
    ours = torch.from_numpy(logits.astype(np.float32))
    assert (ours - truth).norm() < 2 * (theirs.float() - truth).norm()
