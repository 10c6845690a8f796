"""Asking a store by facts: which problems match, and what is asked where none does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tilewright.autotune.lookup import explain
from tilewright.autotune.problem_facts import ask, parse_facts
from tilewright.autotune.store import Store
from tilewright.errors import UsageError
from tuning_records import CONDITIONS, KEY, problem, record

pytestmark = pytest.mark.quick


def tokens(n, **changes):
    return replace(KEY, problem=problem(tokens=n, **changes))


@pytest.fixture
def store(tmp_path):
    table = tmp_path / "shipped.jsonl"
    table.write_text(record(4, key=tokens(256)).line + "\n")
    store = Store(tmp_path / "own.jsonl", shipped=[table])
    store.add(record(1, key=tokens(64)))
    store.add(record(2, key=tokens(128)))
    store.add(record(8, key=tokens(64, dtype="float16")))
    return store


def asked(store, text="", *, template="linear", code=KEY.template_hash, device=("h100", 90)):
    return ask(
        store,
        template,
        parse_facts(text),
        template_hash=code,
        device=device,
        conditions=CONDITIONS,
    )


def test_facts_are_read_as_people_write_them():
    assert parse_facts("") == {}
    assert parse_facts("k=4096 n=6144,tokens=16") == {"k": "4096", "n": "6144", "tokens": "16"}
    assert parse_facts("behind='silu mul' before=") == {"behind": "silu mul", "before": ""}
    for wrong in ("k", "=3", "k=1 k=2", "behind='silu"):
        with pytest.raises(UsageError, match="shape"):
            parse_facts(wrong)


def test_any_subset_of_the_facts_selects_and_each_is_looked_up(store):
    found = asked(store, "dtype=bfloat16")
    sizes = [dict(one.key.problem)["tokens"] for one in found]
    assert sizes == [64, 128, 256]
    assert [one.how for one in found] == ["exact", "exact", "shipped"]
    assert len(asked(store)) == 4
    assert [one.record for one in asked(store, "tokens=64 dtype=float16")] == [
        record(8, key=tokens(64, dtype="float16"))
    ]


def test_a_problem_that_nobody_measured_names_the_nearest_and_what_differs(store):
    (found,) = asked(store, "tokens=100 dtype=bfloat16")
    assert (found.how, found.differs) == ("bucket", ("problem.tokens",))
    assert "problem.tokens: asked 100, recorded 128" in explain(found)
    (found,) = asked(store, "dtype=float8 tokens=64")
    assert (found.how, found.differs) == ("miss", ("problem.dtype",))
    assert "asked float8, recorded" in explain(found)


def test_other_code_and_another_device_are_said(store):
    (found,) = asked(store, "tokens=128", code="f" * 64)
    assert (found.how, found.differs) == ("miss", ("template_hash",))
    (found,) = asked(store, "tokens=128", device=("h200", 90))
    assert (found.how, found.differs) == ("neighbour", ("device",))
    assert asked(store, "tokens=128", device=None)[0].how == "exact"


def test_two_records_of_one_problem_are_one_question_about_this_code(store):
    older = replace(tokens(128), template_hash="c" * 64)
    store.add(record(16, key=older, made="2027-01-01"))
    (found,) = asked(store, "tokens=128")
    assert (found.how, found.record) == ("exact", record(2, key=tokens(128)))


def test_misuse_lists_what_there_is(store):
    with pytest.raises(UsageError, match="dtype, k, n, tokens.*'batch'"):
        asked(store, "batch=3")
    with pytest.raises(UsageError, match="a whole number"):
        asked(store, "tokens=many")
    assert asked(store, "batch=3", template="gemm") == []
