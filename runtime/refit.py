"""Engines whose kernels do not fit the GPU that is here: made anew from the graph's text.

Nothing of the folder is executed: the graph is parsed, and our own code generator writes its
kernels again, with default cuts.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec

from ..codegen.base import get_backend
from ..codegen.persistent.beside import launches_of, multiprocessors, without_launches
from ..codegen.program import Program
from ..errors import EngineError, KernelError
from ..ir.parser import parse_graph
from ..targets import Target
from .image import EngineImage


def refit(image: EngineImage) -> EngineImage:
    """The image itself where it fits this machine, or cannot be made to; else one with kernels
    compiled here, with a warning that says so.
    """
    target = Target.parse(image.target)
    if target.is_cpu or image.backend != "triton":
        return image
    if find_spec("triton") is None:
        return _without_launches(image, "Triton, which checks one launch for all layers")
    here = Target.detect()  # an unknown GPU is no error for what does not run on it
    if here.is_cpu:
        return image
    if target.arch == here.arch:
        lacking = None if image.decode is None else _lacking(image.decode.program, here)
        return image if lacking is None else _without_launches(image, lacking)
    return _compiled_anew(image, here, f"was compiled for {target.name} ({target.sm})")


def _lacking(program: Program, here: Target) -> str | None:
    """What launches for all layers need and do not have here, in words; None where they can run."""
    if multiprocessors(program) > here.sms:
        return f"more multiprocessors than the {here.sms} of {here.name}"
    launches = launches_of(program)
    if launches:
        from ..codegen.persistent.loading import launch_source  # brings Triton

        try:
            for call in launches:
                launch_source(call)
        except EngineError:
            return "the version of Tilewright that it was compiled with"
        except (ImportError, AttributeError) as error:  # Gluon is not settled yet
            return f"another Triton ({error})"
    return None


def _without_launches(image: EngineImage, lacking: str) -> EngineImage:
    """The image with separate kernels for decode steps, with a warning where some were one launch
    for all layers.
    """
    decode = image.decode
    if decode is None or not launches_of(decode.program):
        return image
    warnings.warn(
        f"decode steps of {image.name} run as separate kernels, and not as one launch, which needs "
        f"{lacking}.",
        stacklevel=3,
    )
    program = without_launches(decode.program)
    return replace(image, decode=replace(decode, program=program))


def refit_refused(image: EngineImage, error: KernelError) -> EngineImage:
    """The image with kernels compiled here, where the driver refused its own with ``error``.

    Raises:
        KernelError: the same, where Triton is not installed.
    """
    if find_spec("triton") is None:
        raise error
    return _compiled_anew(image, Target.detect(), f"has kernels that do not load ({error.found})")


def _compiled_anew(image: EngineImage, here: Target, why: str) -> EngineImage:
    limit = None if image.lm is None else image.lm.max_model_len
    backend = get_backend(image.backend)
    lowered = backend.lower(parse_graph(image.graphs[-1][1]), here, limit)
    files, decode = dict(lowered.files), image.decode
    if decode is not None:
        most = None if image.lm is None else image.lm.max_batch_size
        graph = parse_graph(decode.graphs[-1][1])
        again = backend.lower(graph, here, limit, max_sequences=most)
        files.update(again.files)
        decode = replace(decode, program=again.program)
    warnings.warn(
        f"{image.name} {why}; its kernels were compiled anew for {here.name} ({here.sm}). "
        f"Compile with target={here.name!r} here to keep them.",
        stacklevel=4,
    )
    return replace(image, target=str(here), program=lowered.program, files=files, decode=decode)
