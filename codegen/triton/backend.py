"""Lowers graphs to Triton kernels and library calls, and loads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import EngineError
from ...ir.graph import Graph
from ...targets import TARGETS, Target
from ..base import Kernel, KVCacheKind, Lowered, ReadFile
from ..program import Call, Program
from .interpreted import InterpretedKernel
from .library import PREFIX as LIBRARY_PREFIX
from .library import LibraryKernel
from .package import FOLDER, read_package


class OwnBytes(bytes):
    """An artifact that this process made: what comes from a folder is never run as Python."""


class TritonBackend:
    """``backend="triton"``: NVIDIA GPUs; with ``target="cpu"`` Triton's interpreter, for tests."""

    name = "triton"
    kv_cache: KVCacheKind = "paged"
    fuses = True

    def lower(self, graph: Graph, target: Target, max_model_len: int | None = None) -> Lowered:
        """A kernel or library call for each node; what no candidate takes runs in torch, and is
        noted. Kernels are compiled for the target's architecture, all at once.
        """
        from .aot import compile_sources
        from .lowering import lower_graph
        from .package import KernelPackage
        from .show import show_packages

        tuned_for = TARGETS["h100"] if target.is_cpu else target
        program, sources, notes = lower_graph(graph, tuned_for)
        if target.is_cpu:
            packages = [KernelPackage(source, {}) for source in sources]
        else:
            packages = compile_sources(sources, target.arch)
        show_packages(packages)
        files = {
            name: OwnBytes(content)
            for package in packages
            for name, content in package.files().items()
        }
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
            return LibraryKernel(call)
        id = call.kernel.rsplit("/", 1)[1]
        package = read_package(read, id)
        results = [program.buffers[name] for name in call.results]
        if device.type == "cuda":
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


BACKEND = TritonBackend()
