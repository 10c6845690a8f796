"""An engine file's own account of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tilewright.codegen.tensorrt.plan import read_plan

TEXT = b"""\x00\x01ptrtd
 inputs={ "input_ids.1" "present.0.key.1" }
 outputs={ "__mye20263" "present.0.key.1" }
main {
  function={ name=__myl_Add fqn=__myl_Add_0x1 args={ "a" } }
  function={ name=_gemm_mha_v2 fqn=_gemm_mha_v2_0x2 args={ "a" } }
}
 inputs={ "input_ids [profile 1].1" "present.0.value [profile 1].1" }
 outputs={ "present.0.value [profile 1].1" }
  function={ name=_gemv_mha_v1 fqn=_gemv_mha_v1_0x3 args={ "a" } }
  function={ name=__myl_Add fqn=__myl_Add_0x1 args={ "a" } }
\xff\xfe"""


def test_kernels_and_memory(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(TEXT)
    plan = read_plan(tmp_path / "e")
    assert plan.kernels == {"__myl_Add": 2, "_gemm_mha_v2": 1, "_gemv_mha_v1": 1}
    assert set(plan.attention_kernels) == {"_gemm_mha_v2", "_gemv_mha_v1"}
    assert plan.in_place == {"present.0.key", "present.0.value"}


def test_a_file_that_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"\x00\x01")
    plan = read_plan(tmp_path / "e")
    assert not plan.kernels and not plan.in_place
    with pytest.raises(OSError):
        read_plan(tmp_path / "none")
