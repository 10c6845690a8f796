"""What compiled kernels take, read with the tools that Triton brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
# "/*00b0*/  @!P0 LDG.E.128 R12, desc[UR6][R4.64] ;": the name stands behind the guard, if any.
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.\w+)*)", re.MULTILINE
)
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


def instruction_counts(cubin: bytes) -> Mapping[str, int]:
    """How often each machine instruction stands in a cubin's code, by its full name with all
    modifiers ("LDG.E.128"), guards left out; NOP, which only fills, is not counted.

    Raises:
        ValueError: what is no cubin, or holds no code.
    """
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        path = Path(folder, "code.cubin")
        path.write_bytes(cubin)
        # Only the code, and without the analysis of its jumps, which counting has no use for.
        command = [_tool("nvdisasm"), "--print-code", "--no-dataflow", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    counts = Counter(_INSTRUCTION.findall(done.stdout))
    del counts["NOP"]
    if done.returncode or not counts:
        raise ValueError(f"no code in the cubin: {(done.stderr or done.stdout)[:200]}")
    return counts


def _tool(name: str) -> str:
    """A tool of CUDA: the one that Triton brings, found without importing Triton."""
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if own.is_file():
            return str(own)
    return name.removesuffix("-blackwell")
