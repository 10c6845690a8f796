"""A model's persistent kernel with its memory: one launch a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...errors import KernelError, UsageError
from ..triton.package import Binary
from ..triton.source import KernelSource
from .generate import PARAMETERS, TIMED
from .reading import Attention, Shape
from .table import make_calls, make_items
from .tiling import Tiling
from .trace import MARKS, StepTrace, trace_of

LIMIT = 1 << 20
"""Polls of a wait until the launch is given up: about a second on an H100."""
_LINE = 32  # i32 between counters that programs wait for
INPUTS = ("token_ids", "positions", "seq_lens", "slot_mapping", "block_tables")
"""What the kernel reads of a step, by the graph's names."""

Launcher = Callable[[Sequence[torch.Tensor | int]], None]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a launch that was given up had waited for.

    Attributes:
        waits: how many waits were given up.
        call, program: the first of them: which call's input, in which program.
        expected, found: what the counter should have reached, and where it was.
    """

    waits: int
    call: int
    program: int
    expected: int
    found: int


class CacheTables:
    """Tables on a device that hold the addresses of caches, made once for each set of these.

    Args:
        shape: whose caches they are.
        device: where the tables lie.
        make: a table of addresses by name.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        make: Callable[[Mapping[str, int]], torch.Tensor],
    ) -> None:
        self._names = [name for step in shape.calls for name in step.caches if name]
        self._device, self._make = device, make
        self._made: dict[tuple[int, ...], torch.Tensor] = {}

    def at(self, caches: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The table of these caches.

        Raises:
            UsageError: a cache that is missing or not dense.
            KernelError: caches at addresses that are new, while a CUDA graph is captured.
        """
        for name in self._names:
            check_memory(name, caches.get(name))
        key = tuple(caches[name].data_ptr() for name in self._names)
        found = self._made.get(key)
        if found is not None:
            return found
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise KernelError(
                "a step of one launch in a CUDA graph",
                expected="caches that a step has run with before the capture",
                found="others",
                remedy="Run a step with these caches first.",
            )
        found = self._make(dict(zip(self._names, key, strict=True))).to(self._device)
        self._made[key] = found
        return found


class PersistentDecode:
    """The decode step of a model for ``tiling.batch`` sequences, in one launch.

    Args:
        shape, tiling: what was compiled.
        weights: by name, contiguous and 16-byte aligned, on the device.
        launch: launches the kernel over its arguments (`on_device`, `in_interpreter`).
        device: where all of it lies.
        timed: whether the kernel notes times.
        limit: polls of a wait until a launch is given up.

    Attributes:
        results: of each call by name, bf16[batch, N].
        logits: bf16[batch, V] of the last step; NaN after a launch that was given up.
        tokens: i64[batch], the likeliest ones, -1 where logits are not finite.
        timeline: i64[programs, calls, 3] in ns (`MARKS`) of the last step; empty without times.

    Raises:
        UsageError: a weight that is missing or lies elsewhere.
    """

    def __init__(
        self,
        shape: Shape,
        tiling: Tiling,
        weights: Mapping[str, torch.Tensor],
        launch: Launcher,
        device: torch.device,
        timed: bool = False,
        limit: int = LIMIT,
    ) -> None:
        self.shape, self.tiling, self.limit = shape, tiling, limit
        self.device, self._launch = device, launch
        results = {
            name: torch.zeros(tiling.batch, size, dtype=torch.bfloat16, device=device)
            for name, size in shape.results.items()
        }
        self.results = results
        self._kept = dict(weights)  # the tables hold their addresses, and those of results
        self.logits = results[shape.calls[-1].out]
        for name in weight_names(shape):
            check_memory(name, weights.get(name))
        self._where = {name: tensor.data_ptr() for name, tensor in {**weights, **results}.items()}
        memory = {n: t.to(device) for n, t in _memory(shape, tiling, timed).items()}
        memory["items"] = make_items(shape, tiling, self._where).to(device)
        memory["inv_freq"] = weights[shape.inv_freq]
        self.memory = memory
        self.tokens, self.timeline = memory["tokens"], memory["timeline"]
        self._names = [name for name in PARAMETERS if timed or name not in TIMED]
        self._tables = CacheTables(shape, device, self._table)

    def run(self, inputs: Mapping[str, torch.Tensor], caches: Mapping[str, torch.Tensor]) -> None:
        """Queues a step.

        Args:
            inputs: `INPUTS` by name, of as many sequences, on the device.
            caches: bf16[N, P, G, D] by name; keys and values are written there.

        Raises:
            UsageError: a cache that is missing or not dense.
            KernelError: caches at addresses that are new, while a CUDA graph is captured: their
                table has to be copied to the device before.
        """
        given = {**self.memory, **inputs, "calls": self._tables.at(caches)}
        pages = inputs["block_tables"].shape[1]
        self._launch([*(given[name] for name in self._names), pages, self.limit])

    def _table(self, caches: Mapping[str, int]) -> torch.Tensor:
        return make_calls(self.shape, self.tiling, {**self._where, **caches})

    def diagnosis(self) -> Diagnosis | None:
        """What launches so far were given up for, None if none was. Waits for the device."""
        waits, *first = self.memory["diagnosis"][:5].tolist()
        return Diagnosis(waits, *first) if waits else None

    def check(self) -> None:
        """Waits for the device.

        Raises:
            KernelError: a launch was given up, since programs waited in vain.
        """
        found = self.diagnosis()
        if found is None:
            return
        step = self.shape.calls[found.call]
        raise KernelError(
            f"call {found.call} of {len(self.shape.calls)} of the persistent decode kernel "
            f"({type(self.shape.form(step)).__name__} of {step.weight or step.x})",
            expected=f"{found.expected} arrivals of the call before",
            found=f"{found.found} in program {found.program}; {found.waits} waits were given up",
            remedy="Report it, then call reset(); the decode graph has a launch for each call.",
        )

    def trace(self, title: str) -> StepTrace:
        """When each program met, began and ended each call of the last step, and on which
        multiprocessor. Waits for the device.

        Raises:
            UsageError: the kernel notes no times.
        """
        if not self.timeline.numel():
            raise UsageError(
                "trace of the persistent decode kernel",
                expected="a kernel that notes times",
                found="one that does not",
                remedy="Make source and PersistentDecode with timed=True.",
            )
        calls = self.shape.calls
        return trace_of(title, self.shape, calls, self.timeline, self.memory["places"])

    def reset(self) -> None:
        """Makes the counters new, after a launch that was given up or cut off."""
        self.memory["counters"].zero_()
        self.memory["diagnosis"].zero_()


def in_interpreter(source: KernelSource) -> Launcher:
    """Launches of a source in Triton's interpreter, one program after the other: right for one
    program alone, which meets the calls in their order.
    """
    from ..triton.compat import interpret_programs
    from ..triton.interpreted import module_in_interpreter

    (launch,) = source.variants[0].launches
    function = getattr(module_in_interpreter(source.text), launch.function)

    def run(arguments: Sequence[torch.Tensor | int]) -> None:
        interpret_programs(function, (1, 1, 1), [(0, 0, 0)], arguments, launch.constexprs)

    return run


def on_device(source: KernelSource, binary: Binary, device: torch.device) -> Launcher:
    """Launches of a binary on torch's current stream.

    Raises:
        EngineError: the driver does not take it.
    """
    from ..triton.launch import LoadedFunction

    (launch,) = source.variants[0].launches
    function = LoadedFunction.of(binary, device)
    programs = launch.grid[0]
    assert isinstance(programs, int)

    def run(arguments: Sequence[torch.Tensor | int]) -> None:
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        function((programs, 1, 1), values)

    return run


def _memory(shape: Shape, tiling: Tiling, timed: bool) -> dict[str, torch.Tensor]:
    """What the kernel keeps for itself."""
    attention = next(form for form in shape.forms if isinstance(form, Attention))
    calls, programs, batch = len(shape.calls), tiling.programs, tiling.batch
    parts = batch * tiling.splits * attention.heads
    counters = _LINE * (calls + 2) + calls * batch * attention.kv_heads
    pairs = max(16, batch * (shape.head_dim // 2))
    return {
        "counters": torch.zeros(counters, dtype=torch.int32),
        "diagnosis": torch.zeros(8, dtype=torch.int32),
        "timeline": torch.zeros(programs, calls, len(MARKS) * timed, dtype=torch.int64),
        "places": torch.zeros(programs, dtype=torch.int32),
        "cos": torch.zeros(pairs),
        "sin": torch.zeros(pairs),
        "partial_acc": torch.zeros(parts * attention.head_dim),
        "partial_max": torch.zeros(parts),
        "partial_sum": torch.zeros(parts),
        "bests": torch.zeros(batch * programs),
        "indices": torch.zeros(batch * programs, dtype=torch.int32),
        "tokens": torch.zeros(batch, dtype=torch.int64),
    }


def weight_names(shape: Shape) -> list[str]:
    """The weights that a model's kernel reads, each once, in order."""
    names = [
        shape.inv_freq,
        *(n for step in shape.calls for n in (step.weight, step.scale, step.norm)),
    ]
    return [name for name in dict.fromkeys(names) if name]


def check_memory(name: str, tensor: torch.Tensor | None) -> None:
    """
    Raises:
        UsageError: there is none, or it is not dense.
    """
    if tensor is not None and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return
    raise UsageError(
        f"{name} of the persistent decode kernel",
        expected="a contiguous tensor at an address divisible by 16",
        found="none" if tensor is None else f"strides {tensor.stride()} at {tensor.data_ptr():#x}",
        remedy="Give it as the engine holds it.",
    )
