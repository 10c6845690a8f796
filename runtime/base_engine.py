"""What all engines are: an image, and if this machine has the device, its weights and kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..codegen.program import Json
from ..errors import EngineError
from ..targets import Target, gpu_problem
from .folder import save_engine
from .image import EngineImage
from .runner import ProgramRunner
from .weights import LoadReport, place_weights


class Engine:
    """A compiled model, which can be saved. `load` and `tw.compile` make the right kind of it.

    One that was compiled for another device than this machine's is of this class itself.
    """

    def __init__(self, image: EngineImage) -> None:
        self.image = image

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Runs the model.

        Raises:
            EngineError: the engine is for another device.
        """
        check_device(self.image)
        raise AssertionError("engines for this device are of a subclass")

    @property
    def target(self) -> Target:
        """The device that it was compiled for."""
        return Target.parse(self.image.target)

    def save(self, path: str | Path, weights: str = "embed") -> None:
        """Writes the engine folder; one that is there already is replaced whole, or stays whole.

        Args:
            path: of the folder.
            weights: "embed" copies them into it; "reference" refers to the checkpoint that the
                model was compiled from, whose files have to stay as they are.

        Raises:
            EngineError: the folder cannot be written.
            UsageError: weights that are to be referred to, and that no file or seed backs.
        """
        save_engine(self.image, path, weights)

    def report(self) -> Mapping[str, Json]:
        """What compiling found: passes, calls by backend, what fell back and why."""
        return self.image.report


class RunningEngine(Engine):
    """An engine with its weights and kernels loaded.

    Attributes:
        weight_load: what loading the weights took.
        runner: of the Program that takes any input; ``decode_runner``: of the one for decode steps
            of a causal LM, None where there is none.

    Raises:
        EngineError: this machine does not have the device that it was compiled for.
        CapacityError: the weights do not fit the device.
    """

    def __init__(self, image: EngineImage) -> None:
        super().__init__(image)
        check_device(image)
        device = torch.device(self.target.device_type)
        if device.type == "cuda":  # the current one is another in each thread
            device = torch.device("cuda", torch.cuda.current_device())
        loaded = place_weights(image.weights, device)
        self.weight_load: LoadReport = loaded.report
        # A module's results are the user's, to write to and to differentiate behind.
        inside = image.kind == "causal_lm"
        read = image.files.__getitem__
        self.runner = ProgramRunner(
            image.program, loaded.tensors, read, device=device, inference=inside
        )
        self.decode_runner: ProgramRunner | None = None
        if image.decode is not None:
            self.decode_runner = ProgramRunner(
                image.decode.program, loaded.tensors, read, device=device, inference=inside
            )

    def save(self, path: str | Path, weights: str = "embed") -> None:
        """As `Engine.save`, with what kernels have learnt since, such as TensorRT's compiled ones:
        the next start from that folder is quicker.
        """
        kept = self.runner.artifacts()
        if self.decode_runner is not None:
            kept.update(self.decode_runner.artifacts())
        files = {**self.image.files, **kept} if kept else self.image.files
        save_engine(replace(self.image, files=files), path, weights)


def runs_here(target: Target) -> bool:
    """Whether this machine has the device: any CPU, or a GPU of the same architecture."""
    return target.is_cpu or Target.detect().arch == target.arch


def check_device(image: EngineImage) -> None:
    """EngineError when this machine is not what the engine was compiled for."""
    target = Target.parse(image.target)
    if not runs_here(target):
        here = Target.detect()
        problem = gpu_problem()
        raise EngineError(
            f"engine {image.name}",
            expected=f"a {target.sm} device, which it was compiled for ({target.name})",
            found=f"{here.name} ({here.sm})" + (f": {problem}" if problem else ""),
            remedy=f"Run it on such a device, or compile with target={here.name!r}.",
        )
