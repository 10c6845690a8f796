"""What a device is: identity, capacities and rates, and the time that its roofline allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UsageError

_SIZES = ("sms", "l2_bytes", "dram_gb_per_s")  # what `h100:sms=114` may override


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device to compile for.

    Attributes:
        name: its name in the table, e.g. "h100".
        arch: compute capability as a number, 90 for sm_90; 0 for a CPU.
        sms: streaming multiprocessors, or CPU cores.
        shared_memory_per_sm: bytes; 0 for a CPU.
        shared_memory_per_block: bytes that one block may use when it opts in; 0 for a CPU.
        registers_per_sm: 32-bit registers; 0 for a CPU.
        l2_bytes: last-level cache.
        dram_bytes: device memory; 0 where it is not part of the identity.
        dram_gb_per_s: peak memory bandwidth, 10⁹ bytes/s.
        tflops: peak dense rates by dtype name, 10¹² FLOP/s (multiply and add are two).
        source: where the figures come from.
        overrides: what differs from the table, as `str` prints it.
    """

    name: str
    arch: int
    sms: int
    shared_memory_per_sm: int
    shared_memory_per_block: int
    registers_per_sm: int
    l2_bytes: int
    dram_bytes: int
    dram_gb_per_s: float
    tflops: tuple[tuple[str, float], ...]
    source: str
    overrides: tuple[tuple[str, int | float], ...] = ()

    @property
    def is_cpu(self) -> bool:
        """Whether it is a CPU."""
        return self.arch == 0

    @property
    def sm(self) -> str:
        """The architecture as compilers name it: "sm_90", or "cpu"."""
        return "cpu" if self.is_cpu else f"sm_{self.arch}"

    @property
    def device_type(self) -> str:
        """The torch device type: "cpu" or "cuda"."""
        return "cpu" if self.is_cpu else "cuda"

    def flops_per_second(self, dtype: str) -> float:
        """Peak dense rate of a dtype, FLOP/s; an unknown dtype raises UsageError."""
        rates: Mapping[str, float] = dict(self.tflops)
        if dtype not in rates:
            raise UsageError(
                f"dtype {dtype!r} on target {self.name}",
                expected=f"one of {', '.join(rates)}",
                found=repr(dtype),
                remedy="Use a dtype that the device computes in.",
            )
        return rates[dtype] * 1e12

    def roofline_seconds(self, flops: float, bytes: float, dtype: str) -> float:
        """The least time that the device's peak rates allow (Williams et al., Roofline, 2009).

        Args:
            flops: floating-point operations, multiply and add counted apart.
            bytes: DRAM traffic, read and written.
            dtype: torch's name of the dtype multiplied in, e.g. "bfloat16".
        """
        return max(flops / self.flops_per_second(dtype), bytes / (self.dram_gb_per_s * 1e9))

    def ridge_point(self, dtype: str) -> float:
        """FLOPs per DRAM byte at which compute takes as long as memory."""
        return self.flops_per_second(dtype) / (self.dram_gb_per_s * 1e9)

    def override(self, **sizes: int | float) -> Target:
        """The same device with other figures; its compute rates follow the number of `sms`.

        Args:
            sizes: `sms`, `l2_bytes` (ints) or `dram_gb_per_s`.

        Raises:
            UsageError: another name, or a figure that is not positive and finite.
        """
        from .table import TARGETS

        for name, value in sizes.items():
            whole = isinstance(value, int) or name == "dram_gb_per_s"
            if name not in _SIZES or not whole or not 0 < value < math.inf:
                raise UsageError(
                    f"target {self.name}:{name}={value}",
                    expected=f"a positive figure for one of {', '.join(_SIZES)}",
                    found=f"{name}={value}",
                    remedy="Write for example h100:sms=114.",
                )
        base = TARGETS.get(self.name, self)
        merged = dict(sorted({**dict(self.overrides), **sizes}.items()))
        share = merged.get("sms", base.sms) / base.sms
        return dataclasses.replace(
            base,
            sms=int(merged.get("sms", base.sms)),
            l2_bytes=int(merged.get("l2_bytes", base.l2_bytes)),
            dram_gb_per_s=merged.get("dram_gb_per_s", base.dram_gb_per_s),
            tflops=tuple((dtype, rate * share) for dtype, rate in base.tflops),
            overrides=tuple(merged.items()),
        )

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target from text: a name of the table, and overrides after a colon.

        Args:
            text: e.g. "h100" or "h100:sms=114,dram_gb_per_s=2039"; case does not matter.

        Raises:
            UsageError: an unknown name (the known ones are listed) or a malformed override.
        """
        from .table import TARGETS

        name, _, options = text.strip().lower().partition(":")
        if name not in TARGETS:
            raise UsageError(
                f"target {text!r}",
                expected=f"one of {', '.join(TARGETS)}",
                found=repr(name),
                remedy="Name one of these, or auto for this machine.",
            )
        pairs = (option.partition("=") for option in options.split(",") if option)
        return TARGETS[name].override(**{key: _number(text, value) for key, _, value in pairs})

    @classmethod
    def detect(cls) -> Target:
        """The device of this machine: the first CUDA device if there is one, else the CPU."""
        from .detect import detect_target

        return detect_target()

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.overrides)
        return f"{self.name}:{options}" if options else self.name


def _number(text: str, value: str) -> int | float:
    try:
        return int(value) if value.isdigit() else float(value)
    except ValueError:
        raise UsageError(
            f"target {text!r}",
            expected="overrides such as sms=114",
            found=repr(value),
            remedy="Write for example h100:sms=114.",
        ) from None
