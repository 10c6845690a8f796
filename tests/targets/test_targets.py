"""The table of devices is sane, targets round-trip through text, wrong ones are explained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.errors import UnsupportedError, UsageError
from tilewright.targets import TARGETS, Target, available_cores
from tilewright.targets.detect import match_gpu

pytestmark = pytest.mark.quick
GPUS = [target for target in TARGETS.values() if not target.is_cpu]


def test_table_holds_the_promised_devices():
    assert list(TARGETS) == [
        *("cpu", "a100", "a10", "rtx3090", "l4", "rtx4090", "h100", "h200", "rtx5090", "b200")
    ]
    assert all(target.source and name == target.name for name, target in TARGETS.items())


@pytest.mark.parametrize("target", GPUS, ids=str)
def test_gpu_row_is_sane(target: Target):
    assert 70 <= target.arch <= 130
    assert 50 <= target.sms <= 200
    assert target.shared_memory_per_block < target.shared_memory_per_sm <= 256 * 1024
    # GA102 alone (sm_86) has so small an L2, and so little arithmetic for its bandwidth.
    least_l2, least_ridge = (4 << 20, 70) if target.arch == 86 else (32 << 20, 100)
    assert least_l2 <= target.l2_bytes <= 192 << 20
    assert 250 <= target.dram_gb_per_s <= 9000
    assert least_ridge <= target.ridge_point("bfloat16") <= 500
    rates = dict(target.tflops)
    assert rates["float32"] <= rates["tf32"] < rates["bfloat16"] == rates["float16"]
    assert rates.get("float8_e4m3fn", 2 * rates["float16"]) == pytest.approx(
        2 * rates["float16"], rel=0.01
    )
    # what an SM's tensor cores do in a cycle at a plausible clock
    per_sm = rates["bfloat16"] * 1e12 / target.sms
    assert 0.5e12 < per_sm < 20e12
    assert all(hasattr(torch, dtype) or dtype == "tf32" for dtype in rates)


def test_our_measured_h100_stays_below_the_row():
    h100 = TARGETS["h100"]
    for flops, dtype in ((716e12, "bfloat16"), (1323e12, "float8_e4m3fn")):
        assert 0.6 < flops / h100.flops_per_second(dtype) < 1
    assert 0.85 < 3033 / h100.dram_gb_per_s < 1


def test_roofline_takes_the_slower_of_compute_and_memory():
    h100 = Target.parse("h100")
    # 8B decode at batch 1 reads 15.01 GB: 4.5 ms at the datasheet's bandwidth
    assert h100.roofline_seconds(2 * 8e9, 15.01e9, "bfloat16") == pytest.approx(4.478e-3, rel=1e-3)
    assert h100.roofline_seconds(989.4e12, 1, "bfloat16") == pytest.approx(1)
    ridge = h100.ridge_point("bfloat16")
    assert h100.roofline_seconds(ridge * 1e9, 1e9, "bfloat16") == pytest.approx(
        1e9 / (h100.dram_gb_per_s * 1e9)
    )


@given(
    st.sampled_from(list(TARGETS)),
    st.fixed_dictionaries(
        {},
        optional={
            "sms": st.integers(1, 500),
            "l2_bytes": st.integers(1, 1 << 30),
            "dram_gb_per_s": st.floats(0.001, 1e6) | st.integers(1, 10000),
        },
    ),
)
def test_text_round_trip(name: str, sizes: dict[str, int | float]):
    target = Target.parse(name).override(**sizes)
    assert Target.parse(str(target)) == target
    assert hash(Target.parse(str(target))) == hash(target)
    assert target.override(sms=7).override(**{"sms": target.sms}).sms == target.sms


def test_rates_follow_the_number_of_sms():
    half = Target.parse("H100:sms=66")
    assert half.flops_per_second("bfloat16") == pytest.approx(989.4e12 / 2)
    assert half.dram_gb_per_s == TARGETS["h100"].dram_gb_per_s
    assert str(half) == "h100:sms=66"


@pytest.mark.parametrize(
    "text",
    ["h1000", "", "gpu", "h100:foo=1", "h100:sms", "h100:sms=0", "h100:sms=1.5", "h100:sms=inf"]
    + ["h100:dram_gb_per_s=nan", "h100:sms=-3"],
)
def test_wrong_target_lists_valid_ones(text: str):
    with pytest.raises(UsageError) as error:
        Target.parse(text)
    if ":" not in text:
        assert all(name in str(error.value) for name in TARGETS)
    else:
        assert "h100:sms=114" in str(error.value)


def test_unknown_dtype_lists_valid_ones():
    with pytest.raises(UsageError, match="float32, tf32, float16, bfloat16, int8"):
        TARGETS["a100"].flops_per_second("float8_e4m3fn")


def test_detect_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target = Target.detect()
    assert target.is_cpu
    assert target.sms == available_cores() >= 1
    assert (target.device_type, target.sm) == ("cpu", "cpu")


@pytest.mark.parametrize(
    ("name", "arch", "sms", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 90, 132, "h100"),
        ("NVIDIA H100 PCIe", 90, 114, "h100:sms=114"),
        ("NVIDIA H200", 90, 132, "h200"),
        ("NVIDIA A100-SXM4-80GB", 80, 108, "a100"),
        ("NVIDIA GeForce RTX 4090", 89, 128, "rtx4090"),
        ("NVIDIA L4", 89, 58, "l4"),
        ("NVIDIA GeForce RTX 4060", 89, 24, "l4:sms=24"),
        ("NVIDIA L40S", 89, 142, "rtx4090:sms=142"),
        ("NVIDIA B200", 100, 148, "b200"),
    ],
)
def test_match_gpu(name: str, arch: int, sms: int, expected: str):
    assert str(match_gpu(name, arch, sms)) == expected


def test_unknown_gpu_is_refused():
    with pytest.raises(UnsupportedError, match=r"h100 \(sm_90\)"):
        match_gpu("Tesla V100", 70, 80)
