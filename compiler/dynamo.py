"""`torch.compile(model, backend="tilewright")`: Dynamo's graphs as engines, for inference.

Each graph is compiled when it is first called, with the sizes that Dynamo made symbolic kept
symbolic. Parameters are taken into the engine and watched: one that was replaced or written since
makes the engine anew. What cannot be compiled, what writes to its inputs or returns views of them,
and what needs gradients runs as torch runs it, with one warning that says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import fx

from ..errors import TilewrightError, UnsupportedError, UsageError
from ..runtime.module_engine import ModuleEngine
from .api import compile as compile_engine
from .compat import EXPORT_KEEPS_AUTOCAST
from .dynamo_graph import (
    dynamic_dims,
    freeze,
    refuse_effects,
    size_sources,
    symbolic_examples,
    symbolic_outputs,
)

Outputs: TypeAlias = "tuple[object, ...] | list[object]"
OPTIONS = ("backend", "verify")
# Engines of one graph: beyond this many, compiling costs more than it brings.
MOST_ENGINES = 8
_SAMPLED = 32


def tilewright_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, str] | None = None,
    mode: str | None = None,
) -> Callable[..., Outputs]:
    """The backend that torch.compile finds through its entry point.

    Args:
        gm: Dynamo's graph; parameters and sizes are inputs of it.
        example_inputs: one example an input: fake tensors, symbolic sizes.
        options: ``torch.compile(options=…)``: "backend" and "verify", as `tilewright.compile` takes
            them.
        mode: torch.compile's; there is one mode here, so any is accepted.

    Raises:
        UsageError: an unknown option.
    """
    given = dict(options or {})
    if unknown := sorted(set(given) - set(OPTIONS)):
        raise UsageError(
            f"torch.compile option {unknown[0]!r}",
            expected=f"one of {', '.join(OPTIONS)}",
            found="no option of that name",
            remedy="Leave it out, or correct its name.",
        )
    return CompiledGraph(gm, example_inputs, given)


class CompiledGraph:
    """One graph of Dynamo's, compiled when first called and for shapes that no engine takes yet."""

    def __init__(
        self, gm: fx.GraphModule, examples: Sequence[object], options: Mapping[str, str]
    ) -> None:
        self.gm, self.options = gm, options
        symbolic = symbolic_examples(gm, examples)
        self.dynamic = [dynamic_dims(example) for example in symbolic]
        self.sizes = size_sources(symbolic)
        self.engines: dict[tuple[object, ...], FrozenGraph] = {}
        self.compiled = 0
        self.gave_up = False

    def __call__(self, *args: object) -> Outputs:
        """The graph's outputs, as torch has them where gradients are needed or compiling failed."""
        if self.gave_up or _needs_grad(args) or _loses_autocast(args):
            return self._eager(args)
        try:
            return self._run(args)
        except TilewrightError as error:
            self.gave_up = True
            warnings.warn(f"tilewright runs a graph as torch does: {error}", stacklevel=2)
            return self._eager(args)

    def _run(self, args: Sequence[object]) -> Outputs:
        # Export may fix a size that Dynamo left open; then each size gets an engine of its own.
        for open_sizes in (True, False):
            key = tuple(self._key(i, arg, open_sizes) for i, arg in enumerate(args))
            frozen = self.engines.get(key)
            if frozen is None or frozen.is_stale(args):
                self.engines.pop(key, None)
                frozen = self.engines[key] = self._freeze(args, open_sizes)
            if frozen.takes(args):
                return frozen.run(args)
        raise AssertionError("an engine takes the shapes that it was made for")

    def _freeze(self, args: Sequence[object], open_sizes: bool) -> FrozenGraph:
        if self.compiled == MOST_ENGINES:
            raise UnsupportedError(
                f"a graph that was compiled {MOST_ENGINES} times",
                expected="parameters and sizes that stay the same, or sizes that are dynamic",
                found="another change of them",
                remedy="Mark the dimension with torch._dynamo.mark_dynamic, or update parameters "
                "less often.",
            )
        self.compiled += 1
        return FrozenGraph(self, args, open_sizes)

    def _key(self, index: int, arg: object, open_sizes: bool) -> object:
        if not isinstance(arg, torch.Tensor):
            return None if index in self.sizes else arg
        dynamic = self.dynamic[index] if open_sizes else frozenset()
        shape = tuple(None if d in dynamic and s > 1 else s for d, s in enumerate(arg.shape))
        return (shape, arg.dtype, arg.device)

    def _eager(self, args: Sequence[object]) -> Outputs:
        result: Outputs = self.gm(*args)
        return result


