"""The TensorRT that is installed: TensorRT for RTX, which builds for several GPUs on a machine
without one, or classic TensorRT, which builds for the GPU that is here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ...errors import UnsupportedError
from ...ir.dtypes import DType
from ...targets import Target

RTX, CLASSIC = "tensorrt_rtx", "tensorrt"
INSTALL = "pip install tilewright[tensorrt]"
_NEEDED = ("add_kv_cache_update", "add_rotary_embedding", "add_attention")
_SINCE = {DType.F32: 80, DType.BF16: 80, DType.F8E4M3: 89}
"""The first architecture for which products are built in a type."""


@dataclass(frozen=True, slots=True)
class Flavor:
    """An installed TensorRT.

    Attributes:
        name: of its module, "tensorrt_rtx" or "tensorrt".
        api: the module.
        archs: the architectures that it builds for here, 89 for sm_89.
    """

    name: str
    api: Any
    archs: tuple[int, ...]

    @property
    def version(self) -> str:
        """Its version."""
        return str(self.api.__version__)

    def check(self, archs: Collection[int], dtypes: Iterable[DType]) -> None:
        """UnsupportedError unless it builds for all of ``archs``, and they have all of ``dtypes``;
        the message lists those that can be had.
        """
        least, fit = _least(dtypes), self.suits(dtypes)
        odd = [arch for arch in archs if arch not in fit]
        if odd or not archs:
            kind = f"{self.name} {self.version}"
            few = f" (the element types of this model need sm_{least})" if least else ""
            raise UnsupportedError(
                f"{kind} for {', '.join(f'sm_{arch}' for arch in odd) or 'no target'}",
                expected=f"targets among {_listed(fit)}{few}",
                found=_listed(odd),
                remedy="Choose among those; the triton backend serves other NVIDIA GPUs.",
            )

    def suits(self, dtypes: Iterable[DType]) -> tuple[int, ...]:
        """The architectures that it builds for that have all of ``dtypes``."""
        return tuple(arch for arch in self.archs if arch >= _least(dtypes))


def find_flavor(names: Iterable[str] = (RTX, CLASSIC)) -> Flavor:
    """The first of the flavors that is installed.

    Raises:
        UnsupportedError: none is, or it does not load or is too old; it says what to install.
    """
    found = [name for name in names if find_spec(name) is not None]
    if not found:
        raise _missing("none of its modules tensorrt_rtx and tensorrt")
    name = found[0]
    try:
        api = import_module(name)
    except (ImportError, OSError) as error:
        raise _missing(f"{name}, which does not load: {str(error).splitlines()[0]}") from error
    lacking = [layer for layer in _NEEDED if not hasattr(api.INetworkDefinition, layer)]
    if lacking:
        raise _missing(f"{name} {api.__version__}, which has no {lacking[0]}")
    return Flavor(name, api, _archs(name, api))


def check_target(target: Target) -> None:
    """UnsupportedError unless the TensorRT that is installed builds for a device."""
    flavor = find_flavor()
    if target.is_cpu:
        raise UnsupportedError(
            "backend 'tensorrt' for target cpu",
            expected=f"a GPU of {_listed(flavor.archs)}, for which {flavor.name} builds here",
            found="a CPU",
            remedy="Name a GPU with target=, such as 'l4': none is needed to compile for it.",
        )
    flavor.check((target.arch,), ())


def listener(api: Any, errors: list[str]) -> Any:
    """A logger that adds what goes wrong to ``errors``; TensorRT's other lines are for its own
    developers.
    """

    class Logger(api.ILogger):  # type: ignore[misc]
        """Keeps errors."""

        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT."""
            if severity in (api.ILogger.INTERNAL_ERROR, api.ILogger.ERROR):
                errors.append(message)

    return Logger()


def first_error(errors: Sequence[str]) -> str | None:
    """The first error, in one line that says all."""
    return " ".join(errors[0].split())[:600] if errors else None


def _archs(name: str, api: Any) -> tuple[int, ...]:
    """By the members of its enumeration of compute capabilities, or the GPU here."""
    if name == CLASSIC:
        here = Target.detect()
        return () if here.is_cpu else (here.arch,)
    members = api.ComputeCapability.__members__
    return tuple(sorted(int(m.removeprefix("SM")) for m in members if m.startswith("SM")))


def _least(dtypes: Iterable[DType]) -> int:
    """The first architecture that has all of them."""
    return max((_SINCE.get(dtype, 0) for dtype in dtypes), default=0)


def _missing(found: str) -> UnsupportedError:
    return UnsupportedError(
        "TensorRT",
        expected="TensorRT for RTX 1.7 or later, or TensorRT 10.15 or later",
        found=found,
        remedy=f"Run {INSTALL}, which brings tensorrt-rtx.",
    )


def _listed(archs: Collection[int]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs) or "none"
