"""The tables that come with the package: readable, of templates as they are now, never worse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import tilewright
from tilewright.autotune.record import Record
from tilewright.autotune.store import Store
from tilewright.codegen.triton.tuning.registry import TEMPLATES
from tilewright.targets import Target

TABLES = sorted((Path(tilewright.__file__).parent / "autotune" / "tables").glob("*.jsonl"))
MOST_STALE = 0.2


def records(path: Path) -> tuple[Record, ...]:
    return Store(path).records()


def test_there_is_one_for_each_measured_device() -> None:
    assert [path.stem for path in TABLES] == ["h100", "h200"]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_line_is_a_record_of_the_device(path: Path) -> None:
    found = records(path)
    assert len(found) == len(path.read_text(encoding="utf-8").splitlines())
    assert {record.key.device for record in found} == {path.stem}
    assert Target.parse(path.stem).arch == found[0].key.arch


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_few_rows_are_stale(path: Path) -> None:
    hashes = {template.name: template.code_hash for template in TEMPLATES}
    found = records(path)
    stale = [r for r in found if hashes.get(r.key.template) != r.key.template_hash]
    assert len(stale) <= MOST_STALE * len(found), (
        f"{len(stale)} of {len(found)} rows of {path.name} are of other code of their templates: "
        "make the table anew on such a device, with tilewright tune"
    )


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_no_choice_is_slower_than_the_default(path: Path) -> None:
    gains = [record.default_seconds / record.seconds for record in records(path)]
    assert min(gains) >= 0.99
    assert math.exp(sum(map(math.log, gains)) / len(gains)) > 1.03
