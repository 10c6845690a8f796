"""Kernels that nobody compiled, for tests of what an engine does with kernels: an engine of a tiny
model has two dozen, and Triton takes a second for each. That they compile is tested elsewhere.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from tilewright.codegen.triton import aot
from tilewright.codegen.triton.workers import Answer, Job


@contextmanager
def canned_binaries() -> Iterator[None]:
    """While it lasts, a binary's code is the text of what was asked for."""

    def answers(jobs: Mapping[str, Job]) -> Mapping[str, Answer]:
        return {key: _answer(job) for key, job in jobs.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "_answers", answers)
        yield


def _answer(job: Job) -> Answer:
    return {
        "cubin": base64.b64encode(json.dumps(job, sort_keys=True).encode()).decode(),
        "entry": job["function"],
        "registers": 32,
        "local_bytes": 0,
        "spilled_bytes": 0,
        "shared": 0,
        "threads": job["num_warps"] * 32,
        # Behind its own arguments, a kernel takes the addresses of scratch memory.
        "parameters": ["u32" if type_ == "i32" else "u64" for type_ in job["types"]] + ["u64"] * 2,
        "scratch_bytes": 0,
        "scratch_align": 1,
        "cluster": 1,
        "pdl": job["pdl"],
        "cooperative": False,
    }
