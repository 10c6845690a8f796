"""The environment switches: defaults, each value, each refusal."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from tilewright import settings
from tilewright.errors import UsageError

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    for name in list(os.environ):
        if name.startswith(settings.PREFIX):
            monkeypatch.delenv(name)


def test_defaults():
    assert settings.current() == settings.Settings(
        debug=0,
        dump=None,
        pass_limit=None,
        cache=Path.home() / ".cache" / "tilewright",
        verify=None,
        threads=None,
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("debug", "0", 0),
        ("debug", "5", 5),
        ("dump", "out/dump", Path("out/dump")),
        ("dump", "~/dump", Path.home() / "dump"),
        ("pass_limit", "0", 0),
        ("pass_limit", "17", 17),
        ("cache", "~/c", Path.home() / "c"),
        *(("verify", level, level) for level in settings.VERIFY_LEVELS),
        ("threads", "2", 2),
    ],
)
def test_a_value_is_read_when_asked_for(monkeypatch, name, text, value):
    monkeypatch.setenv(settings.PREFIX + name.upper(), text)
    assert getattr(settings.current(), name) == value


@pytest.mark.parametrize("switch", settings.SWITCHES, ids=lambda s: s.name)
def test_an_empty_value_is_the_default(monkeypatch, switch):
    expected = settings.current()
    monkeypatch.setenv(switch.name, "")
    assert settings.current() == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("TILEWRIGHT_DEBUG", "6"),
        ("TILEWRIGHT_DEBUG", "-1"),
        ("TILEWRIGHT_DEBUG", "yes"),
        ("TILEWRIGHT_PASS_LIMIT", "-1"),
        ("TILEWRIGHT_PASS_LIMIT", "1.5"),
        ("TILEWRIGHT_VERIFY", "loud"),
        ("TILEWRIGHT_THREADS", "0"),
        ("TILEWRIGHT_THREADS", "all"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_accepted(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(UsageError) as caught:
        settings.current()
    assert name in caught.value.culprit
    assert repr(text) == caught.value.found


def test_a_bad_verify_level_lists_the_valid_ones(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_VERIFY", "loud")
    with pytest.raises(UsageError, match="off | structure | sample | full"):
        settings.current()


def test_an_unknown_switch_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_DEBUGG", "1")
    with pytest.raises(UsageError) as caught:
        settings.current()
    assert "TILEWRIGHT_DEBUGG" in caught.value.culprit
    assert all(switch.name in caught.value.expected for switch in settings.SWITCHES)


def test_the_registry_is_small_and_matches_the_settings():
    assert len(settings.SWITCHES) < 15
    names = [switch.name.removeprefix(settings.PREFIX).lower() for switch in settings.SWITCHES]
    assert names == [field.name for field in dataclasses.fields(settings.Settings)]


def test_the_table_shows_each_switch_and_its_value(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_THREADS", "2")
    lines = settings.describe().splitlines()
    assert len(lines) == len(settings.SWITCHES) + 1
    for switch, line in zip(settings.SWITCHES, lines[1:], strict=True):
        assert line.startswith(switch.name)
        assert switch.meaning in line
    assert any(line.split()[:2] == ["TILEWRIGHT_THREADS", "2"] for line in lines)


def test_no_module_reads_a_switch_past_the_registry():
    from house.tree import sources

    past = [s.path for s in sources() if s.path != "settings.py" and "TILEWRIGHT_" in s.text]
    assert not [path for path in past if _reads_environment(path)]


def _reads_environment(path: str) -> bool:
    from house.tree import ROOT

    text = (ROOT / path).read_text("utf-8")
    return any(f"{call}TILEWRIGHT_" in text for call in ('environ["', 'environ.get("', 'getenv("'))
