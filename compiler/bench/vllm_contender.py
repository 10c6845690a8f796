"""vLLM as a contender, by its offline API as of 0.26: an engine in this process, stepped by us."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .contenders import Batch, Contender, synchronize
from .reference import ReferenceModel

WARM_UP_TOKENS = 8
BLOCK = 16  # tokens of a page
SPARE = 1.05  # of the cache: pages that it keeps for itself
FREE_SHARE = 0.9  # of the memory that is free: it refuses to start where it would need more


class VLLM(Contender):
    """Greedy decoding by vLLM, prefix caching off, other choices its own.

    Args:
        reference: which model; a folder as Hugging Face has it. Random weights are drawn by vLLM
            ("dummy"), others read from the checkpoint.
        length: of a sequence, prompt and new tokens together.
        sequences: the most at once.

    Raises:
        ValueError: a .gguf file.
    """

    label = "vLLM"

    def __init__(self, reference: ReferenceModel, length: int, sequences: int = 1) -> None:
        if not Path(reference.path).is_dir():
            raise ValueError("vLLM is run on Hugging Face folders only, not on .gguf files")
        # Read when vLLM is imported: else the engine would run in a process of its own.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        vllm: Any = import_module("vllm")
        self.device, self.length = reference.device, length
        self.engine = vllm.LLM(**options(reference, length, sequences)).llm_engine
        kinds: Any = import_module("vllm.sampling_params")
        self._params = vllm.SamplingParams
        self._deltas = kinds.RequestOutputKind.DELTA
        self._requests = 0

    def prepare(self, prompts: Sequence[list[int]]) -> None:
        self.run_batch(prompts, min(WARM_UP_TOKENS, self.length - len(prompts[0])))

    def run_batch(self, prompts: Sequence[list[int]], new_tokens: int) -> Batch:
        """As ``Contender`` has it."""
        params = self._params(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._deltas,
        )
        tokens: dict[str, list[int]] = defaultdict(list)
        stamps: dict[str, list[float]] = defaultdict(list)
        synchronize(self.device)
        submitted = time.perf_counter()
        for prompt in prompts:
            self._requests += 1
            self.engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, params)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                new = output.outputs[0].token_ids
                tokens[output.request_id] += new
                stamps[output.request_id] += [now] * len(new)
        return Batch(submitted, [*tokens.values()], [*stamps.values()])


def options(reference: ReferenceModel, length: int, sequences: int) -> dict[str, object]:
    """What ``vllm.LLM`` is told: the same model, element type and lengths, and no more memory than
    the contenders leave.
    """
    found: dict[str, object] = {
        "model": reference.path,
        "skip_tokenizer_init": True,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "seed": 0,
        "max_model_len": length,
        "max_num_seqs": sequences,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "kv_cache_memory_bytes": _cache_bytes(reference, length, sequences),
    }
    if reference.has_random_weights:
        found["load_format"] = "dummy"
    if reference.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(reference.device)
        found["gpu_memory_utilization"] = FREE_SHARE * free / total
    return found


def _cache_bytes(reference: ReferenceModel, length: int, sequences: int) -> int:
    config: Any = reference.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    a_token = 2 * config.num_hidden_layers * groups * width * reference.dtype.itemsize
    blocks = sequences * -(-length // BLOCK) + 1  # one is never given out
    return int(SPARE * blocks * BLOCK * a_token)
