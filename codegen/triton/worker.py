"""A process that compiles kernels: jobs come as JSON lines, results go back as JSON lines.

It imports neither torch nor the rest of Tilewright's compiler, and never touches a GPU. Run as
``python -m tilewright.codegen.triton.worker``.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
import traceback
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from .compat import compile_ahead_of_time, in_its_words
from .loading import module_of
from .sass import resource_usage, spilled_bytes

_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z]\d+)")


def main(jobs: TextIO, results: TextIO) -> None:
    """Answers every job; one that fails is answered with its error."""
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        for line in jobs:
            try:
                answer = _compiled(json.loads(line), Path(folder))
            except Exception as error:  # a bad kernel must not take the others with it
                trace = traceback.format_exc(limit=-3)
                answer = {"error": f"{type(error).__name__}: {error}", "trace": trace}
            results.write(json.dumps(answer) + "\n")
            results.flush()


# A source has several launches; reading its functions takes a tenth of what compiling one takes.
@lru_cache(maxsize=16)
def _module(text: str, folder: Path) -> ModuleType:
    return module_of(in_its_words(text), folder)


def _compiled(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    function = getattr(_module(job["text"], folder), job["function"])
    compiled = compile_ahead_of_time(
        function,
        job["types"],
        job["constexprs"],
        arch=job["arch"],
        num_warps=job["num_warps"],
        num_stages=job["num_stages"],
        contracts=job["contracts"],
        pdl=job["pdl"],
    )
    cubin, metadata = compiled.asm["cubin"], compiled.metadata
    registers, local = resource_usage(cubin, folder)
    spilled = 0
    if local:
        given = compiled.asm["ptx"], job["arch"], folder
        spilled = spilled_bytes(*given, contracts=job["contracts"])
    return {
        "cubin": base64.b64encode(cubin).decode(),
        "entry": metadata.name,
        "registers": registers,
        "local_bytes": local,
        "spilled_bytes": spilled,
        "shared": metadata.shared,
        "threads": metadata.num_warps * 32,
        "parameters": ptx_parameters(compiled.asm["ptx"], metadata.name),
        "scratch_bytes": metadata.global_scratch_size or 0,
        "scratch_align": metadata.global_scratch_align or 1,
        "cluster": getattr(metadata, "num_ctas", 1),
        "pdl": bool(getattr(metadata, "launch_pdl", False)),
        "cooperative": bool(getattr(metadata, "launch_cooperative_grid", False)),
    }


def ptx_parameters(ptx: str, entry: str) -> list[str]:
    """Types of an entry point's parameters, in order: "u64", "u32", …"""
    head = ptx.split(f".entry {entry}(", 1)[1].split(")", 1)[0]
    return _PARAMETER.findall(head)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Triton's dumps (NVPTX_ENABLE_DUMP, …) and whatever else prints
    main(sys.stdin, answers)
