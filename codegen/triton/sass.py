"""What compiled kernels take, read with the tools that Triton brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from .compat import assembler

_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
# "/*00b0*/  @!P0 LDG.E.128 R12, desc[UR6][R4.64] ;": the name stands behind the guard, if any.
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.\w+)*)", re.MULTILINE
)
_LABEL = re.compile(r"^\s*(\.L_x_\w+):")
_BRANCH = re.compile(r"\bBRA\b[^;]*`\((\.L_x_\w+)\)")


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


def spilled_bytes(ptx: str, arch: int, folder: Path, *, contracts: bool) -> int:
    """Bytes of registers that a thread keeps in local memory, as the assembler reports them.

    Local memory alone does not tell: an array that is indexed at run time lies there too, such as
    the bits of 2 / pi with which sin and cos reduce large arguments.
    """
    path = folder / "spills.ptx"
    path.write_text(ptx, encoding="utf-8")
    target = _TARGET.search(ptx)
    assert target is not None, "PTX names its target"
    options = ["-v", f"--gpu-name={target[1]}", str(path), "-o", "/dev/null"]
    command = [*assembler(arch, contracts=contracts), *options]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(stores) + int(loads) for stores, loads in _SPILLS.findall(text))


def code_listing(cubin: bytes) -> str:
    """A cubin's machine code as text, with labels.

    Raises:
        ValueError: what is no cubin, or holds no code.
    """
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        path = Path(folder, "code.cubin")
        path.write_bytes(cubin)
        # Only the code, and without the analysis of its jumps, which counting has no use for.
        command = [_tool("nvdisasm"), "--print-code", "--no-dataflow", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not _INSTRUCTION.search(done.stdout):
        raise ValueError(f"no code in the cubin: {(done.stderr or done.stdout)[:200]}")
    return done.stdout


def instruction_counts(listing: str) -> Mapping[str, int]:
    """How often each machine instruction stands in a listing, by its full name with all modifiers
    ("LDG.E.128"), guards left out; NOP, which only fills, is not counted.
    """
    counts = Counter(_INSTRUCTION.findall(listing))
    del counts["NOP"]
    return counts


def loop_instructions(listing: str) -> int:
    """How many instructions stand in a listing's innermost loops, each counted once: from the
    target of a branch that goes back to the branch.
    """
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}  # of each loop, by where it begins
    count = 0
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = count
        elif (found := _INSTRUCTION.match(line)) and found[1] != "NOP":
            target = _BRANCH.search(line)
            start = labels.get(target[1]) if target is not None else None
            if start is not None and start < count:  # one that jumps to itself ends the code
                ends[start] = count
            count += 1
    innermost = [
        range(start, end + 1)
        for start, end in ends.items()
        if not any(start <= a and b <= end and a != start for a, b in ends.items())
    ]
    return len({index for loop in innermost for index in loop})


def _tool(name: str) -> str:
    """A tool of CUDA: the one that Triton brings, found without importing Triton."""
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if own.is_file():
            return str(own)
    return name
