"""The page at /, in a real browser: a question is typed, an answer streams in, figures move."""

from __future__ import annotations

import threading

import httpx
import pytest

from headless import Page, chromium
from tilewright.serving.access import Limits
from tilewright.serving.web import page

ANSWER = "article.answered:last-of-type"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.set_window_size(1280, 800)
        yield driver


class Steps:
    """Steps of an engine that are taken one by one, as the test lets them."""

    def __init__(self, loop, monkeypatch) -> None:
        self._allowed, self._step = threading.Semaphore(0), loop.step
        monkeypatch.setattr(loop, "step", self._take)

    def _take(self) -> None:
        assert self._allowed.acquire(timeout=30)
        self._step()

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)


def test_a_question_is_answered_while_figures_move(browser, served, engine, monkeypatch) -> None:
    shown = Page(browser, served.url)
    shown.until(lambda: shown.text("#served") == "tiny" and shown.text("#state") == "ready")
    shown.settings(temperature=0, most=12, system="be brief")
    steps = Steps(engine.loop, monkeypatch)
    question = "hello <img src=x onerror=alert(1)> there"
    shown.ask(question)
    steps.allow(5)
    shown.until(lambda: len(shown.text(f"{ANSWER} .text")) > 1)
    assert shown["#stop"].is_displayed() and not shown["#send"].is_displayed()
    shown.until(lambda: shown.text("#running") == "1" and int(shown.text("#pages")) > 0)
    half = shown.text(f"{ANSWER} .text")
    steps.allow(100)
    shown.until(lambda: "tokens" in shown.text(f"{ANSWER} .about"))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 12}
    own = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()["choices"][0]
    assert shown.text(f"{ANSWER} .text") == own["message"]["content"] != half
    assert shown.text("article.asked .text") == question
    shown.until(lambda: shown.text("#running") == "0" and float(shown.text("#rate")) > 0)
    assert "," in shown["#rate-chart polyline"].get_attribute("points")
    # Nothing was fetched from elsewhere, no policy was broken, no markup came of text.
    script = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert all(name.startswith(served.url) for name in browser.execute_script(script))
    assert not browser.get_log("browser")
    assert not browser.execute_script("return document.querySelectorAll('img').length")
    shown["#new"].click()
    assert shown["#empty"].is_displayed() and not shown.text("article")


def test_stop_ends_the_answer_on_the_server_too(browser, served, engine, monkeypatch) -> None:
    from selenium.webdriver.common.keys import Keys

    shown = Page(browser, served.url)
    shown.settings(temperature=0, most=200)
    steps = Steps(engine.loop, monkeypatch)
    shown["#question"].send_keys("hello", Keys.SHIFT, Keys.ENTER, Keys.NULL, "there", Keys.ENTER)
    steps.allow(4)
    shown.until(lambda: len(shown.text(f"{ANSWER} .text")) > 1)
    assert shown.text("article.asked .text") == "hello\nthere"
    shown["#stop"].click()
    shown.until(lambda: shown.text(f"{ANSWER} .about") == "Stopped.")
    assert shown["#send"].is_displayed() and not shown["#stop"].is_displayed()
    before = engine.loop.counters.sampled_tokens
    steps.allow(1000)
    shown.until(lambda: not served.service.worker.active)
    assert engine.loop.counters.sampled_tokens - before < 100
    assert browser.execute_script("return document.activeElement.id") == "question"


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser, serve) -> None:
    with serve(keys=("right",)) as server:
        shown = Page(browser, server.url)
        shown.until(lambda: shown.text("#wrong") == "The server asks for a key.")
        shown.fill("key", "wrong")
        shown[".ends button"].click()
        shown.until(lambda: shown.text("#wrong") == "The server does not take this key.")
        shown.until(lambda: browser.execute_script("return document.activeElement.id") == "key")
        shown["#temperature"].send_keys("\ue00c")  # Escape: the dialog may be left as it is
        shown.until(lambda: not shown["#settings"].is_displayed())
        shown.ask("hello there")
        shown.until(lambda: "the key is missing or wrong" in shown.text(f"{ANSWER} .bad"))
        shown["article .bad button"].click()
        shown.fill("most", 3)
        shown.fill("key", "right")
        shown[".ends button"].click()
        shown.until(lambda: "token" in shown.text(f"{ANSWER} .about"))
        kept = "return JSON.stringify(localStorage) + document.cookie + location.href"
        assert "right" not in browser.execute_script(kept)
        assert browser.execute_script("return sessionStorage.length") == 1


def test_a_limit_says_when_to_come_back(browser, serve) -> None:
    with serve(limits=Limits(per_minute=1)) as server:
        shown = Page(browser, server.url)
        shown.settings(most=2)
        shown.ask("hello there")
        shown.until(lambda: "token" in shown.text(f"{ANSWER} .about"))
        shown.ask("again")
        shown.until(lambda: "Try again in" in shown.text(f"{ANSWER} .bad button"))
        assert "1 times a minute" in shown.text(f"{ANSWER} .bad span")
        assert not shown[f"{ANSWER} .bad button"].is_enabled()
        server.server.should_exit = True
        server.thread.join(30)
        shown.until(lambda: shown.text("#state") == "not reachable")


def _named(shown: Page, within: str) -> int:
    """How many controls there are, each of which says what it is to who cannot see it."""
    from selenium.webdriver.common.by import By

    controls = ", ".join(f"{within} {tag}" for tag in ("button", "input", "textarea"))
    seen = [c for c in shown.browser.find_elements(By.CSS_SELECTOR, controls) if c.is_displayed()]
    assert all(one.accessible_name for one in seen)
    return len(seen)


def test_everything_has_a_name_and_room_on_a_telephone(browser, served) -> None:
    shown = Page(browser, served.url)
    browser.set_window_size(500, 800)  # the least that Chromium takes
    try:
        wide = "return document.documentElement.scrollWidth - innerWidth"
        assert browser.execute_script(wide) <= 0 and _named(shown, "body") >= 7
        shown["#set"].click()
        assert browser.execute_script(wide) <= 0 and _named(shown, "dialog") >= 5
    finally:
        browser.set_window_size(1280, 800)


def test_the_page_is_one_file_under_a_strict_policy(served) -> None:
    found = httpx.get(served.url)
    text, policy = page()
    assert found.text == text and found.headers["content-security-policy"] == policy
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "innerHTML" not in text and "http://" not in text.replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert "https://" not in text and " onclick" not in text and " style=" not in text
    assert httpx.head(served.url).status_code == 200
    figures = httpx.get(f"{served.url}/stats").json()
    assert 0 <= figures["pages_used"] <= figures["pages"] and figures["uptime"] > 0


@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_without_a_browser_a_test_is_skipped_but_not_in_ci(
    monkeypatch, tmp_path, ci, outcome
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="apt-get install"), chromium(tmp_path):
        pass
