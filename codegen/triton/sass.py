"""What a cubin tells of itself, read with the disassembler that Triton brings."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)")


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


def _tool(name: str) -> str:
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(own) if own.is_file() else name
