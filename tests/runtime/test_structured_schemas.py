"""Random JSON schemas: what a model writes under them parses, and has the schema."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch

from random_schemas import has_schema, random_schema
from tilewright.formats.tokenizer import Tokenizer, TokenizerConfig
from tilewright.runtime import Sampler, SamplingParams, StructuredOutputsParams
from tilewright.runtime.grammar import Grammars
from tilewright.runtime.sampling import SamplingState
from writing_model import closing, writing_loop

SCHEMAS = int(os.environ.get("TEST_SCHEMAS", "40"))


def test_what_is_written_has_its_schema():
    rng = random.Random(9)
    schemas = [random_schema(rng) for _ in range(SCHEMAS)]
    params = [
        SamplingParams(
            structured_outputs=StructuredOutputsParams(json=schema),
            temperature=rng.choice([0.0, 1.0]),
            seed=index,
            max_new_tokens=400,
        )
        for index, schema in enumerate(schemas)
    ]
    loop = writing_loop(max_num_seqs=8)
    completions = loop.generate([[5, 6, 7]] * SCHEMAS, params)
    for schema, (one,) in zip(schemas, completions, strict=True):
        assert one.finish_reason == "stop", (schema, one.text)
        assert has_schema(json.loads(one.text), schema), (schema, one.text)


def sentencepiece() -> Tokenizer:
    """As Llama 2 has it: ▁ for spaces, and a token for each byte that no other one covers."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    specials = ["<unk>", "<s>", "</s>"]
    merges = [*zip("▁hf▁▁", "teo{▁", strict=True), ("▁t", "he"), ("fo", "x"), ('"', ":")]
    letters = [chr(code) for code in range(33, 127)]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *letters]
    tokens = [*specials, *pieces, *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend, TokenizerConfig(eos_token_ids=(2,)))


def test_tokens_of_sentencepiece_write_what_has_its_schema():
    tokenizer, rng = sentencepiece(), random.Random(4)
    size = tokenizer.vocab_size
    grammars = Grammars(tokenizer, [2], size)
    bias, generator = closing(tokenizer, size), torch.Generator().manual_seed(1)
    for seed in range(SCHEMAS // 2):
        schema = random_schema(rng)
        form = StructuredOutputsParams(json=schema)
        params = SamplingParams(structured_outputs=form, temperature=1.0, seed=seed)
        state = SamplingState(params, [1], frozenset([2]), 0, grammars.matcher(form))
        tokens = []
        while not state.matcher.stopped:
            logits = 2 * torch.randn(1, size, generator=generator) + bias
            tokens.append(Sampler().sample(logits, [state])[0].token_id)
            state.commit(tokens[-1])
            assert len(tokens) < 1000
        text = tokenizer.decode(tokens)
        assert has_schema(json.loads(text), schema), (schema, text)


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ("abc", {"type": "string", "minLength": 0, "maxLength": 2}),
        (True, {"type": "integer", "minimum": 0, "maximum": 2}),
        (1.5, {"type": "integer", "minimum": 0, "maximum": 2}),
        (3, {"type": "number", "minimum": 0, "maximum": 2}),
        (1, {"enum": [True, "1"]}),
        ({"a": None}, {"type": "object", "properties": {}, "required": []}),
        ({}, {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}),
        ([None], {"type": "array", "items": {"type": "boolean"}, "minItems": 0, "maxItems": 1}),
        (None, {"anyOf": [{"const": 0}, {"type": "boolean"}]}),
    ],
)
def test_the_judge_refuses(value, schema):
    assert not has_schema(value, schema)
