"""What the verbs of ``tilewright bench`` share: lists of numbers, and the model to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from .console import print_warning
from .options import check_model, is_engine

if TYPE_CHECKING:
    from ...runtime.engine import CausalLMEngine
    from ..bench.machine import Machine
    from ..bench.reference import ReferenceModel


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes from a comma list, each once.

    Raises:
        UsageError: what is no positive integer.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise UsageError(
                "option --batch",
                expected="a comma list of integers, 1 or more",
                found=repr(part),
                remedy="Write for example --batch 1,8,32.",
            )
    return tuple(dict.fromkeys(map(int, parts)))


def parse_only(text: str | None) -> tuple[str, ...]:
    """Names from a comma list, each once; none of them is checked here."""
    parts = (part.strip() for part in (text or "").split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def probe(engine: CausalLMEngine) -> Machine:
    """The machine that an engine runs on: its load, and its rates."""
    import torch

    from ..bench.machine import probe_machine

    return probe_machine(str(engine.target), torch.device(engine.target.device_type))


def warn_if_busy(machine: Machine) -> None:
    """Says on stderr when others take the cores."""
    if machine.is_busy:
        print_warning(
            f"the machine is busy (load {machine.load:.1f} on {machine.cores} cores): figures are "
            "rough, repeat when it is idle"
        )


def uncompiled(
    loaded: CausalLMEngine, engine: str, reference: str | Path | None
) -> Callable[[], ReferenceModel]:
    """Makes the model that the contenders run: on the engine's device, in its element type; where
    the engine's weights are random, with random ones too.
    """
    import torch

    from ..bench.latency import engine_dtype
    from ..bench.reference import ReferenceModel

    report = loaded.report()
    path, seed = checkpoint_of(engine, reference, report), random_seed(report)
    device = torch.device(loaded.target.device_type)
    # A CPU computes in float32 at its best, whatever the engine does.
    dtype = torch.float32 if device.type == "cpu" else engine_dtype(loaded)
    return lambda: ReferenceModel(path, dtype=dtype, device=device, random_weights=seed)


def random_seed(report: Mapping[str, object]) -> int | None:
    """The seed of an engine whose weights are random; None for one from a checkpoint."""
    model = report.get("model")
    seed = model.get("random_weights") if isinstance(model, dict) else None
    return seed if isinstance(seed, int) else None


def checkpoint_of(engine: str, reference: str | Path | None, report: Mapping[str, object]) -> str:
    """Where the uncompiled model is."""
    model = report.get("model")
    named = model.get("name") if isinstance(model, dict) else None
    path = str(reference or (named if is_engine(engine) else check_model(engine).path))
    if not Path(path).exists():
        raise UsageError(
            "option --reference",
            expected="the model that the engine was compiled from",
            found=f"nothing at {path}",
            remedy="Name it: --reference MODEL.",
        )
    return path
