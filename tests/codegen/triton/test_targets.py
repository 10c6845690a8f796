"""Every kernel of whole models compiles for every architecture, without a GPU."""

from __future__ import annotations

import pytest
import torch

import tilewright as tw
from tilewright.codegen.triton.aot import ARCHS
from tilewright.codegen.triton.package import FOLDER, read_package
from tilewright.targets import TARGETS
from tiny_models import tiny_model

NIGHTLY = pytest.mark.nightly
ONE_EACH = {target.arch: name for name, target in TARGETS.items() if not target.is_cpu}


def _packages(name: str, target: str, dtype: torch.dtype):
    model = tiny_model(name).to(dtype)
    # As tests of regress have it, so that each kernel is compiled once for all of them.
    options = {"max_model_len": 64, "max_batch_size": 4}
    files = tw.compile(model, target=target, verify="off", **options).image.files
    ids = {path.split("/")[1] for path in files if path.startswith(f"{FOLDER}/")}
    return [read_package(files.__getitem__, id) for id in sorted(ids)]


@pytest.mark.parametrize(
    "arch",
    # Hopper's are compiled below, and one kernel's of each kind for all beside its own tests.
    [pytest.param(arch, marks=NIGHTLY) for arch in ARCHS],
)
def test_a_model_compiles_for_each_architecture(arch: int) -> None:
    packages = _packages("qwen3", ONE_EACH[arch], torch.bfloat16)
    assert {package.source.kind for package in packages} == {"generated", "template"}
    for package in packages:
        assert all(binary.arch == arch for binary in package.binaries.values())
        limit = TARGETS[ONE_EACH[arch]].shared_memory_per_block
        assert all(taken.shared <= limit for taken in package.resources)


@pytest.mark.parametrize(
    "name",
    # Each kernel alone is compiled for Hopper beside its own tests.
    ["llama", *(pytest.param(n, marks=NIGHTLY) for n in ("gemma3", "gpt_neox", "olmo2"))],
)
def test_no_kernel_spills_on_hopper(name: str) -> None:
    for package in _packages(name, "h100", torch.bfloat16):
        assert [taken.spills for taken in package.resources] == [0] * len(package.resources), (
            package.id
        )
