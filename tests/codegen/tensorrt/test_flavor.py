"""Which TensorRT is installed, and what it builds for: modules that stand for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tensorrt_fakes import fake_tensorrt
from tilewright.codegen.tensorrt import flavor
from tilewright.codegen.tensorrt.flavor import find_flavor
from tilewright.errors import UnsupportedError
from tilewright.ir.dtypes import DType


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Makes modules importable for a test, and no others of TensorRT's."""

    def install(**modules: object) -> None:
        monkeypatch.setattr(flavor, "find_spec", lambda name: name if name in modules else None)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    return install


def test_none_is_installed(installed) -> None:
    installed()
    with pytest.raises(UnsupportedError, match=r"Run pip install tilewright\[tensorrt\]"):
        find_flavor()


def test_one_that_does_not_load(installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tensorrt_rtx=None)  # an import of None is an ImportError
    with pytest.raises(UnsupportedError, match="tensorrt_rtx, which does not load"):
        find_flavor()


def test_one_that_is_too_old(installed) -> None:
    old = SimpleNamespace(__version__="1.0", INetworkDefinition=SimpleNamespace())
    installed(tensorrt_rtx=old)
    with pytest.raises(UnsupportedError, match="1.0, which has no add_kv_cache_update"):
        find_flavor()


def test_what_it_builds_for(installed) -> None:
    installed(tensorrt_rtx=fake_tensorrt("SM75", "SM80", "SM89", "SM120", "NONE", "CURRENT"))
    found = find_flavor()
    assert (found.name, found.archs) == ("tensorrt_rtx", (75, 80, 89, 120))
    assert found.suits([DType.F16]) == (75, 80, 89, 120)
    assert found.suits([DType.BF16, DType.I8]) == (80, 89, 120)
    assert found.suits([DType.F8E4M3]) == (89, 120)
    found.check([80, 120], [DType.BF16])


@pytest.mark.parametrize(
    ("archs", "dtype", "listed"),
    [
        ((90,), DType.F16, "targets among sm_75, sm_80, sm_89, sm_120, found sm_90"),
        ((75, 80), DType.BF16, r"among sm_80, sm_89, sm_120 .* need sm_80\), found sm_75"),
        ((80,), DType.F8E4M3, r"among sm_89, sm_120 .* need sm_89\), found sm_80"),
        ((), DType.F16, "for no target"),
    ],
)
def test_targets_that_it_has_not(installed, archs, dtype, listed: str) -> None:
    installed(tensorrt_rtx=fake_tensorrt("SM75", "SM80", "SM89", "SM120"))
    with pytest.raises(UnsupportedError, match=listed):
        find_flavor().check(archs, [dtype])


def test_the_classic_one_builds_for_the_gpu_here(installed) -> None:
    installed(tensorrt=fake_tensorrt())
    found = find_flavor()
    assert found.name == "tensorrt"
    with pytest.raises(UnsupportedError, match="targets among"):
        found.check([123], [])
