"""Ahead-of-time compilation: kernel sources to packages, in parallel processes, cached by content.

No GPU is needed, and this process never imports Triton's compiler: the workers do. A result is
kept under TILEWRIGHT_CACHE for as long as text, types, constants, target and Triton stay the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

from ...errors import UnsupportedError
from ...settings import current
from ...targets import available_cores
from .package import Binary, KernelPackage, Resources, argument_type, launch_key
from .source import EARLY_START, PDL, KernelSource, Launch
from .workers import Answer, Job, in_workers

ARCHS = (80, 86, 89, 90, 100, 120)
_FIELDS = frozenset({"cubin", "entry", "parameters", "registers", "spilled_bytes"})
_WORKER = ("worker.py", "compat.py", "loading.py", "sass.py")  # what decides an answer
# What Triton, its LLVM and its assembler read from the environment beside TRITON_*.
_SWITCHES = (
    "TRITON_",
    "LLVM_",
    "MLIR_",
    "NVPTX_",
    "PTXAS_",
    "AMDGCN_",
    "DISABLE_LLVM_OPT",
    "DISABLE_MMA_",
    "DISABLE_PTXAS_OPT",
    "ALLOW_LHS_TMEM_",
    "USE_IR_LOC",
    "DUMP_MIR",
)
_JOBS_A_WORKER = 4  # a worker takes a second to start, a kernel 0.1 to 1 s


def compile_sources(sources: Sequence[KernelSource], arch: int) -> list[KernelPackage]:
    """Compiles every launch of every source for one architecture.

    Args:
        sources: what to compile; equal launches are compiled once.
        arch: compute capability, 90 for sm_90.

    Raises:
        UnsupportedError: Triton is not installed, does not know the architecture, or refuses a
            kernel, which is named.
    """
    _check_arch(arch)
    jobs: dict[str, Job] = {}
    wanted: list[dict[str, str]] = []  # of each source: launch key → job key
    for source in sources:
        keys = {}
        for launch in _launches(source):
            job = _job(source, launch, arch)
            key = _content_key(job)
            jobs[key] = job
            keys[launch_key(launch)] = key
        wanted.append(keys)
    answers = _answers(jobs)
    return [
        KernelPackage(
            source, {key: _binary(source, answers[job], arch) for key, job in keys.items()}
        )
        for source, keys in zip(sources, wanted, strict=True)
    ]


def _launches(source: KernelSource) -> list[Launch]:
    return [launch for variant in source.variants for launch in variant.launches]


def _check_arch(arch: int) -> None:
    if arch not in ARCHS:
        raise UnsupportedError(
            f"architecture sm_{arch}",
            expected=f"one of {', '.join(f'sm_{known}' for known in ARCHS)}",
            found=f"sm_{arch}",
            remedy="Use backend='eager' on this device.",
        )


def _job(source: KernelSource, launch: Launch, arch: int) -> Job:
    pdl = launch.pdl and arch >= EARLY_START
    return {
        "text": source.text,
        "function": launch.function,
        "types": [argument_type(argument) for argument in launch.arguments],
        "constexprs": {**launch.constexprs, **({PDL: pdl} if PDL in launch.constexprs else {})},
        "arch": arch,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "contracts": source.contracts,
        "pdl": pdl,
    }


def triton_version() -> str:
    """The installed Triton's version, without importing it.

    Raises:
        UnsupportedError: there is none.
    """
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise UnsupportedError(
            "the Triton backend",
            expected="the package triton, to compile kernels",
            found="none",
            remedy="Run pip install triton (Linux), or use backend='eager'.",
        ) from None


def _content_key(job: Job) -> str:
    content = json.dumps([_worker_code(), job, triton_version()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


@cache
def _worker_code() -> str:
    """A hash of the code that answers: with another one, what is kept may be wrong."""
    folder = Path(__file__).parent
    texts = b"".join((folder / name).read_bytes() for name in _WORKER)
    return hashlib.sha256(texts).hexdigest()


def _answers(jobs: Mapping[str, Job]) -> Mapping[str, Answer]:
    folder = current().cache / "kernels"
    known = {key: _cached(folder / f"{key}.json") for key in jobs}
    answers = {key: answer for key, answer in known.items() if answer is not None}
    missing = [key for key in jobs if key not in answers]
    if missing:
        count = min(available_cores(), -(-len(missing) // _JOBS_A_WORKER))
        shares = [missing[i::count] for i in range(count)]
        found = in_workers([[jobs[key] for key in share] for share in shares], worker_environment())
        for share, some in zip(shares, found, strict=True):
            answers.update(zip(share, some, strict=True))
        for key in missing:
            if "error" not in answers[key]:
                _keep(folder / f"{key}.json", answers[key])
    return answers


def worker_environment() -> dict[str, str]:
    """This process's environment, without the switches that would change what Triton makes: the key
    of what is kept does not know them.
    """
    found = {k: v for k, v in os.environ.items() if not k.startswith(_SWITCHES)}
    found["TRITON_DISABLE_LINE_INFO"] = "1"  # equal text, equal bytes, wherever it lay
    # Where the worker starts is first on its path: an empty folder, lest files of the user's
    # working directory stand for modules.
    found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    return found


def _binary(source: KernelSource, answer: Answer, arch: int) -> Binary:
    if "error" in answer:
        raise UnsupportedError(
            f"kernel {source.name}",
            expected=f"a kernel that Triton {triton_version()} compiles for sm_{arch}",
            found=str(answer["error"])[-300:],  # Triton shows the code first, then what is wrong
            remedy="Report it with the kernel's source (TILEWRIGHT_DEBUG=4); backend='eager' runs "
            "without.",
        )
    resources = Resources(
        answer["registers"],
        answer["local_bytes"],
        answer["spilled_bytes"],
        answer["shared"],
        answer["threads"],
    )
    return Binary(
        answer["entry"],
        arch,
        base64.b64decode(answer["cubin"]),
        resources,
        tuple(answer["parameters"]),
        answer["scratch_bytes"],
        answer["scratch_align"],
        answer["cluster"],
        answer["pdl"],
        answer["cooperative"],
    )


def _cached(path: Path) -> Answer | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: compile anew
        return None
    return found if isinstance(found, dict) and set(found) >= _FIELDS else None


def _keep(path: Path, answer: Answer) -> None:
    """Writes a cache entry whole or not at all; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            json.dump(answer, file)
        os.replace(file.name, path)
    except OSError:
        return
