"""The pictures of the docs, taken of the real thing: `make screenshots` writes them anew."""

from __future__ import annotations

import base64
import os
import threading
from pathlib import Path

import httpx
import pytest

import tilewright as tw
from headless import Page, chromium

_FOLDER = os.environ.get("TEST_SCREENSHOTS")
_MOST_BYTES = 150_000
_OTHERS = ("Tell me about foxes.", "Count to fifty in words.", "Describe the sea.", "What is rain?")

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not _FOLDER, reason="TEST_SCREENSHOTS names no folder for them"),
]


def _taken(browser, name: str, width: int, height: int, scale: float, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_script("document.getElementById('log').scrollTop = 1e9")
    data = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
    assert len(data) < _MOST_BYTES, f"{name}: {len(data)} bytes"
    Path(_FOLDER, name).write_bytes(data)


def _others(url: str, over: threading.Event) -> list[threading.Thread]:
    """Other people, who ask too, so that there is something to see."""

    def go(question: str) -> None:
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 60, "seed": 1}
        while not over.is_set():
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)

    found = [threading.Thread(target=go, args=(one,), daemon=True) for one in _OTHERS]
    for thread in found:
        thread.start()
    return found


def test_screenshots(smollm2_gguf, serve_any, tmp_path) -> None:
    engine = tw.compile(smollm2_gguf, target="cpu", backend="eager", max_batch_size=8, verify="off")
    over = threading.Event()
    with chromium(tmp_path) as browser, serve_any(engine, models=("SmolLM2-135M",)) as server:
        browser.set_window_size(1280, 800)
        shown = Page(browser, server.url)
        shown.settings(temperature=0, most=120)
        others = _others(server.url, over)
        for question in ("What is the capital of France?", "Name three things to see there."):
            shown.ask(question)
            shown.until(lambda: shown["#send"].is_displayed(), 240)
        shown.ask("And what do people eat?")
        shown.until(lambda: len(shown.text("article:last-of-type .text")) > 120, 240)
        _taken(browser, "page-light.png", 1180, 800, 1.25, "light")
        _taken(browser, "page-dark.png", 1180, 800, 1.25, "dark")
        _taken(browser, "page-telephone.png", 390, 800, 1.5, "light")
        over.set()
        shown["#stop"].click()
        for thread in others:
            thread.join(120)
