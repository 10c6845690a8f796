"""A lookup says which record serves and by which rule, and a miss names what differs."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.autotune.distance import device_distance, problem_distance
from tilewright.autotune.key import Conditions, Key
from tilewright.autotune.lookup import explain, lookup, neighbours
from tilewright.autotune.store import Store
from tuning_records import CONDITIONS, KEY, problem, record


@pytest.fixture
def store(tmp_path):
    table = tmp_path / "shipped.jsonl"
    table.touch()
    return Store(tmp_path / "own.jsonl", shipped=[table])


def ship(store, *records):
    text = "".join(r.line + "\n" for r in records)
    store.shipped()[0][0].write_text(text)


def tokens(n, **changes):
    return replace(KEY, problem=problem(tokens=n), **changes)


CHANGES = {  # field → (another value, as it is named, by which rule the record still serves)
    "template": ("gemm", "template", "miss"),
    "template_hash": ("c" * 64, "template_hash", "miss"),
    "space_hash": ("c" * 64, "space_hash", "miss"),
    "problem": (problem(dtype="float16"), "problem.dtype", "miss"),
    "device": ("h200", "device", "neighbour"),
    "arch": (100, "arch", "miss"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CHANGES)
def test_any_other_field_of_the_key_is_no_hit_and_is_named(store, name):
    assert set(CHANGES) == {f.name for f in fields(Key)}
    value, named, how = CHANGES[name]
    store.add(record())
    assert lookup(store, KEY, CONDITIONS).how == "exact"
    found = lookup(store, replace(KEY, **{name: value}), CONDITIONS)
    assert (found.how, found.differs, found.nearest) == (how, (named,), record())
    assert found.record == (None if how == "miss" else record())
    assert f"\n    {named}: asked " in explain(found)
    assert ("miss" if how == "miss" else f"hit ({how})") in explain(found)


@pytest.mark.quick
@pytest.mark.parametrize("absent", [True, False])
def test_a_problem_of_other_names_is_a_miss(store, absent):
    more = (*KEY.problem, ("bias", 1))
    store.add(record(key=replace(KEY, problem=KEY.problem if absent else more)))
    found = lookup(store, replace(KEY, problem=more if absent else KEY.problem), CONDITIONS)
    assert (found.how, found.differs) == ("miss", ("problem.bias",))
    assert "none" in explain(found)


@pytest.mark.quick
@pytest.mark.parametrize("name", [f.name for f in fields(Conditions)])
def test_other_conditions_make_a_stale_hit_with_a_warning(store, name):
    store.add(record())
    found = lookup(store, KEY, replace(CONDITIONS, **{name: "9.9"}))
    assert (found.how, found.record, found.differs) == ("stale", record(), (name,))
    recorded = getattr(CONDITIONS, name)
    assert f"{name}: asked 9.9, recorded {recorded}" in found.warning
    assert f"{name}: asked 9.9, recorded {recorded}" in explain(found)
    assert lookup(store, KEY, CONDITIONS).warning is None


@pytest.mark.quick
def test_an_unknown_driver_finds_the_newest_of_any(store):
    store.add(record(32, made="2026-02-01"))
    newer = replace(CONDITIONS, driver="590")
    store.add(record(64, conditions=newer, made="2026-03-01"))
    store.add(record(16, conditions=replace(CONDITIONS, driver="570"), made="2026-01-01"))
    found = lookup(store, KEY, replace(CONDITIONS, driver=None))
    assert (found.how, found.record.conditions) == ("exact", newer)


@pytest.mark.quick
def test_the_chain_falls_back_one_rule_at_a_time(store):
    """Each record serves only where those before it are gone."""
    other = replace(CONDITIONS, triton="3.5.0")
    chain = [
        ("exact", record(1)),
        ("shipped", record(2)),
        ("stale", record(4, conditions=other)),
        ("bucket", record(8, key=tokens(128))),
        ("neighbour", record(16, key=replace(KEY, device="h200"))),
        ("miss", record(32, key=replace(KEY, template_hash="c" * 64))),
    ]
    for start in range(len(chain)):
        store.path.unlink(missing_ok=True)
        ship(store, *(r for how, r in chain[start:] if how == "shipped"))
        for how, r in reversed(chain[start:]):
            if how != "shipped":
                store.add(r)
        found = lookup(store, KEY, CONDITIONS)
        assert (found.how, found.nearest) == chain[start]
        assert found.shipped == (found.how == "shipped")
        assert found.source == (store.shipped()[0][0] if found.shipped else store.path)
        assert str(found.source) in explain(found)
        data = json.loads(json.dumps(found.to_json()))
        assert (data["how"], data["source"]) == (found.how, str(found.source))
        assert (data["record"] is None) == (found.how == "miss")


@pytest.mark.quick
def test_an_empty_store_misses_without_a_nearest(store):
    found = lookup(store, KEY, CONDITIONS)
    assert (found.record, found.how, found.differs, found.nearest) == (None, "miss", (), None)
    assert "holds no records" in explain(found)
    assert json.loads(json.dumps(found.to_json()))["nearest"] is None


@pytest.mark.quick
def test_the_nearest_size_is_by_ratio(store):
    for n in (1, 32, 256, 8192):
        store.add(record(n, key=tokens(n)))
    nearest = {1: 1, 4: 1, 16: 32, 64: 32, 128: 256, 1024: 256, 4096: 8192}
    for asked, expected in nearest.items():
        found = lookup(store, tokens(asked), CONDITIONS)
        assert dict(found.record.key.problem)["tokens"] == expected
        assert found.how == ("exact" if asked == expected else "bucket")
    assert lookup(store, tokens(64), CONDITIONS).distance == 1.0
    assert "nearest problem" in explain(lookup(store, tokens(64), CONDITIONS))


@pytest.mark.quick
def test_the_nearest_device_of_the_architecture_is_taken(store):
    cut = "h100:sms=114"
    store.add(record(1, key=replace(KEY, device="h200")))
    store.add(record(2, key=replace(KEY, device="a-board-that-no-table-has")))
    store.add(record(4, key=replace(KEY, device=cut)))
    store.add(record(8, key=replace(KEY, device="a100", arch=80)))
    found = lookup(store, KEY, CONDITIONS)
    assert (found.how, found.record.key.device) == ("neighbour", cut)
    assert found.differs == ("device",)


@pytest.mark.quick
def test_distances_are_symmetric_and_count_factors_of_two():
    assert device_distance("h100", "h100") == 0
    assert 0 < device_distance("h100", "h200") < device_distance("h100", "l4")
    assert device_distance("h100", "l4") == device_distance("l4", "h100")
    assert device_distance("h100", "unheard-of") > device_distance("b200", "l4")
    assert problem_distance(KEY, tokens(512)) == problem_distance(tokens(512), KEY) == 3
    assert problem_distance(tokens(0), tokens(1)) == 0


@pytest.mark.quick
def test_on_a_miss_the_nearest_is_of_the_same_template(store):
    store.add(record(1, key=replace(KEY, template="gemm")))
    store.add(record(2, key=tokens(128, template_hash="c" * 64, space_hash="c" * 64)))
    found = lookup(store, KEY, CONDITIONS)
    assert found.how == "miss"
    assert found.differs == ("template_hash", "space_hash", "problem.tokens")
    text = explain(found)
    assert "asked aaaaaaaaaaaa, recorded cccccccccccc" in text
    assert "block_m=2 num_warps=8" in text
    assert "10.00 us, the default 12.50 us (1.25 times as long)" in text


@given(st.permutations(range(6)))
def test_the_order_of_the_lines_does_not_matter(tmp_path_factory, order):
    """Ties too are broken by what the records say."""
    rs = [
        record(8, key=tokens(128)),
        record(16, key=tokens(32)),
        record(32, key=tokens(32), conditions=replace(CONDITIONS, driver="590")),
        record(64, key=replace(KEY, device="h200")),
        record(2, key=replace(KEY, device="h100:sms=114")),
        record(4, key=replace(KEY, template="gemm")),
    ]
    path = tmp_path_factory.mktemp("order") / "s.jsonl"
    path.write_text("".join(rs[i].line + "\n" for i in order))
    found = lookup(Store(path), KEY, CONDITIONS)
    assert (found.how, found.record) == ("bucket", rs[0])
    assert [c["block_m"] for c in neighbours(Store(path), KEY, 3)] == [2, 64, 8]


@pytest.mark.quick
def test_neighbours_are_the_nearest_comparable_and_each_config_comes_once(store):
    store.add(record(32, key=tokens(8)))
    store.add(record(32, key=tokens(32)))
    store.add(record(16, key=tokens(256)))
    store.add(record(8, key=tokens(4096)))
    store.add(record(4, key=tokens(64, arch=100)))
    store.add(record(1, conditions=replace(CONDITIONS, version="0.0.1")))
    assert [c["block_m"] for c in neighbours(store, KEY)] == [1, 32, 16]
    assert [c["block_m"] for c in neighbours(store, KEY, 9)] == [1, 32, 16, 8]
    assert neighbours(store, replace(KEY, template="gemm")) == ()


@pytest.mark.quick
def test_an_unwritable_store_still_looks_up(tmp_path):
    table = tmp_path / "shipped.jsonl"
    table.write_text(record().line + "\n")
    store = Store(table / "own.jsonl", shipped=[table])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert lookup(store, KEY, CONDITIONS).how == "shipped"
