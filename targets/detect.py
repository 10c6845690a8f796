"""Which device this machine has."""

from __future__ import annotations

import itertools
import os
import platform
import re

import torch

from ..errors import UnsupportedError
from .table import TARGETS
from .target import Target

_ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
)


def detect_target() -> Target:
    """The first CUDA device if torch sees one, else the CPU with the cores this process may use.

    Raises:
        UnsupportedError: a GPU that is not in the table (its row is found by name, then by compute
            capability).
    """
    if not torch.cuda.is_available():
        return TARGETS["cpu"].override(sms=available_cores())
    properties = torch.cuda.get_device_properties(0)
    return match_gpu(
        properties.name,
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
    )


def gpu_problem() -> str | None:
    """Why this process has no CUDA device, in words; None where it has one.

    A torch without CUDA, a driver that is missing or too old (torch's own words), or no device.
    """
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "no CUDA device is visible"


def match_gpu(name: str, arch: int, sms: int) -> Target:
    """The table's row for a GPU.

    Args:
        name: as the driver gives it, e.g. "NVIDIA H100 80GB HBM3".
        arch: compute capability as a number, 90 for 9.0.
        sms: streaming multiprocessors; another count than the row's becomes an override.

    Raises:
        UnsupportedError: no row has that compute capability.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    words += [first + second for first, second in itertools.pairwise(words)]  # "rtx 4090"
    rows = [row for row in TARGETS.values() if row.arch == arch]
    if not rows:
        gpus = ", ".join(f"{row.name} ({row.sm})" for row in TARGETS.values() if not row.is_cpu)
        raise UnsupportedError(
            f"GPU {name}",
            expected=f"one of {gpus}",
            found=f"sm_{arch}",
            remedy="Name the closest of them as the target.",
        )
    named = [row for row in rows if row.name in words]
    # among devices of one architecture, the one whose size is closest
    row = min(named or rows, key=lambda row: abs(row.sms - sms))
    return row if row.sms == sms else row.override(sms=sms)


def available_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_isa_flags() -> tuple[str, ...]:
    """Which vector and matrix extensions the CPU has, of those that matter; () if unknown."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            words = set(file.read().split())
    except OSError:
        return ()
    return tuple(flag for flag in _ISA_FLAGS if flag in words)


def cpu_name() -> str:
    """The CPU's model as its maker names it; the machine's architecture where nobody tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.machine()
