"""A store keeps what is added, whoever else adds, and uses what is left of a damaged one."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.autotune.lines import append_lines, locked
from tilewright.autotune.merge import Merged, merge
from tilewright.autotune.record import Record
from tilewright.autotune.store import Store
from tilewright.errors import UsageError
from tuning_records import CONDITIONS, KEY, problem, record, records

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


store_writers = load("store_writers")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "h100.jsonl"


def of_tokens(tokens, *, tag="", **changes):
    return record(
        key=replace(KEY, template=f"linear{tag}", problem=problem(tokens=tokens)), **changes
    )


@given(records)
def test_records_survive_their_line(r):
    assert "\n" not in r.line
    assert Record.from_json(json.loads(r.line)) == r
    assert Record.from_json(json.loads(r.line)).line == r.line


@given(st.lists(records, max_size=5))
def test_a_store_gives_back_the_last_of_each(tmp_path_factory, rs):
    path = tmp_path_factory.mktemp("store") / "s.jsonl"
    for r in rs:
        Store(path).add(r)
    last = {r.identity: r for r in rs}
    assert {r.identity: r for r in Store(path).records()} == last
    store = Store(path)
    assert store.compact() == len(rs) - len(last)
    assert set(store.records()) == set(last.values())
    assert len(path.read_bytes().splitlines()) == len(last)


@pytest.mark.quick
def test_a_store_sees_what_others_add(path):
    store, other = Store(path), Store(path)
    assert store.records() == ()
    other.add(record(64))
    assert store.records() == (record(64),)
    assert store.records() is store.records()  # read once for each state of the file
    other.add(record(32))
    assert store.records() == (record(32),)
    elsewhere = record(16, conditions=replace(CONDITIONS, driver="590"))
    other.add(elsewhere)
    assert store.records() == (record(32), elsewhere)


DAMAGE = [
    b"{",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b"[" * 100_000,
    record().line.encode()[:-9],
    json.dumps({**record().to_json(), "more": 1}).encode(),
    json.dumps({**record().to_json(), "seconds": -1.0}).encode(),
    record().line.replace("1e-05", "NaN").encode(),
    json.dumps({**record().to_json(), "made": "yesterday"}).encode(),
    json.dumps({**record().to_json(), "trials": "many"}).encode(),
    json.dumps({**record().to_json(), "config": {"block_m": [1]}}).encode(),
]


@pytest.mark.quick
@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line_is_set_aside_with_one_warning(path, damage):
    first, second = of_tokens(1), of_tokens(2)
    Store(path).add(first)
    with path.open("ab") as file:
        file.write(damage + b"\n\n")
    Store(path).add(second)
    with pytest.warns(UserWarning, match="set aside in h100.jsonl.damaged") as caught:
        assert Store(path).records() == (first, second)
    assert len(caught) == 1
    assert "line 2: " in str(caught[0].message)
    assert path.with_name("h100.jsonl.damaged").read_bytes() == damage + b"\n"
    assert path.read_text().splitlines() == [first.line, second.line]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Store(path).records() == (first, second)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "h100.jsonl",
        "h100.jsonl.damaged",
        "h100.jsonl.lock",
    ]


@pytest.mark.quick
def test_a_torn_line_costs_itself_only(path):
    Store(path).add(of_tokens(1))
    with path.open("ab") as file:
        file.write(of_tokens(2).line.encode()[:50])
    Store(path).add(of_tokens(4))
    with pytest.warns(UserWarning, match="line 2: "):
        assert Store(path).records() == (of_tokens(1), of_tokens(4))


@pytest.mark.quick
def test_a_line_in_the_writing_is_no_damage(path, monkeypatch):
    """The reader waits for the lock before it judges what looks torn."""
    line, found, waiting = of_tokens(2).line.encode(), [], threading.Event()
    Store(path).add(of_tokens(1))

    def seen(path):
        waiting.set()
        return locked(path)

    monkeypatch.setattr("tilewright.autotune.table.locked", seen)
    reader = threading.Thread(target=lambda: found.append(Store(path).records()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(path), path.open("ab", buffering=0) as file:
            file.write(line[:50])
            reader.start()
            assert waiting.wait(timeout=30)
            file.write(line[50:] + b"\n")
        reader.join(timeout=30)
    assert found == [(of_tokens(1), of_tokens(2))]


@pytest.mark.quick
def test_records_of_another_format_are_left_alone(path):
    Store(path).add(of_tokens(1))
    later = json.dumps({"format": 2, "what": "else"}).encode()
    with locked(path):
        append_lines(path, [later])
    store = Store(path)
    with pytest.warns(UserWarning, match="1 of its lines are of another format"):
        assert store.records() == (of_tokens(1),)
    store.add(of_tokens(1, seed=5))
    assert store.compact() == 1
    assert later in path.read_bytes().splitlines()


@pytest.mark.quick
def test_shipped_tables_are_read_and_never_written(path, tmp_path):
    table = tmp_path / "shipped.jsonl"
    table.write_text(of_tokens(1).line + "\n{\n")
    before = table.read_bytes()
    store = Store(path, shipped=[table, tmp_path / "absent.jsonl"])
    with pytest.warns(UserWarning, match="is skipped"):
        assert store.shipped()[0] == (table, (of_tokens(1),))
    assert store.shipped()[1][1] == store.records() == ()
    assert table.read_bytes() == before
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.quick
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    table = tmp_path / "shipped.jsonl"
    table.write_text(of_tokens(1).line + "\n")
    store = Store(table / "within" / "s.jsonl", shipped=[table])  # the parent is a file
    for act in (lambda: store.add(record()), store.compact, lambda: merge([table], store.path)):
        with pytest.raises(UsageError, match=r"within/s\.jsonl.*TILEWRIGHT_CACHE"):
            act()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert store.records() == ()
    assert store.shipped()[0][1] == (of_tokens(1),)


@pytest.mark.quick
def test_a_folder_in_the_place_of_the_file_counts_as_empty_and_is_not_written(path):
    path.mkdir(parents=True)
    store = Store(path)
    with pytest.warns(UserWarning, match="cannot be read .Is a directory.: it counts as empty"):
        assert store.records() == ()
    for act in (store.check_writable, lambda: store.add(record())):
        with pytest.raises(UsageError, match="Is a directory"):
            act()
    assert list(path.iterdir()) == []


@pytest.mark.quick
def test_whether_it_can_be_written_is_known_before_there_is_a_record(path, tmp_path):
    Store(path).check_writable()
    assert Store(path).records() == ()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="TILEWRIGHT_CACHE"):
        Store(file / "s.jsonl").check_writable()


@pytest.mark.quick
def test_what_cannot_be_mended_is_still_used(path, monkeypatch):
    """As on a file system that is mounted read-only; root may write everywhere else."""
    Store(path).add(of_tokens(1))
    with path.open("ab") as file:
        file.write(b"{\n")
    before = path.read_bytes()

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tilewright.autotune.table.locked", refuse)
    with pytest.warns(UserWarning, match=r"not set aside \(Read-only file system\)"):
        assert Store(path).records() == (of_tokens(1),)
    assert path.read_bytes() == before


@pytest.mark.quick
def test_a_failed_write_leaves_the_file_as_it_was(path, monkeypatch):
    store = Store(path)
    store.add(of_tokens(1))
    store.add(of_tokens(1, seed=1))
    before = path.read_bytes()
    real = os.write

    def half(descriptor, data):
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    for act in (lambda: store.add(of_tokens(2)), store.compact):
        with pytest.raises(UsageError, match="No space left"):
            act()
        assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["h100.jsonl", "h100.jsonl.lock"]


@pytest.mark.quick
def test_a_rewritten_file_keeps_its_mode_and_its_link(path, tmp_path):
    Store(path).add(of_tokens(1))
    Store(path).add(of_tokens(1, seed=1))
    path.chmod(0o664)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert Store(link).compact() == 1
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o664


@pytest.mark.quick
def test_without_locks_a_store_still_works(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    Store(path).add(of_tokens(1))
    assert Store(path).records() == (of_tokens(1),)


def test_two_processes_lose_nothing(path):
    """Both add, replace and compact for two seconds, while this process reads."""
    done = store_writers.run_writers(path, 2.0)
    assert done.wrong == ()
    assert done.found == sum(done.added) and done.replaced > 0 and done.reads > 0


@pytest.mark.quick
def test_the_check_sees_what_is_lost_replaced_or_damaged(path):
    for tag in "ab":
        for number in range(1, 8):
            Store(path).add(store_writers.made(tag, number, int(number == 7 and tag == "a")))
    whole = store_writers.checked(path, (7, 7), 0)
    assert whole.wrong == ("record 7 of writer b: an older version, or changed",)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))
    Store(path).add(store_writers.made("b", 7, 1))
    path.with_name("h100.jsonl.damaged").touch()
    found = store_writers.checked(path, (7, 6), 0).wrong
    assert found[0] == "record 1 of writer a: missing"
    assert "nobody wrote it" in found[1] and found[2] == "lines were damaged"


stamped = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 2)), unique_by=lambda t: t, max_size=8
)


@given(stamped, st.data())
def test_merging_is_commutative_and_idempotent(tmp_path_factory, found, data):
    folder = tmp_path_factory.mktemp("merge")
    # Distinct stamps: each record is of its own second.
    made = [
        of_tokens(tokens, seed=seed, made=f"2026-01-02T03:04:{second:02}")
        for second, (tokens, seed) in enumerate(found)
    ]
    cut = data.draw(st.integers(0, len(made)))
    parts = [folder / "a.jsonl", folder / "b.jsonl"]
    for part, content in zip(parts, (made[:cut], made[cut:]), strict=True):
        part.write_text("".join(r.line + "\n" for r in data.draw(st.permutations(content))))
    one, two = folder / "one.jsonl", folder / "two.jsonl"
    done = merge(parts, one)
    last = {r.identity: r for r in made}
    assert done == Merged(read=len(made), kept=len(last), damaged=0)
    assert {r.identity: r for r in Store(one).records()} == last
    text = one.read_bytes()
    merge(parts[::-1], two)
    assert two.read_bytes() == text
    assert merge([one], one).read == len(last)  # the target itself is not read twice
    for again in (parts, [two], []):
        merge(again, one)
        assert one.read_bytes() == text
    merge([parts[0]], parts[1])
    assert parts[1].read_bytes() == text


@pytest.mark.quick
def test_a_merged_file_is_sorted_by_number_and_moments_compare_across_zones(path, tmp_path):
    early = of_tokens(16, made="2026-01-02T12:00:00+09:00")
    late = of_tokens(16, seed=1, made="2026-01-02T04:00:00")
    for r in (of_tokens(128), late, early):
        Store(path).add(r)
    into = tmp_path / "into.jsonl"
    merge([path], into)
    assert Store(into).records() == (late, of_tokens(128))


@pytest.mark.quick
def test_merging_counts_damage_and_leaves_the_sources(path, tmp_path):
    into, later = tmp_path / "into.jsonl", b'{"format": 3}'
    path.parent.mkdir()
    path.write_bytes(of_tokens(1).line.encode() + b"\n{\n" + later + b"\n")
    into.write_text("}\n" + of_tokens(2).line + "\n")
    before = path.read_bytes()
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert merge([path], into) == Merged(read=2, kept=2, damaged=2)
    assert [("skipped" in str(w.message)) for w in caught] == [True, False]
    assert path.read_bytes() == before
    assert into.read_bytes().splitlines()[2] == later
    assert into.with_name("into.jsonl.damaged").read_text() == "}\n"
    for wrong in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="a file of tuning records"):
            merge([wrong], into)


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": 0.0},
        {"seconds": float("inf")},
        {"default_seconds": float("nan")},
        {"trials": -1},
        {"made": "soon"},
    ],
)
def test_a_record_that_could_not_be_read_back_is_not_made(wrong):
    with pytest.raises(UsageError, match="tuning record"):
        record(**wrong)
