"""Which device is measured, and in what state."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...bench.machine import package_versions

PACKAGES = ("torch", "triton")


def device_facts() -> Mapping[str, object]:
    """Name, architecture, clocks and versions of the current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "arch": properties.major * 10 + properties.minor,
        "sms": properties.multi_processor_count,
        "clocks": clocks(),
        "versions": {**package_versions(PACKAGES), "cuda": torch.version.cuda or ""},
    }


def clocks() -> Mapping[str, int]:
    """MHz of the multiprocessors and of memory, degrees Celsius; {} where nobody tells."""
    try:
        return {
            "sm_mhz": torch.cuda.clock_rate(),
            "temperature": torch.cuda.temperature(),
        }
    except Exception:  # NVML is not installed, or not allowed
        return {}
