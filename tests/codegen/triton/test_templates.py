"""Each kernel template has a search space, a default, and a test and a benchmark of its stem."""

from __future__ import annotations

import ast
import dataclasses
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from house.tree import ROOT

KERNELS = Path("codegen/triton/kernels")
NAMED = (
    *("append_kv", "cascade", "experts", "linear", "paged_attention", "paged_decode"),
    *("packed_linear", "quant_linear", "sample", "scaled_linear", "wide_experts"),
    "wide_linear",
)
LIKE_LINEAR = frozenset({"packed_linear", "quant_linear", "scaled_linear"})
"""Kernels with defaults of their own in the tiles of linear, whose fields their space names too."""
OVER_CODES = {"scaled_attention": "paged_attention", "scaled_decode": "paged_decode"}
"""Kernels cut as others are, whose space, default and benchmark (--cache-dtype) are theirs."""
OF_OTHERS = {"hopper_attention": "paged_attention"}
"""Kernels that another template takes where it can, within its space and in its benchmark."""


def stems(root: Path) -> list[str]:
    """The templates: modules of emitters that have a device side beside them."""
    folder = root / KERNELS
    return sorted(
        path.name.removesuffix("_kernel.py")
        for path in folder.glob("*_kernel.py")
        if path.with_name(path.name.removesuffix("_kernel.py") + ".py").exists()
    )


def missing(root: Path, stem: str) -> list[str]:
    """What a template lacks."""
    names: set[str] = set()
    for path in (root / KERNELS / f"{stem}.py", root / KERNELS / f"{stem}_tiles.py"):
        if path.exists():
            names |= _defined(ast.parse(path.read_text("utf-8")))
    found = [] if "SPACE" in names else ["SPACE"]
    if not any(name.startswith("default_") for name in names):
        found.append("a default")
    others = (f"tests/{KERNELS}/test_{stem}.py", f"benchmarks/bench_{stem}.py")
    return found + [other for other in others if not (root / other).exists()]


def _defined(tree: ast.Module) -> set[str]:
    assigned = [n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign)]
    targets = [
        t for n in assigned for t in (n.targets if isinstance(n, ast.Assign) else [n.target])
    ]
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return functions | {target.id for target in targets if isinstance(target, ast.Name)}


def spaces(stem: str) -> list[tuple[ModuleType, object]]:
    """The module of a template's space, and the space."""
    folder = "tilewright." + ".".join(KERNELS.parts)
    paths = [ROOT / KERNELS / f"{name}.py" for name in (stem, f"{stem}_tiles")]
    modules = [import_module(f"{folder}.{path.stem}") for path in paths if path.exists()]
    return [(module, module.SPACE) for module in modules if "SPACE" in vars(module)]


@pytest.mark.quick
def test_the_templates_are_found() -> None:
    assert stems(ROOT) == sorted({*NAMED, *OVER_CODES, *OF_OTHERS})


@pytest.mark.quick
@pytest.mark.parametrize("stem", NAMED)
def test_each_template_is_whole(stem: str) -> None:
    assert missing(ROOT, stem) == ["SPACE"] * (stem in LIKE_LINEAR)


@pytest.mark.quick
@pytest.mark.parametrize("stem", OVER_CODES)
def test_each_over_codes_has_a_test_and_the_others_benchmark(stem: str) -> None:
    plain = OVER_CODES[stem]
    assert missing(ROOT, stem) == ["SPACE", "a default", f"benchmarks/bench_{stem}.py"]
    assert missing(ROOT, plain) == []
    assert "--cache-dtype" in (ROOT / f"benchmarks/bench_{plain}.py").read_text("utf-8")


@pytest.mark.quick
@pytest.mark.parametrize("stem", OF_OTHERS)
def test_each_of_another_template_has_a_default_and_a_test(stem: str) -> None:
    assert missing(ROOT, stem) == ["SPACE", f"benchmarks/bench_{stem}.py"]
    assert missing(ROOT, OF_OTHERS[stem]) == []


@pytest.mark.parametrize("stem", sorted({*NAMED} - LIKE_LINEAR))
def test_a_space_names_fields_of_tiles_and_has_no_value_twice(stem: str) -> None:
    ((module, space),) = spaces(stem)
    tiles = [
        item
        for name, item in vars(module).items()
        if name.endswith("Tiles") and item.__module__ == module.__name__
    ]
    fields = {field.name for item in tiles for field in dataclasses.fields(item)}
    assert tiles and space.keys() <= fields
    assert all(len(values) == len(set(values)) > 1 for values in space.values())


@pytest.mark.quick
def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = tmp_path / KERNELS
    folder.mkdir(parents=True)
    (folder / "new_kernel.py").write_text("")
    assert stems(tmp_path) == []
    (folder / "new.py").write_text("def emit_new(): ...\n")
    assert stems(tmp_path) == ["new"]
    others = ["tests/codegen/triton/kernels/test_new.py", "benchmarks/bench_new.py"]
    assert missing(tmp_path, "new") == ["SPACE", "a default", *others]
    (folder / "new_tiles.py").write_text("SPACE: dict = {}\ndef default_tiles(): ...\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / others[1]).write_text("")
    assert missing(tmp_path, "new") == others[:1]
