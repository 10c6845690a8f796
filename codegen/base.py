"""What a backend is, and the table of those that exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import Literal, Protocol, TypeAlias, cast, runtime_checkable

import torch

from ..autotune.store import Store
from ..errors import KernelError, UsageError
from ..ir.graph import Graph
from ..targets import Target
from .program import Call, Program

KVCacheKind: TypeAlias = Literal["paged", "slot"]

CHOICES = "tuning.jsonl"
"""The artifact that says what came of looking configs up: a JSON object a line."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """A backend's answer.

    Attributes:
        program: what to run.
        files: artifacts by path within the engine folder (an ONNX model, a cubin).
        notes: for the report: what fell back to another backend, and why.
    """

    program: Program
    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Kernel(Protocol):
    """A loaded kernel: tensors in, tensors out, both in the order of its call."""

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]: ...


@runtime_checkable
class Keeps(Protocol):
    """A kernel that learns while it runs what a later start of the engine need not find again."""

    def artifacts(self) -> Mapping[str, bytes]:
        """That, as files of the engine folder by path."""
        ...


@runtime_checkable
class Recovers(Protocol):
    """A kernel whose launch may be given up, behind which others would find what it has left."""

    def recover(self) -> KernelError | None:
        """Makes its memory new where a launch was given up, whose error that is. Waits for the
        device.
        """
        ...


ReadFile: TypeAlias = Callable[[str], bytes]
"""Reads an artifact of the engine by its path."""


class Backend(Protocol):
    """Lowers graphs, and loads the kernels of its own calls.

    Attributes:
        name: as ``compile(backend=…)`` takes it.
        kv_cache: the form of KV cache that it serves.
        fuses: whether it takes ``fused`` nodes; else it is given single ops.
        own_kernels: whether kernels of ours compute products where asked to: a causal LM then has a
            decode graph, and may be deterministic.
        reads_codes: whether it has products that read a weight's codes; else such a weight is
            decoded at each call.
        reads_unseen: whether its attention over slots multiplies values that no query sees, by
            zero: a slot must then hold numbers, whatever its last sequence left.
    """

    name: str
    kv_cache: KVCacheKind
    fuses: bool
    own_kernels: bool
    reads_codes: bool
    reads_unseen: bool

    def lower(
        self,
        graph: Graph,
        target: Target,
        max_model_len: int | None = None,
        deterministic: bool = False,
        max_sequences: int | None = None,
        tuning: Store | None = None,
    ) -> Lowered:
        """A Program for the graph.

        Args:
            graph: what to compute.
            target: where.
            max_model_len: bounds the positions of a causal LM.
            deterministic: whether a row of a result may depend on no other rows than those that the
                op reads, to the bit: the same sequence, alone or in a batch, the same numbers.
            max_sequences: bounds the rows of a decode graph, which no kernel needs to be cut for
                beyond; more rows are right all the same. Of a graph over slots, how many there
                are. None for other general graphs.
            tuning: records of which configs of kernels are the fastest; None takes defaults.

        Raises:
            UnsupportedError: a kernel that cannot be compiled, or a deterministic Program that the
                backend cannot make.
        """
        ...

    def load(
        self,
        call: Call,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        read: ReadFile,
        device: torch.device,
    ) -> Kernel:
        """The kernel of one of its calls, for operands on ``device``."""
        ...


_BACKENDS = {
    "eager": ".eager.backend",
    "onnxruntime": ".onnx.backend",
    "tensorrt": ".tensorrt.backend",
    "triton": ".triton.backend",
}

_LIBRARIES = {
    "eager": ("torch",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
}
"""What is installed for a backend; by default a distribution of its name."""


def backend_names() -> tuple[str, ...]:
    """Every backend's name."""
    return tuple(_BACKENDS)


def library_versions() -> str:
    """What the backends run on, where it is installed: "onnxruntime 1.26.0, torch 2.13.0"."""
    names = {name for one in _BACKENDS for name in _LIBRARIES.get(one, (one,))}
    found = []
    for name in sorted(names):
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def get_backend(name: str) -> Backend:
    """The backend called ``name``, imported when first asked for; UsageError for another name."""
    if name not in _BACKENDS:
        raise UsageError(
            f"backend {name!r}",
            expected=f"one of auto, {', '.join(_BACKENDS)}",
            found="no backend of that name",
            remedy="Choose one of those.",
        )
    return cast(Backend, import_module(_BACKENDS[name], __package__).BACKEND)
