"""Checkouts as something to run: whose code an import gets, and what its digest is of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from house.tree import ROOT
from small_checkouts import small_checkout
from tilewright.compiler.regress.checkout import PACKAGE, Checkout, run_in
from tilewright.compiler.regress.timing.package import Package
from tilewright.errors import EngineError, UsageError

WHO = "import tilewright, json\nprint(json.dumps([tilewright.__file__, tilewright.who.NAME]))"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.quick
def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(UsageError, match="found nothing there. Make one: git worktree add"):
        Checkout.at(tmp_path / "none")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="no __init__.py and no compiler/regress"):
            Checkout.at(folder)
    (tmp_path / "__init__.py").write_text("")
    with pytest.raises(UsageError, match="found no compiler/regress"):
        Checkout.at(tmp_path)
    assert Checkout.at(ROOT) == Checkout.running()


@pytest.mark.quick
def test_the_digest_is_of_the_package_and_of_nothing_else(tmp_path):
    checkout = small_checkout(tmp_path / "a-1", who="NAME = 1")
    digest = checkout.digest
    assert small_checkout(tmp_path / "b", who="NAME = 1").digest == digest

    def changed(name: str, text: str = "x") -> bool:
        path = checkout.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_text() if path.exists() else None
        path.write_text(text)
        found = checkout.digest != digest
        path.unlink() if old is None else path.write_text(old)
        assert checkout.digest == digest
        return found

    package = ("who.py", "new.py", "errors.py", "compiler/regress/new/deep.py")
    others = ("formats/table.jsonl", "compiler/regress/page.css", "compiler/cache/x.txt")
    for name in (*package, *others):
        assert changed(name), name
    (checkout.root / "tests").mkdir()
    (checkout.root / "tests" / "__init__.py").write_text("")
    outside = ("tests/test_x.py", "notes.txt", ".venv/lib/x.py", "weights/model.bin", "a/b.py")
    for name in (*outside, "formats/__pycache__/hashing.pyc", "formats/.hashing.py.swp"):
        assert not changed(name), name
    os.symlink("nowhere", checkout.root / "formats" / "dangling.py")
    assert checkout.digest == digest


@pytest.mark.parametrize("name", ["a-1", "tilewright", "with space"])
def test_an_import_gets_the_checkout_whatever_its_folder_is_called(tmp_path, monkeypatch, name):
    checkout = small_checkout(tmp_path / name, who="NAME = 7", main="from . import who")
    # Neither the folder a process starts in nor a relative entry of the path may come before it.
    for folder in (tmp_path / "here", tmp_path / "rel"):
        small_checkout(folder / PACKAGE, who="NAME = 8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "rel", *sys.path])
    code = f"import tilewright.who\n{WHO}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=checkout.environment(),
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
        check=True,
    )
    file, who = json.loads(done.stdout)
    assert (Path(file).resolve(), who) == (checkout.root / "__init__.py", 7)


def test_run_in_runs_that_code_and_hands_back_how_it_ended(tmp_path, monkeypatch):
    text = "import os, sys\nprint(sys.argv[1:], os.environ['MORE'])\nsys.exit('no luck')"
    checkout = small_checkout(tmp_path / "a-1", talk=text)
    small_checkout(tmp_path / "tmp" / PACKAGE, talk="print('another')")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))  # where it is started
    done = run_in(checkout, "talk", ["one", "two words"], {"MORE": "x"})
    assert (done.returncode, done.stdout) == (1, "['one', 'two words'] x\n")
    assert done.stderr == "no luck\n"


def test_the_link_follows_a_checkout_and_stands_alone(tmp_path, cache):
    one = small_checkout(tmp_path / "one", who="NAME = 1")
    two = small_checkout(tmp_path / "two", who="NAME = 2")

    def link(checkout):
        return Path(checkout.environment()["PYTHONPATH"].split(os.pathsep)[0]) / PACKAGE

    first = link(one)
    assert first.resolve() == one.root and link(two) != first
    assert [path.name for path in first.parent.iterdir()] == [PACKAGE]
    first.unlink()
    first.symlink_to(two.root)  # of a checkout that was moved, and another put in its place
    assert link(one) == first and first.resolve() == one.root
    first.unlink()
    first.symlink_to(tmp_path / "gone")
    assert link(one).resolve() == one.root
    assert [path.name for path in first.parent.iterdir()] == [PACKAGE]


def test_a_copy_within_another_repository_has_no_commit(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    commit = ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--allow-empty"]
    subprocess.run(["git", "-C", str(tmp_path), *commit, "-qm", "one"], check=True)
    assert small_checkout(tmp_path / "copy").commit is None
    assert small_checkout(tmp_path).commit is not None


@pytest.fixture
def named():
    """Packages that a test imports, forgotten afterwards."""
    names: list[str] = []
    yield lambda root, name: names.append(name) or Package(root, name)
    for loaded in [n for n in sys.modules if n.split(".")[0] in names]:
        del sys.modules[loaded]


@pytest.mark.quick
def test_two_versions_side_by_side_stay_apart(tmp_path, named):
    text = "from .errors import UsageError\nclass Thing:\n    pass\nFAULT = UsageError"
    sides = []
    for name in ("a-1", "b-2"):
        root = small_checkout(tmp_path / name, who=f"NAME = {name!r}\n", thing=text).root
        sides.append(named(root, f"side_{name[0]}"))
    old, new = (side.module("thing") for side in sides)
    assert old.Thing is not new.Thing and old.FAULT is not new.FAULT is not UsageError
    assert [side.module("who").NAME for side in sides] == ["a-1", "b-2"]
    assert old.FAULT is sides[0].module("errors").UsageError
    assert old.FAULT.__module__ == "side_a.errors"
    assert named(sides[0].root, "side_a").module("thing") is old


@pytest.mark.parametrize(
    ("init", "said"),
    [
        (None, "FileNotFoundError"),
        ("import no_such_module", "no_such_module"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('not today')", "RuntimeError: not today"),
    ],
)
def test_code_that_cannot_be_imported_is_named_and_forgotten(tmp_path, named, init, said):
    root = small_checkout(tmp_path / "old").root
    (root / "__init__.py").unlink()
    if init is not None:
        (root / "__init__.py").write_text(init)
    for _ in range(2):  # half of a module must not stand for it the second time
        with pytest.raises(EngineError, match=f"{root}.*{said}"):
            named(root, "side_broken")
        assert "side_broken" not in sys.modules


def test_modules_and_names_that_do_not_fit_are_refused(tmp_path, named):
    root = small_checkout(tmp_path / "old", bad="import no_such_module", worse="1 / 0").root
    package = named(root, "side_old")
    for module, said in (("bad", "no_such_module"), ("worse", "ZeroDivision"), ("none", "none")):
        with pytest.raises(EngineError, match=said):
            package.module(module)
    other = small_checkout(tmp_path / "other").root
    with pytest.raises(EngineError, match=f"side_old imported from {root}"):
        named(other, "side_old")
    assert Package(ROOT, PACKAGE).module("errors").UsageError is UsageError
