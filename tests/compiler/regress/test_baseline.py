"""Baselines on disk: what is written is read, and what is damaged or halfway is refused."""

from __future__ import annotations

import json

import pytest

from regress_suites import GRAPH, HEAD, kernel, snapshot, suite_of
from tilewright.compiler.regress import baseline as module
from tilewright.compiler.regress.baseline import read_baseline, write_baseline
from tilewright.compiler.regress.snapshot import Snapshot, numbered, plain_name
from tilewright.errors import UsageError

KEY = ("norm", "h100")


@pytest.fixture
def suite(tmp_path):
    return suite_of(tmp_path, HEAD + GRAPH)


@pytest.fixture
def one(suite):
    return snapshot(suite.cases[0].definition, kernel(), kernel("mul_00ff", "2" * 64))


@pytest.mark.quick
def test_a_baseline_reads_back_and_says_where_it_came_from(tmp_path, suite, one):
    folder = tmp_path / "base"
    write_baseline(folder, suite, {KEY: one}, " because ")
    found = read_baseline(folder)
    assert found is not None
    assert found.snapshots == {KEY: one}
    assert (found.side.reason, found.suite_digest) == ("because", suite.digest)
    assert found.side.versions == one.versions
    assert (folder / "kernels" / f"{kernel().id}.txt").read_text() == kernel().text
    assert read_baseline(tmp_path / "none") is None
    assert Snapshot.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_new_baseline_replaces_the_old_one_as_a_whole(tmp_path, suite, one):
    folder = tmp_path / "base"
    write_baseline(folder, suite, {KEY: one}, "first")
    later = snapshot(suite.cases[0].definition, kernel(digest="3" * 64))
    write_baseline(folder, suite, {KEY: later}, "second")
    assert [path.name for path in (folder / "kernels").iterdir()] == ["add_ab12-33333333.txt"]


def test_an_interrupted_record_leaves_the_old_baseline(tmp_path, suite, one, monkeypatch):
    folder = tmp_path / "base"
    write_baseline(folder, suite, {KEY: one}, "first")
    real = module._json

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_baseline(folder, suite, {KEY: one}, "second")
    monkeypatch.setattr(module, "_json", real)
    monkeypatch.setattr(module.Path, "write_bytes", interrupted)  # with the new folder half full
    with pytest.raises(KeyboardInterrupt):
        write_baseline(folder, suite, {KEY: one}, "third")
    monkeypatch.undo()
    found = read_baseline(folder)
    assert found is not None
    assert found.side.reason == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "suite.toml"]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("manifest.json", "{"),
        ("manifest.json", "{}"),
        ("manifest.json", '{"format": 99}'),
        ("norm.h100.json", "{}"),
        ("norm.h100.program.json", "<<<<<<< ours"),
        ("kernels/add_ab12-11111111.txt", "x = 2"),
        ("kernels/add_ab12-11111111.txt", None),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, suite, one, path, content):
    folder = tmp_path / "base"
    write_baseline(folder, suite, {KEY: one}, "first")
    if content is None:
        (folder / path).unlink()
    else:
        (folder / path).write_text(content)
    with pytest.raises(UsageError, match="version control.*record") as caught:
        read_baseline(folder)
    assert str(folder) in caught.value.culprit


def test_what_may_not_be_recorded(tmp_path, suite, one, monkeypatch):
    folder = tmp_path / "base"
    with pytest.raises(UsageError, match="reason"):
        write_baseline(folder, suite, {KEY: one}, " ")
    with pytest.raises(UsageError, match="none of norm on h100"):
        write_baseline(folder, suite, {}, "part")
    with pytest.raises(UsageError, match="a folder of other files"):
        write_baseline(tmp_path, suite, {KEY: one}, "where the suite lies")
    monkeypatch.setenv("TILEWRIGHT_PASS_LIMIT", "3")
    with pytest.raises(UsageError, match="TILEWRIGHT_PASS_LIMIT"):
        write_baseline(folder, suite, {KEY: one}, "half a pipeline")
    assert not folder.exists()


@pytest.mark.quick
def test_names_without_hashes():
    assert plain_name("add_rms_norm_29ba-f70e9161") == "add_rms_norm"
    assert plain_name("rope_append_kv-5ddcf7d0") == "rope_append_kv"
    assert plain_name("linear") == "linear"
    names = ["a_c953-00000001", "b-00000002", "a_618f-00000003", "a_c953-00000001"]
    assert list(numbered(names).values()) == ["a", "b", "a#2"]
