"""Which device is measured, and in what state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

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


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions by package; those that are not installed are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
