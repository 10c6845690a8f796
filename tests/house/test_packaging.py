"""pyproject.toml, constraints.txt and the tracked files agree with what is there."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest

import tilewright
from house.tree import ROOT, package_folders

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
# Joined here, so that this file does not hold what it looks for.
MACHINE_PATHS = tuple("/" + folder + "/" for folder in ("work", "root", "opt/wheels", "opt/pypi"))


def _stem(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def machine_paths(text: str) -> list[str]:
    """The absolute paths of one machine that a text names."""
    return [needle for needle in MACHINE_PATHS if needle in text]


@pytest.mark.quick
def test_the_packages_listed_are_the_folders_that_exist():
    relative = [
        f.relative_to(ROOT).parts for f in package_folders() if (f / "__init__.py").exists()
    ]
    found = sorted(".".join(("tilewright", *parts)) for parts in relative)
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == found, f"pyproject.toml: packages = {found}"


@pytest.mark.quick
def test_each_folder_with_modules_is_a_package():
    bare = [
        f for f in package_folders() if any(f.glob("*.py")) and not (f / "__init__.py").exists()
    ]
    assert not bare


@pytest.mark.quick
def test_the_version_is_said_once():
    assert PROJECT["project"]["version"] == tilewright.__version__


@pytest.mark.quick
def test_the_package_is_marked_as_typed():
    assert (ROOT / "py.typed").exists()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["tilewright"]


@pytest.mark.quick
def test_every_dependency_is_pinned():
    pins = (ROOT / "constraints.txt").read_text("utf-8").split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    asked = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    assert {_stem(r) for r in asked} <= {_stem(pin) for pin in pins}


@pytest.mark.quick
def test_no_tracked_file_names_a_path_of_one_machine():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    found = [
        f"{path.relative_to(ROOT)}: {needle}"
        for path in paths
        if path.is_file()
        for needle in machine_paths(path.read_text("utf-8", errors="replace"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.quick
def test_a_machine_path_is_found():
    assert machine_paths("see " + MACHINE_PATHS[0] + "main") == [MACHINE_PATHS[0]]
    assert machine_paths("the work/ folder, ~/.cache/tilewright") == []


@pytest.mark.quick
def test_the_packaged_gguf_is_found(smollm2_gguf):
    with smollm2_gguf.open("rb") as file:
        assert file.read(4) == b"GGUF"
