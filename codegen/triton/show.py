"""The kernels' part of the debug ladder (settings.py): what was compiled, with what, from what."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ...settings import current
from .package import KernelPackage

KERNELS, CONFIGS, SOURCES = 2, 3, 4  # rungs of TILEWRIGHT_DEBUG


def show_packages(packages: Sequence[KernelPackage]) -> None:
    """Prints kernels as TILEWRIGHT_DEBUG asks, and writes them where TILEWRIGHT_DUMP says."""
    settings = current()
    for package in packages:
        if settings.debug >= KERNELS:
            print("\n".join(_lines(package, settings.debug)), file=sys.stderr)
        if settings.dump is not None:
            _write(package, settings.dump)


def _lines(package: KernelPackage, debug: int) -> list[str]:
    lines = [f"kernel {package.id} ({package.source.kind})"]
    for key, binary in package.binaries.items():
        taken = binary.resources
        lines.append(
            f"  {key if debug >= CONFIGS else binary.function}: {taken.registers} registers, "
            f"{taken.spills} B spilled, {taken.shared} B shared, {taken.threads} threads"
        )
    if debug >= SOURCES:
        lines.append(package.source.text)
    return lines


def _write(package: KernelPackage, folder: Path) -> None:
    for name, content in package.files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
