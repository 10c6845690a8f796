"""Builds the engine of a described network, on a machine without a GPU where the flavor can."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from ...errors import UnsupportedError
from .assemble import Assembly
from .flavor import RTX, Flavor, first_error, listener
from .network import Network
from .profiles import Profile, check_profiles

_UNFUSED = "decomposable"  # TensorRT's own word, in the error of attention without a kernel
BY_PARTS = "attention is computed by parts: TensorRT has no fused kernel of it for {}"


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that was built.

    Attributes:
        archs: the architectures that it is for.
        bytes: its size.
        seconds: that the build took.
        fused: whether every attention layer is one kernel.
        notes: what a user may want to know of it.
    """

    archs: tuple[int, ...]
    bytes: int
    seconds: float
    fused: bool
    notes: tuple[str, ...]


def build_engine(
    network: Network,
    flavor: Flavor,
    archs: Sequence[int],
    profiles: Sequence[Profile],
    file: BinaryIO,
    strict: bool = False,
) -> Built:
    """Writes an engine to ``file``, as it is serialized: it is never whole in memory.

    Args:
        network: what to compute.
        flavor: the TensorRT to build with.
        archs: the architectures that the engine is to run on, 89 for sm_89.
        profiles: for its dynamic sizes.
        file: empty, and of no use where an error is raised.
        strict: whether attention that is not one kernel is an error, rather than a note.

    Raises:
        UsageError: a dynamic size without a range in a profile.
        UnsupportedError: an architecture that the flavor does not build for, a network that it
            refuses, or attention in parts where ``strict``.
    """
    check_profiles(network, profiles)
    flavor.check(archs, network.dtypes)
    if strict and network.notes:
        raise _strict(network.notes[0])
    start = time.perf_counter()
    targets = ", ".join(f"sm_{arch}" for arch in archs)
    notes = list(network.notes)
    fused = not network.notes
    build = _Build(network, flavor, archs, profiles, file)
    refused = build(fused=True)
    if refused is not None and build.unfused:
        notes.append(BY_PARTS.format(targets))
        if strict:
            raise _strict(notes[-1])
        fused = False
        refused = build(fused=False)
    if refused is not None:
        raise UnsupportedError(
            f"the network for {targets}",
            expected=f"one that {flavor.name} {flavor.version} builds",
            found=refused,
            remedy="Use another dtype or scheme, or --emit onnx; nothing was written.",
        )
    seconds = time.perf_counter() - start
    return Built(tuple(archs), file.tell(), seconds, fused, tuple(notes))


def _strict(note: str) -> UnsupportedError:
    return UnsupportedError(
        "option strict",
        expected="attention in kernels of TensorRT's own",
        found=note,
        remedy="Leave strict out, or use a 16-bit dtype.",
    )


@dataclass(slots=True)
class _Build:
    """What is to be built, where it goes, and what TensorRT said when it last was."""

    network: Network
    flavor: Flavor
    archs: Sequence[int]
    profiles: Sequence[Profile]
    file: BinaryIO
    errors: list[str] = field(default_factory=list)

    @property
    def unfused(self) -> bool:
        """Whether a refusal was for attention without a kernel, whatever else was said."""
        return any(_UNFUSED in error for error in self.errors)

    def __call__(self, fused: bool) -> str | None:
        """Builds into the file, from its start; why TensorRT refuses, None where it does not."""
        api = self.flavor.api
        self.file.seek(0)
        self.file.truncate()
        errors = self.errors = []
        builder = api.Builder(listener(api, errors))
        made = builder.create_network(_flags(api))
        assembly = Assembly(api, made, self.network, fused)
        try:
            assembly.run()
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            # A layer that TensorRT does not make is None, and what it does not take is an error.
            return first_error(errors) or f"{type(error).__name__}: {error}"
        config = self._config(builder)
        if builder.build_serialized_network_to_stream(made, config, _writer(api, self.file)):
            return None
        return first_error(errors) or "no reason given"

    def _config(self, builder: Any) -> Any:
        api, config = self.flavor.api, builder.create_builder_config()
        config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # names in the engine
        for profile in self.profiles:
            made = builder.create_optimization_profile()
            for tensor in self.network.inputs:
                made.set_shape(tensor.name, *profile.shapes(tensor))
            config.add_optimization_profile(made)
        if self.flavor.name == RTX:
            config.num_compute_capabilities = len(self.archs)
            for index, arch in enumerate(self.archs):
                member = getattr(api.ComputeCapability, f"SM{arch}")
                config.set_compute_capability(member, index)
        return config


def _flags(api: Any) -> int:
    """Strongly typed: what newer ones are always, and older ones where they are told."""
    flag = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _writer(api: Any, file: BinaryIO) -> Any:
    class Writer(api.IStreamWriter):  # type: ignore[misc]
        """Passes an engine on, a piece at a time."""

        def __init__(self) -> None:
            api.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()
