"""A headless Chromium, driven by Selenium, and the server's page as a person uses it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
)


@contextmanager
def chromium(profile: Path, *flags: str) -> Iterator[object]:
    """A browser with an empty profile. Without one the test is skipped; in CI it fails."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "no Chromium with its chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={profile}", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, Service(driver))
    try:
        yield found
    finally:
        found.quit()


class Page:
    """What a person does on the page, and what they see."""

    def __init__(self, browser, url: str) -> None:
        self.browser = browser
        browser.get(url)
        browser.execute_script("sessionStorage.clear()")
        browser.get_log("browser")  # of the page before
        browser.refresh()

    def __getitem__(self, selector: str):
        from selenium.webdriver.common.by import By

        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return self.browser.execute_script(script, selector)

    def until(self, condition, seconds: float = 20):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.browser, seconds, 0.05).until(lambda _: condition())

    def fill(self, name: str, value: object) -> None:
        self[f"#{name}"].clear()
        self[f"#{name}"].send_keys(str(value))

    def settings(self, **values: object) -> None:
        self["#set"].click()
        for name, value in values.items():
            self.fill(name, value)
        self[".ends button"].click()

    def ask(self, question: str) -> None:
        self["#question"].send_keys(question)
        self["#send"].click()