class FrozenGraph:
    """An engine with the parameters of one moment inside."""

    def __init__(self, owner: CompiledGraph, args: Sequence[object], open_sizes: bool) -> None:
        refuse_effects(owner.gm, args)
        self.static = [i for i, arg in enumerate(args) if _is_static(arg)]
        self.seen = self._fingerprint(args)
        # Held, so that no other tensor can come to lie at the same address.
        self.held = [arg.detach() for i in self.static if isinstance(arg := args[i], torch.Tensor)]
        rest = [i for i in range(len(args)) if i not in self.static and i not in owner.sizes]
        self.inputs = [i for i in rest if isinstance(args[i], torch.Tensor)]
        self.numbers = symbolic_outputs(owner.gm)
        engine = compile_engine(
            freeze(owner.gm, args, self.static, owner.sizes),
            tuple(args[i] for i in self.inputs),
            dynamic_shapes=self._dynamic_shapes(owner, args) if open_sizes else None,
            kv_cache=None,
            backend=owner.options.get("backend", "auto"),
            verify=owner.options.get("verify", "structure"),
        )
        assert isinstance(engine, ModuleEngine)
        self.engine = engine

    def is_stale(self, args: Sequence[object]) -> bool:
        """Whether a parameter was replaced or written since."""
        places, values = self._fingerprint(args)
        return places != self.seen[0] or not torch.equal(values, self.seen[1])

    def takes(self, args: Sequence[object]) -> bool:
        """Whether the engine has these shapes."""
        return self.engine.takes(*(args[i] for i in self.inputs))

    def run(self, args: Sequence[object]) -> Outputs:
        """The graph's outputs."""
        found = self.engine(*(args[i] for i in self.inputs))
        assert isinstance(found, tuple | list)
        return [
            value.item() if i in self.numbers and isinstance(value, torch.Tensor) else value
            for i, value in enumerate(found)
        ]

    def _dynamic_shapes(
        self, owner: CompiledGraph, args: Sequence[object]
    ) -> tuple[object, ...] | None:
        shapes = []
        for i in self.inputs:
            tensor = args[i]
            assert isinstance(tensor, torch.Tensor)
            # A size of 1 is always fixed by export; such calls have a key of their own.
            dims = {d: torch.export.Dim.AUTO for d in owner.dynamic[i] if tensor.shape[d] > 1}
            shapes.append(dims or None)
        return (tuple(shapes),) if any(shapes) else None

    def _fingerprint(self, args: Sequence[object]) -> tuple[list[tuple[int, int]], torch.Tensor]:
        """Where each parameter is, how often it was written, and samples for uncounted writes."""
        tensors = [arg.detach() for i in self.static if isinstance(arg := args[i], torch.Tensor)]
        places = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        samples = [
            tensor.as_strided(
                (min(_SAMPLED, n),), (max(1, n // _SAMPLED),), tensor.storage_offset()
            )
            for tensor in tensors
            if (n := tensor.numel()) and tensor.is_contiguous()
        ]
        return places, torch.cat([s.double() for s in samples]) if samples else torch.empty(0)


def _is_static(arg: object) -> bool:
    """Whether Dynamo passes the same tensor at every call: parameters and buffers of the module."""
    marked = getattr(arg, "_dynamo_static_input_type", None) is not None
    return isinstance(arg, torch.Tensor) and (isinstance(arg, torch.nn.Parameter) or marked)


def _loses_autocast(args: Sequence[object]) -> bool:
    """Whether autocast is active and this torch's export would leave its casts out."""
    if EXPORT_KEEPS_AUTOCAST:
        return False
    devices = {arg.device.type for arg in args if isinstance(arg, torch.Tensor)}
    active = any(torch.is_autocast_enabled(device) for device in devices)
    if active:
        _warn_once("tilewright runs a graph under autocast as torch does, before torch 2.13.")
    return active


def _needs_grad(args: Sequence[object]) -> bool:
    if not torch.is_grad_enabled():
        return False
    needed = any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    if needed:
        _warn_once(
            "tilewright compiles for inference: under grad the graph runs as torch runs it. "
            "Call the model under torch.no_grad() or torch.inference_mode()."
        )
    return needed


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
