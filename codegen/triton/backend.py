"""Lowers graphs to Triton kernels and library calls, and loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...autotune.store import Store
from ...errors import EngineError, UnsupportedError
from ...ir.graph import Graph
from ...targets import TARGETS, Target
from ..base import CHOICES, Kernel, KVCacheKind, Lowered, ReadFile
from ..persistent.beside import PERSISTENT_PREFIX
from ..program import Call, Program
from .interpreted import InterpretedKernel
from .kernels.linear_tiles import Cutting
from .library import PREFIX as LIBRARY_PREFIX
from .library import LibraryKernel
from .package import FOLDER, KernelPackage, read_package
from .source import Pointer

if TYPE_CHECKING:
    from .tuning.choices import Choices


class OwnBytes(bytes):
    """An artifact that this process made: what comes from a folder is never run as Python."""


class TritonBackend:
    """``backend="triton"``: NVIDIA GPUs; with ``target="cpu"`` Triton's interpreter, for tests."""

    name = "triton"
    kv_cache: KVCacheKind = "paged"
    fuses = True
    own_kernels = True
    reads_codes = True
    reads_unseen = False

    def lower(
        self,
        graph: Graph,
        target: Target,
        max_model_len: int | None = None,
        deterministic: bool = False,
        max_sequences: int | None = None,
        tuning: Store | None = None,
    ) -> Lowered:
        """A kernel or library call for each node; what no candidate takes runs in torch, and is
        noted. Kernels are compiled for the target's architecture, all at once.
        """
        from .show import show_packages

        tuned_for = TARGETS["h100"] if target.is_cpu else target
        chosen = None
        if tuning is not None:
            chosen = _choices(tuning, tuned_for, max_sequences, max_model_len)
        made = _Made(graph, tuned_for, not target.is_cpu, deterministic, max_sequences)
        program, packages, notes, chosen = made.of_choices(chosen)
        show_packages(packages)
        files = {
            name: OwnBytes(content)
            for package in packages
            for name, content in package.files().items()
        }
        if chosen is not None and chosen.found:
            files[CHOICES] = OwnBytes(chosen.lines())
        return Lowered(program, files, notes)

    def load(
        self,
        call: Call,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        read: ReadFile,
        device: torch.device,
    ) -> Kernel:
        """A library function, or a kernel: on the device where the weights are, else interpreted.

        Raises:
            EngineError: a kernel's files are damaged, or no GPU is there to run it.
        """
        if call.kernel.startswith(LIBRARY_PREFIX):
            try:
                return LibraryKernel(call)
            except KeyError as error:
                raise _unknown(call) from error
        if call.kernel.startswith(PERSISTENT_PREFIX):
            from ..persistent.loading import load_persistent

            return load_persistent(call, program, weights, read, device)
        id = call.kernel.rpartition("/")[2]
        package = read_package(read, id)
        _check_arguments(package, call, program)
        results = [program.buffers[name] for name in call.results]
        if device.type == "cuda":
            if not package.binaries:
                raise _unknown(call)
            from .launch import LaunchedKernel

            return LaunchedKernel(package, results, call.aliases, device)
        if not isinstance(read(f"{FOLDER}/{id}/kernel.py"), OwnBytes):
            raise EngineError(
                f"kernel {id}",
                expected="a GPU to run it on; files of an engine folder are never run as Python",
                found="a CPU",
                remedy="Run the engine on a machine with the GPU it was compiled for.",
            )
        return InterpretedKernel(package.source, results, call.aliases, device)


@dataclass(frozen=True, slots=True)
class _Made:
    """A graph, lowered and compiled by choices.

    Attributes:
        graph, target, deterministic, max_sequences: as `TritonBackend.lower` has them.
        compiles: whether there is a device to compile for.
    """

    graph: Graph
    target: Target
    compiles: bool
    deterministic: bool
    max_sequences: int | None

    def of_choices(
        self, chosen: Choices | None
    ) -> tuple[Program, list[KernelPackage], tuple[str, ...], Choices | None]:
        """The Program, its kernels, notes, and the choices that hold: those on trial are dropped
        where a kernel of theirs does not compile, or spills.
        """
        try:
            program, packages, notes = self._compiled(chosen)
            if chosen is None or not chosen.on_trial or self._are_sound(packages):
                return program, packages, notes, chosen
        except UnsupportedError:
            if chosen is None or not chosen.on_trial:
                raise
        assert chosen is not None
        chosen = chosen.without_trials()
        return *self._compiled(chosen), chosen

    def _compiled(
        self, chosen: Choices | None
    ) -> tuple[Program, list[KernelPackage], tuple[str, ...]]:
        from .aot import compile_sources
        from .lowering import lower_graph

        cutting = Cutting(self.max_sequences, chosen)
        program, sources, notes = lower_graph(
            self.graph, self.target, self.deterministic, cutting, chosen
        )
        if self.compiles:
            return program, compile_sources(sources, self.target.arch), notes
        return program, [KernelPackage(source, {}) for source in sources], notes

    def _are_sound(self, packages: Sequence[KernelPackage]) -> bool:
        from .tuning.tunable import why_not

        return all(why_not(package, self.target) is None for package in packages)


def _choices(
    tuning: Store, target: Target, max_sequences: int | None, max_model_len: int | None
) -> Choices:
    from .tuning.choices import Choices
    from .tuning.conditions import conditions_here

    return Choices(tuning, target, conditions_here(), max_sequences, max_model_len)


def _check_arguments(package: KernelPackage, call: Call, program: Program) -> None:
    """EngineError for a kernel that reads or writes what its call does not give it."""
    given = {"operand": call.operands, "result": call.results}
    for variant in package.source.variants:
        for launch in variant.launches:
            for argument in launch.arguments:
                if not isinstance(argument, Pointer):
                    continue
                if argument.role in ("workspace", "counter"):
                    spaces = len(variant.workspaces)
                    there = spaces if argument.role == "workspace" else variant.counters != 0
                    if argument.index >= there:
                        raise _unknown(call)
                    continue
                names = given[argument.role]
                name = names[argument.index] if argument.index < len(names) else None
                if name is None or program.buffers[name].dtype is not argument.dtype:
                    raise _unknown(call)


def _unknown(call: Call) -> EngineError:
    return EngineError(
        f"call of {call.kernel}",
        expected="a kernel of this version, whose arguments are those of the call",
        found=f"operands {call.operands}, results {call.results}",
        remedy="Compile the model again with this version.",
    )


BACKEND = TritonBackend()
