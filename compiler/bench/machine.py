"""What this machine gives at this moment: its load, and the rates of its memory and its matmuls."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from ...targets import available_cores

PROBE_BYTES = 1 << 29
RANDOM_BYTES = 1 << 22  # of which the probe is made: as random, and a hundredth of the time
PROBES = 7
GPU_PROBE_ELEMENTS = 1 << 30  # 2 GiB of bfloat16, far beyond any L2
GPU_PROBES = 20
MATMUL_SIZE = 8192
PACKAGES = ("torch", "triton", "transformers")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine during a measurement.

    Attributes:
        target: what it is.
        device: "cpu", or the GPU's name as the driver gives it.
        cores: that this process may use.
        threads: that torch uses.
        load: processes that want a core, over the last minute, before the measurement.
        read_bytes_per_second: of a large sum, median.
        copy_bytes_per_second: of a large copy, bytes read and written; None on a CPU.
        matmul_flops_per_second: of a square bfloat16 matmul; None on a CPU.
        fp8_flops_per_second: of the same in e4m3, a scale a row; None where the device has none.
        versions: of the packages that matter, by name.
    """

    target: str
    device: str
    cores: int
    threads: int
    load: float
    read_bytes_per_second: float
    copy_bytes_per_second: float | None
    matmul_flops_per_second: float | None
    fp8_flops_per_second: float | None
    versions: Mapping[str, str]

    @property
    def is_busy(self) -> bool:
        """Whether others take a good part of the cores: figures are then rough."""
        return self.load > 0.5 * self.cores


def probe_machine(target: str, device: torch.device) -> Machine:
    """Looks at the load, then measures the device's rates (half a second).

    Args:
        target: the device's name, as the engine has it.
        device: whose memory is read.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        read, copy = _gpu_memory_rates(device)
        matmul, fp8 = _gpu_matmul_rate(device), _gpu_fp8_rate(device)
        torch.cuda.empty_cache()  # the contenders need it
    else:
        name, read, copy, matmul, fp8 = "cpu", _read_rate(), None, None, None
    return Machine(
        target,
        name,
        available_cores(),
        torch.get_num_threads(),
        load,
        read,
        copy,
        matmul,
        fp8,
        package_versions(PACKAGES),
    )


def _read_rate() -> float:
    """Bytes per second of summing a tensor much larger than the caches."""
    tensor = torch.rand(RANDOM_BYTES // 4).repeat(max(1, PROBE_BYTES // RANDOM_BYTES))
    tensor.sum()
    times = []
    for _ in range(PROBES):
        started = time.perf_counter()
        tensor.sum()
        times.append(time.perf_counter() - started)
    return tensor.nbytes / statistics.median(times)


def _gpu_memory_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second that a sum reads, and that a copy reads and writes."""
    free, _ = torch.cuda.mem_get_info(device)
    elements = min(GPU_PROBE_ELEMENTS, free // 8)  # two tensors in half of what is free
    source = torch.empty(elements, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    read = _event_seconds(lambda: source.sum())
    copy = _event_seconds(lambda: target.copy_(source))
    return 2 * elements / read, 4 * elements / copy


def _gpu_matmul_rate(device: torch.device) -> float:
    """FLOP per second of a square bfloat16 matmul."""
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    a, b = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * MATMUL_SIZE**3 / _event_seconds(lambda: a @ b)


def _gpu_fp8_rate(device: torch.device) -> float | None:
    """FLOP per second of a square e4m3 matmul; None for devices without."""
    if torch.cuda.get_device_capability(device) < (8, 9):
        return None
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    a, b = (torch.randn(shape, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    ones = torch.ones(MATMUL_SIZE, 1, device=device)

    def product() -> object:
        return torch._scaled_mm(a, b.t(), ones, ones.t(), out_dtype=torch.bfloat16)

    return 2 * MATMUL_SIZE**3 / _event_seconds(product)


def _event_seconds(work: Callable[[], object]) -> float:
    """Median device time of ``work`` on the current stream, after three that are not counted."""
    pairs = []
    for _ in range(3 + GPU_PROBES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(float(a.elapsed_time(b)) for a, b in pairs[3:]) / 1e3


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions by package; those that are not installed are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
