"""Models of the registry through Ollama's own client: made, copied, deleted, and asked."""

from __future__ import annotations

import hashlib
import os
import socket
from types import SimpleNamespace

import httpx
import ollama
import openai
import pytest

import tilewright as tw
from tilewright.serving.catalog import Catalog
from tilewright.serving.registry.manifest import Preset
from tilewright.serving.registry.names import ModelName, parse_name
from tilewright.serving.registry.store import Registry

MESSAGES = [{"role": "user", "content": "hello there"}]
GREEDY = {"temperature": 0, "num_predict": 6}
CONTENT = b"GGUF" + b"another model" * 50
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
TINY = Preset("You are tiny.", {"temperature": 0, "num_predict": 6})


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A server whose engine is the registry's "tiny", beside "other", which is not served."""
    folder = tmp_path_factory.mktemp("kept")
    registry = Registry(folder / "models")
    for name, content in (("tiny", b"GGUF, as it is served"), ("other", CONTENT)):
        (folder / f"{name}.gguf").write_bytes(content)
        registry.add(folder / f"{name}.gguf", ModelName(name), TINY if name == "tiny" else None)
    checkpoint = registry.read(ModelName("tiny")).checkpoint
    return SimpleNamespace(
        folder=folder, registry=registry, catalog=Catalog(registry, checkpoint, TINY)
    )


@pytest.fixture(scope="module")
def server(serve, kept):
    with serve(catalog=kept.catalog) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(server.url)


def answers(engine, system: str | None, **params: object) -> str:
    said = [{"role": "system", "content": system}, *MESSAGES] if system else MESSAGES
    given = tw.SamplingParams(**{"max_new_tokens": 6, **params})
    return engine.generate([engine.chat_prompt(said)], given)[0].text


def test_the_preset_of_what_is_served_holds_for_every_api(client, server, engine) -> None:
    own = answers(engine, "You are tiny.")
    assert client.chat("tiny", MESSAGES).message.content == own
    assert client.generate("tiny", "hello there").response == own
    ask = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    found = ask.chat.completions.create(model="tiny", messages=MESSAGES)
    assert found.choices[0].message.content == own and found.usage.completion_tokens == 6
    system = {"role": "system", "content": "You are large."}
    found = ask.chat.completions.create(model="tiny", messages=[system, *MESSAGES], max_tokens=2)
    assert found.choices[0].message.content == answers(engine, "You are large.", max_new_tokens=2)
    assert client.chat("tiny", MESSAGES, options={"num_predict": 1}).eval_count == 1


def test_a_model_made_of_the_served_one_is_answered_for(client, server, engine) -> None:
    made = client.create(
        "fox", from_="tiny", system="You are a fox.", parameters={"num_predict": 3}
    )
    assert made.status == "success"
    lines = list(client.create("fox", from_="tiny", system="You are a fox.", stream=True))
    assert lines[-1].status == "success"
    assert client.chat("fox", MESSAGES, options=GREEDY).message.content == answers(
        engine, "You are a fox."
    )
    shown = client.show("fox")
    assert "num_predict 6" in shown.parameters and "temperature 0" in shown.parameters
    ids = [one["id"] for one in httpx.get(f"{server.url}/v1/models").json()["data"]]
    assert ids == ["tiny", "fox"]
    client.delete("fox")
    with pytest.raises(ollama.ResponseError, match="no model 'fox' here"):
        client.chat("fox", MESSAGES)


def test_what_is_registered_is_listed_but_not_all_of_it_is_served(client) -> None:
    client.copy("other", "owner/copy:q4")
    names = {one.model: one for one in client.list().models}
    assert set(names) == {"tiny:latest", "other:latest", "owner/copy:q4"}
    assert names["other:latest"].size == len(CONTENT)
    assert client.show("other").details.format == "gguf"
    with pytest.raises(ollama.ResponseError, match="tilewright serve owner/copy:q4") as caught:
        client.chat("owner/copy:q4", MESSAGES)
    assert caught.value.status_code == 404
    client.delete("owner/copy:q4")
    assert len(client.list().models) == 2


def test_a_model_is_made_of_files_that_are_sent(client, kept) -> None:
    sent = kept.folder / "sent.gguf"
    sent.write_bytes(os.urandom(9 << 20))  # more than a body may have, of another kind
    digest = client.create_blob(sent)
    assert client.create_blob(sent) == digest
    assert client.create("sent", files={"sent.gguf": digest}, system="hi").status == "success"
    manifest = kept.registry.read(ModelName("sent"))
    assert kept.registry.path(manifest).read_bytes() == sent.read_bytes()
    client.delete("sent")
    assert digest not in kept.registry.blobs


