"""An encoder behind a server: OpenAI's and Ollama's clients, held against transformers."""

from __future__ import annotations

import httpx
import numpy as np
import ollama
import openai
import pytest
import torch

from tilewright.compiler.encoders import is_encoder, open_encoder, pooling_of
from tilewright.errors import CheckpointError, UnsupportedError
from tilewright.serving.embeddings import make_embedding_app
from tilewright.serving.encoder import _batches
from tilewright.serving.service import Rules
from tiny_encoder import LONGEST, WORDS, save_bert

TEXTS = ["the quick brown fox", "a dog", "the fox jumps over the lazy dog over the fox", "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoders") / "tiny-bert"
    save_bert(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    with pytest.MonkeyPatch.context() as patched:  # what the tests' own fixture comes too late for
        patched.setenv("TILEWRIGHT_VERIFY", "off")  # transformers is the judge
        return open_encoder(folder, "eager")


@pytest.fixture(scope="module")
def server(encoder, serve_app):
    with serve_app(make_embedding_app(encoder, Rules(("bert",), most_body=20_000))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(folder):
    """What transformers gives, one text at a time and so without padding."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval().double()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def vector(text: str, pooling: str = "mean") -> np.ndarray:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0]
        found = hidden.mean(0) if pooling == "mean" else hidden[0]
        return (found / found.norm()).numpy()

    return vector


def test_vectors_are_transformers_own(client, expected, encoder) -> None:
    found = client.embeddings.create(model="bert", input=TEXTS)  # base64, unless it is asked else
    assert [one.index for one in found.data] == [0, 1, 2, 3] and found.model == "bert"
    for text, one in zip(TEXTS, found.data, strict=True):
        np.testing.assert_allclose(one.embedding, expected(text), atol=1e-6)
    tokens = sum(len(encoder.token_ids(text, 0)) for text in TEXTS)
    assert found.usage.prompt_tokens == found.usage.total_tokens == tokens
    plain = client.embeddings.create(model="bert", input=TEXTS[0], encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, expected(TEXTS[0]), atol=1e-6)


def test_token_ids_are_taken_as_they_are(client, expected, encoder) -> None:
    rows = [encoder.token_ids(text, 0) for text in TEXTS]
    found = client.embeddings.create(model="bert", input=rows)
    np.testing.assert_allclose(found.data[2].embedding, expected(TEXTS[2]), atol=1e-6)
    one = client.embeddings.create(model="bert", input=rows[1])
    np.testing.assert_allclose(one.data[0].embedding, expected(TEXTS[1]), atol=1e-6)


def test_fewer_dimensions_are_of_length_one_too(client, expected) -> None:
    found = client.embeddings.create(model="bert", input=TEXTS[0], dimensions=5)
    first = expected(TEXTS[0])[:5]
    np.testing.assert_allclose(found.data[0].embedding, first / np.linalg.norm(first), atol=1e-6)


def test_ollamas_client_gets_the_same(server, expected) -> None:
    client = ollama.Client(server.url)
    found = client.embed("bert:latest", TEXTS)
    np.testing.assert_allclose(found.embeddings[3], expected(TEXTS[3]), atol=1e-6)
    long = client.embed("bert", "fox " * 100)  # cut, as Ollama does
    assert long.prompt_eval_count == LONGEST
    with pytest.raises(ollama.ResponseError, match=f"up to {LONGEST} tokens"):
        client.embed("bert", "fox " * 100, truncate=False)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({"input": ""}, "nothing"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["dog", ""]}, r"input\[1\]"),
        ({"input": "fox " * 30}, f"up to {LONGEST} tokens"),
        ({"input": [len(WORDS)]}, f"below {len(WORDS)}"),
        ({"input": [-1]}, "input"),
        ({"input": {"text": "dog"}}, "input"),
        ({"input": ["dog"] * 2049}, "input"),
        ({"input": "dog", "dimensions": 33}, "at most 32"),
        ({"input": "dog", "dimensions": 0}, "dimensions"),
        ({"input": "dog", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded_is_a_400_that_says_why(client, ask, words) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.embeddings.create(**{"model": "bert", **ask})


def test_it_says_what_it_is(client, server, serve_app, encoder) -> None:
    assert [model.id for model in client.models.list()] == ["bert"]
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here, but: bert"):
        client.embeddings.create(model="gpt", input="dog")
    with pytest.raises(openai.BadRequestError, match="an encoder, which generates nothing"):
        client.completions.create(model="bert", prompt="dog")
    url = f"{server.url}/v1/embeddings"
    assert httpx.post(url, json={"input": "x" * 30_000}).status_code == 413
    with serve_app(make_embedding_app(encoder, Rules(("bert",), keys=("secret",)))) as keyed:
        url = f"{keyed.url}/v1/embeddings"
        assert httpx.post(url, json={"input": "dog"}).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx.post(url, json={"input": "dog"}, headers=headers).status_code == 200
        keyed.service.rules = Rules(("bert",), most_requests=0)
        full = httpx.post(url, json={"input": "dog"}, headers=headers)
        assert full.status_code == 429 and "Retry-After" in full.headers


def test_a_causal_lm_embeds_nothing(served) -> None:
    for path in ("/v1/embeddings", "/api/embed"):
        found = httpx.post(served.url + path, json={"model": "tiny", "input": "dog"})
        assert found.status_code == 400 and "a causal LM, which embeds nothing" in found.text


def test_poolings(folder, tmp_path) -> None:
    assert is_encoder(folder) and pooling_of(folder) == "mean"
    for flag, pooling in (("cls_token", "cls"), ("mean_tokens", "mean")):
        save_bert(tmp_path / flag, pooling=flag)
        assert is_encoder(tmp_path / flag) and pooling_of(tmp_path / flag) == pooling
    config = tmp_path / "cls_token" / "1_Pooling" / "config.json"
    config.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UnsupportedError, match="mean or cls pooling, found max_tokens"):
        pooling_of(tmp_path / "cls_token")
    config.write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        pooling_of(tmp_path / "cls_token")


def test_an_encoder_without_all_of_its_weights_is_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    save_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no encoder\.layer\.0\.output\.dense\.weight"):
        open_encoder(tmp_path / "bert", "eager")


def test_rows_of_like_lengths_are_computed_together() -> None:
    lengths = [5, 8000, 1, 300] + [2] * 100
    batches = list(_batches(lengths))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert batches[0] == [1]
    assert all(len(b) <= 64 and len(b) * max(lengths[p] for p in b) <= 8192 for b in batches)
    assert list(_batches([9000])) == [[0]]
