"""The tables that come with the package: readable, of templates as they are now, never worse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import tilewright
from persistent_codes import Coded
from persistent_forms import Model
from tilewright.autotune.record import Record
from tilewright.autotune.store import Store
from tilewright.codegen.persistent.codes import Codes
from tilewright.codegen.persistent.reading import read_decode
from tilewright.codegen.triton.tuning.registry import TEMPLATES
from tilewright.compiler.decode_choice import LENGTHS, TEMPLATE, StepProblem
from tilewright.ir.dtypes import DType
from tilewright.ir.parser import parse_graph
from tilewright.targets import Target

TABLES = sorted((Path(tilewright.__file__).parent / "autotune" / "tables").glob("*.jsonl"))
MOST_STALE = 0.2
MODELS = {
    2048: Model(2048, 16, 32, 8, 64, 8192, 128256, 16),
    4096: Model(4096, 32, 32, 8, 128, 14336, 128256, 16),
}
"""Of decode steps that have records, by their width: Llama-3.2-1B and Llama-3-8B."""
CODED = {
    "none": None,
    str(Codes(4, group=128, block=1, scale_bytes=2, rounds=False)): Coded(DType.U8, group=128),
    str(Codes(8, group=0, block=1, scale_bytes=4, rounds=True)): Coded(DType.F8E4M3, rounds=True),
}


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
    found = [record for record in records(path) if record.key.template != TEMPLATE]
    stale = [r for r in found if hashes.get(r.key.template) != r.key.template_hash]
    assert len(stale) <= MOST_STALE * len(found), (
        f"{len(stale)} of {len(found)} rows of {path.name} are of other code of their templates: "
        "make the table anew on such a device, with tilewright tune"
    )


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_one_launch_is_the_one_that_was_measured(path: Path) -> None:
    """Else steps that it was chosen for would be separate kernels again, unsaid."""
    for record in records(path):
        if record.key.template != TEMPLATE:
            continue
        sizes = dict(record.key.problem)
        model, coded = MODELS[sizes["width"]], CODED[str(sizes["codes"])]
        graph = model.graph() if coded is None else coded.graph(model.graph())
        text = str(graph).replace("scale=0.25", f"scale={model.dim**-0.5!r}")
        shape = read_decode(parse_graph(text))
        target = Target.parse(record.key.device)
        problem = StepProblem(graph, shape, target, int(sizes["sequences"]), LENGTHS)
        assert problem.key.template_hash == record.key.template_hash, (
            f"{path.name}: the one launch of {sizes['layers']} layers is another one now: measure "
            "it on such a device, with tilewright tune run MODEL --only decode_step"
        )


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_no_choice_is_slower_than_the_default(path: Path) -> None:
    gains = [record.default_seconds / record.seconds for record in records(path)]
    assert min(gains) >= 0.99
    assert math.exp(sum(map(math.log, gains)) / len(gains)) > 1.03