def test_a_blob_is_what_its_digest_says_or_nothing(server, kept) -> None:
    digest = f"sha256:{hashlib.sha256(b'right').hexdigest()}"
    url = f"{server.url}/api/blobs/{digest}"
    assert httpx.head(f"{server.url}/api/blobs/{DIGEST}").status_code == 200
    assert httpx.head(url).status_code == 404
    refused = httpx.post(url, content=b"wrong")
    assert refused.status_code == 400 and digest in refused.json()["error"]
    assert httpx.post(url, content=b"right").status_code == 201
    assert httpx.post(url, content=b"right").status_code == 200
    kept.registry.prune()
    assert httpx.head(url).status_code == 404
    for wrong in ("sha256:12", "..%2Fx", "md5:" + "0" * 64):
        assert httpx.post(f"{server.url}/api/blobs/{wrong}", content=b"x").status_code in (400, 404)


@pytest.mark.parametrize(
    ("status", "words", "verb", "ask"),
    [
        (404, "Did you mean 'other'", "create", {"model": "x", "from": "otter"}),
        (400, "from: the name", "create", {"model": "x"}),
        (400, "from: the name", "create", {"model": "x", "from": "tiny", "files": {"a": DIGEST}}),
        (400, "model name", "create", {"model": "../x", "from": "tiny"}),
        (400, "model name", "create", {"from": "tiny"}),
        (400, "template", "create", {"model": "x", "from": "tiny", "template": "{{ .Prompt }}"}),
        (400, "adapters", "create", {"model": "x", "from": "tiny", "adapters": {"a": DIGEST}}),
        (400, "heat", "create", {"model": "x", "from": "tiny", "parameters": {"heat": 1}}),
        (400, "been sent", "create", {"model": "x", "files": {"a.gguf": "sha256:" + "0" * 64}}),
        (400, "file name", "create", {"model": "x", "files": {"../a.gguf": DIGEST}}),
        (400, "digest", "create", {"model": "x", "files": {"a.gguf": "../../etc/passwd"}}),
        (409, "being served", "create", {"model": "tiny", "from": "other"}),
        (409, "being served", "copy", {"source": "other", "destination": "Tiny:latest"}),
        (404, "'nobody'", "copy", {"source": "nobody", "destination": "x"}),
        (400, "model name", "copy", {"source": "other", "destination": "a b"}),
        (409, "being served", "delete", {"model": "tiny"}),
        (404, "'nobody'", "delete", {"model": "nobody"}),
        (400, "source", "copy", {}),
    ],
)
def test_what_cannot_be_done_is_said(server, kept, status, words, verb, ask) -> None:
    method = "DELETE" if verb == "delete" else "POST"
    found = httpx.request(method, f"{server.url}/api/{verb}", json=ask)
    assert found.status_code == status, found.text
    assert words in found.json()["error"]
    assert kept.registry.names() == [parse_name("other"), parse_name("tiny")]


def test_with_keys_they_are_needed(serve, kept) -> None:
    calls = [
        ("POST", "/api/create", {"model": "x", "from": "other"}),
        ("POST", "/api/copy", {"source": "other", "destination": "x"}),
        ("DELETE", "/api/delete", {"model": "other"}),
    ]
    with serve(catalog=kept.catalog, keys=("secret",)) as server:
        url = server.url
        for method, path, body in calls:
            assert httpx.request(method, url + path, json=body).status_code == 401
        assert httpx.post(f"{url}/api/blobs/{DIGEST}", content=b"x").status_code == 401
        assert httpx.head(f"{url}/api/blobs/{DIGEST}").status_code == 401
        keyed = {"Authorization": "Bearer secret"}
        found = httpx.post(f"{url}/api/copy", json=calls[1][2], headers=keyed)
        assert found.status_code == 200
        found = httpx.request("DELETE", f"{url}/api/delete", json={"model": "x"}, headers=keyed)
        assert found.status_code == 200


def test_a_client_that_goes_in_the_middle_of_a_file_leaves_nothing(serve, kept) -> None:
    digest = f"sha256:{hashlib.sha256(b'never sent').hexdigest()}"
    with serve(catalog=kept.catalog) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as half:
            head = f"POST /api/blobs/{digest} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nnev"
            half.sendall(head.encode())
        assert httpx.get(f"{server.url}/health").status_code == 200
    # The server has ended, and so has what it was doing.
    assert digest not in kept.registry.blobs
    assert list((kept.folder / "models" / "blobs").glob(".new-*")) == []
