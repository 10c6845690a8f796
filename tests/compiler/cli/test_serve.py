"""``tilewright serve`` from the shell: it answers, and ends when it is told to."""

from __future__ import annotations

import signal
import socket

import httpx
import pytest

from cli_running import refused, run, spawn


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (("--timeout", "0"), "option --timeout"),
        (("--api-keys", "nowhere.txt"), "option --api-keys"),
    ],
)
def test_what_cannot_be_served_is_said(engine, options, culprit) -> None:
    refused(run("serve", engine, *options), culprit)


def test_a_file_without_keys_does_not_serve_everybody(engine, tmp_path) -> None:
    (tmp_path / "keys").write_text("\n\n")
    refused(run("serve", engine, "--api-keys", tmp_path / "keys"), "option --api-keys")


@pytest.mark.parametrize(
    "option", [("--max-batch-size", 3), ("--max-model-len", 9), ("--checkpoint", "x")]
)
def test_an_encoder_takes_no_options_of_a_language_model(tmp_path, option) -> None:
    config = '{"model_type": "bert", "architectures": ["BertModel"]}'
    (tmp_path / "config.json").write_text(config)
    refused(run("serve", tmp_path, "--port", 0, *option), option[0], "for an encoder")


def test_a_port_that_is_taken_is_said_before_the_work() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(run("serve", "no-such-model", "--port", port), f"127.0.0.1:{port}")


def test_it_answers_until_it_is_told_to_end(engine, tmp_path, monkeypatch) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    monkeypatch.setenv("TILEWRIGHT_API_KEY", "three")
    names = ("--served-model-name", "it", "--api-keys", tmp_path / "keys")
    with spawn("serve", engine, "--port", 0, *names) as process:
        try:
            url = process.stdout.readline().split(" on ")[1].split()[0]
            body = {"model": "it", "prompt": "one two", "max_tokens": 3}
            for key, status in (("two", 200), ("three", 200), ("four", 401)):
                headers = {"Authorization": f"Bearer {key}"}
                found = httpx.post(f"{url}/completions", json=body, headers=headers, timeout=60)
                assert found.status_code == status, found.text
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
        rest = process.stdout.read() + process.stderr.read()
    assert not any(text in rest for text in ("Bearer", "one two", "three", "Traceback"))
