"""What compiled kernels take, read with the tools that Triton brings."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
_BLACKWELL = 100


def resource_usage(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers and bytes of local memory (stack included) a thread of a cubin's kernel."""
    path = folder / "resources.cubin"
    path.write_bytes(cubin)
    command = [_tool("cuobjdump"), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(text)
    if found is None:
        raise ValueError(f"no resource usage in: {text[:200]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def spilled_bytes(ptx: str, arch: int, folder: Path) -> int:
    """Bytes of registers that a thread keeps in local memory, as the assembler reports them.

    Local memory alone does not tell: an array that is indexed at run time lies there too, such as
    the bits of 2 / pi with which sin and cos reduce large arguments.
    """
    path = folder / "spills.ptx"
    path.write_text(ptx, encoding="utf-8")
    target = _TARGET.search(ptx)
    assert target is not None, "PTX names its target"
    tool = _tool("ptxas-blackwell" if arch >= _BLACKWELL else "ptxas")
    command = [tool, "-v", f"--gpu-name={target[1]}", str(path), "-o", "/dev/null"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(stores) + int(loads) for stores, loads in _SPILLS.findall(text))


def _tool(name: str) -> str:
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(own) if own.is_file() else name.removesuffix("-blackwell")
