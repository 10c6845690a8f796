"""What this machine gives at this moment: its load, and the rate at which it reads memory."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass

import torch

from ...targets import Target, available_cores

PROBE_BYTES = 1 << 29
PROBES = 7


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine during a measurement.

    Attributes:
        target: what it is.
        cores: that this process may use.
        threads: that torch uses.
        load: processes that want a core, over the last minute, before the measurement.
        read_bytes_per_second: of a large sum with these threads, median.
    """

    target: str
    cores: int
    threads: int
    load: float
    read_bytes_per_second: float

    @property
    def is_busy(self) -> bool:
        """Whether others take a good part of the cores: figures are then rough."""
        return self.load > 0.5 * self.cores


def probe_machine() -> Machine:
    """Looks at the load, then measures the read rate (half a second)."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Machine(
        str(Target.detect()), available_cores(), torch.get_num_threads(), load, _read_rate()
    )


def _read_rate() -> float:
    """Bytes per second of summing a tensor much larger than the caches."""
    tensor = torch.rand(PROBE_BYTES // 4)
    tensor.sum()
    times = []
    for _ in range(PROBES):
        started = time.perf_counter()
        tensor.sum()
        times.append(time.perf_counter() - started)
    return PROBE_BYTES / statistics.median(times)
