"""The conditions of this process: what a tuning record is compared with, beside its key."""

from __future__ import annotations

from ....autotune.key import Conditions
from ....version import __version__
from ..aot import triton_version


def conditions_here(driver: bool = False) -> Conditions:
    """Versions of Triton and of ours, and of the driver where it is asked for and there is one."""
    return Conditions(triton_version(), driver_version() if driver else None, __version__)


def driver_version() -> str | None:
    """The CUDA version that the installed driver supports, as "13.0"; None without a driver."""
    try:
        from cuda.bindings import driver

        error, version = driver.cuDriverGetVersion()
    except (ImportError, RuntimeError, OSError):
        return None
    if int(error) != 0:
        return None
    return f"{version // 1000}.{version % 1000 // 10}"
