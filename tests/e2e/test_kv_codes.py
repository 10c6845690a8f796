"""Engines whose KV cache holds codes, against Hugging Face's model with keys and values rounded by
hand before its own attention.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tilewright as tw
from cache_rounding import rounded
from tilewright.compiler.inspect.facts import headline
from tilewright.ir.dtypes import DType
from tiny_models import PROMPTS, tiny_model

DTYPES = {"fp8": DType.F8E4M3, "int8": DType.I8}
TOKENS = 8


@pytest.fixture(scope="module", params=DTYPES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[str, torch.nn.Module, tw.Engine]]:
    """The type, Hugging Face's model over rounded keys and values, and an engine of the model."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    dtype, codes = request.param, DTYPES[request.param]
    engine = tw.compile(
        tiny_model("llama"),
        backend="eager",
        target="cpu",
        kv_cache=tw.KVCacheConfig(page_size=4, dtype=dtype),
        verify="full" if dtype == "fp8" else "structure",
        max_batch_size=4,
    )
    name = f"rounded_{dtype}"

    def attention(module, q, k, v, *args, **options):
        return sdpa_attention_forward(
            module, q, rounded(k, codes), rounded(v, codes), *args, **options
        )

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model = tiny_model("llama")
    model.set_attn_implementation(name)
    yield dtype, model, engine


def test_logits_and_tokens_are_those_of_rounded_keys_and_values(pair) -> None:
    dtype, model, engine = pair
    for prompt in PROMPTS:
        with torch.no_grad():
            wanted = model(torch.tensor([prompt]), use_cache=False).logits[0]
            plain = tiny_model("llama")(torch.tensor([prompt]), use_cache=False).logits[0]
        found = engine(torch.tensor(prompt))
        apart = (found - wanted).abs().max() / wanted.abs().max()
        assert apart < 1e-4, dtype
        assert (found - plain).abs().max() / wanted.abs().max() > 10 * apart, "it does round"
    params = tw.SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    found = [c.token_ids for c in engine.generate(list(PROMPTS), params)]
    assert found == [uncached(model, prompt) for prompt in PROMPTS]


def uncached(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Greedy tokens without a cache: each step rounds all keys and values anew, to the same."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_forks_take_their_scales_with_them(pair) -> None:
    """Completions of one prompt share its pages until they write: a page is copied, its scales
    too.
    """
    _, _, engine = pair
    greedily = tw.SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, n=3)
    (alone,) = engine.generate(
        [PROMPTS[1]], tw.SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    )
    found = engine.generate([PROMPTS[1]], greedily)
    assert [c.token_ids for c in found] == [alone.token_ids] * 3
    caches = engine.executor.caches.tensors
    for tensor in caches.values():
        tensor.view(torch.uint8)[1] = 7
    engine.executor.copy_pages([1], [2])
    assert all((tensor.view(torch.uint8)[2] == 7).all() for tensor in caches.values())
    assert len(caches) == 4 * 2
    engine.reset_prefix_cache()  # whose pages these may be


def test_a_token_has_the_bytes_of_codes_and_scales(pair, tmp_path) -> None:
    dtype, _, engine = pair
    layers, kv_heads, head_dim = 2, 2, 16
    wanted = layers * 2 * kv_heads * (head_dim + 4)
    assert engine.executor.bytes_per_token == wanted
    assert dict(headline(engine.image))["KV cache"].startswith(
        f"paged, {DTYPES[dtype]} with scales, {wanted}"
    )
    engine.save(tmp_path / "engine")
    params = tw.SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    loaded = tw.load(tmp_path / "engine")
    (found,) = loaded.generate([PROMPTS[0]], params)
    (before,) = engine.generate([PROMPTS[0]], params)
    assert found.token_ids == before.token_ids
