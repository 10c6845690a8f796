"""An engine of TensorRT on a GPU: opened by the flavor that built it, run on the current stream."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import EngineError, UnsupportedError, UsageError
from ..program import Call
from .flavor import Flavor, find_flavor, first_error, listener

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Session:
    """An engine with memory for its steps.

    Args:
        path: of the engine, for messages.
        engine: its bytes.
        call: that it computes: names its inputs, results, and the TensorRT that built it.
        device: the GPU.
        learnt: kernels that an earlier start compiled; of another GPU or version it does not take
            them, and compiles its own.

    Raises:
        EngineError: that TensorRT is missing, or does not open the engine here.
    """

    def __init__(
        self,
        path: str,
        engine: bytes,
        call: Call,
        device: torch.device,
        learnt: bytes | None = None,
    ) -> None:
        self.path, self.device = path, device
        self.errors: list[str] = []
        self.wanted = f"{call.attrs['flavor']} {call.attrs['version']}"
        self.flavor = self._flavor(str(call.attrs["flavor"]))
        api = self.flavor.api
        self.logger = listener(api, self.errors)
        self.runtime = api.Runtime(self.logger)
        self.engine = self._made(self.runtime.deserialize_cuda_engine(engine))
        self._check_names(call)
        self.context = self._context(learnt)
        self.profiles = self._profiles(call)
        self.profile: int | None = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def most(self, name: str, axis: int) -> int:
        """The largest size of an input that a profile has."""
        return max((tuple(ranges[name][2])[axis] for ranges in self.profiles), default=1)

    def fits(self, given: dict[str, torch.Tensor]) -> bool:
        """Whether a profile has all of the shapes."""
        return self._fitting(given) is not None

    def learnt(self) -> bytes | None:
        """The kernels compiled so far; None where this TensorRT compiled them with the engine."""
        return None if self.cache is None else bytes(self.cache.serialize())

    def _context(self, learnt: bytes | None) -> Any:
        """Memory for steps. TensorRT for RTX compiles kernels on the GPU, and can keep them."""
        self.cache: Any = None
        if not hasattr(self.flavor.api, "IRuntimeCache"):
            return self._made(self.engine.create_execution_context())
        config = self.engine.create_runtime_config()
        self.cache = config.create_runtime_cache()
        if learnt is not None:
            self.cache.deserialize(learnt)  # False where they are of another GPU or version
        config.set_runtime_cache(self.cache)
        return self._made(self.engine.create_execution_context(config))

    def __call__(self, given: dict[str, torch.Tensor], results: dict[str, torch.Tensor]) -> None:
        """Queues the engine behind what the current stream holds."""
        if self.stream is None:
            self._enqueue(given, results, 0)
            return
        # TensorRT waits for the device where it is given the default stream.
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        self._enqueue(given, results, self.stream.cuda_stream)
        here.wait_stream(self.stream)

    def _enqueue(
        self, given: dict[str, torch.Tensor], results: dict[str, torch.Tensor], stream: int
    ) -> None:
        self.errors.clear()
        context = self.context
        profile = self._fitting(given)
        if profile is None:
            raise self._unfit(given)
        if profile != self.profile:
            self._check(context.set_optimization_profile_async(profile, stream))
            self.profile = profile
        for name, tensor in given.items():
            self._check(context.set_input_shape(name, tuple(tensor.shape)))
        for name, tensor in (*given.items(), *results.items()):
            self._check(context.set_tensor_address(name, tensor.data_ptr()))
        self._check(context.execute_async_v3(stream))

    def _fitting(self, given: dict[str, torch.Tensor]) -> int | None:
        """The last profile that has all of the shapes: decode stands behind prefill."""
        for index in reversed(range(len(self.profiles))):
            ranges = self.profiles[index]
            if all(_within(tuple(x.shape), ranges[name]) for name, x in given.items()):
                return index
        return None

    def _unfit(self, given: dict[str, torch.Tensor]) -> UsageError:
        name, x = next(iter(given.items()))
        return UsageError(
            f"a step with {name} of {list(x.shape)}",
            expected="sizes that a profile of the engine has: "
            + ", ".join(f"{list(p[name][0])} to {list(p[name][2])}" for p in self.profiles),
            found="none that has those of all inputs",
            remedy="Compile with a larger max_batch_size or max_model_len.",
        )

    def _flavor(self, name: str) -> Flavor:
        try:
            return find_flavor([name])
        except UnsupportedError as error:
            raise EngineError(
                f"the engine's {self.path}",
                expected=f"{self.wanted}, which built it",
                found=error.found,
                remedy=error.remedy,
            ) from error

    def _check_names(self, call: Call) -> None:
        count = self.engine.num_io_tensors
        found = {self.engine.get_tensor_name(index) for index in range(count)}
        inputs = call.attrs["inputs"]
        assert isinstance(inputs, tuple)
        wanted = {*map(str, inputs), *call.results}
        if found != wanted:
            odd = sorted(found ^ wanted)
            raise self._refused(f"one with other inputs or outputs: {', '.join(odd)}")

    def _profiles(self, call: Call) -> list[dict[str, Shapes]]:
        inputs = call.attrs["inputs"]
        assert isinstance(inputs, tuple)
        return [
            {str(name): self.engine.get_tensor_profile_shape(str(name), index) for name in inputs}
            for index in range(self.engine.num_optimization_profiles)
        ]

    def _made(self, made: Any) -> Any:
        """What TensorRT made; it gives None, and logs why, where it cannot."""
        if made is None:
            raise self._refused(first_error(self.errors) or "one that it does not open")
        return made

    def _refused(self, found: str) -> EngineError:
        return EngineError(
            f"the engine's {self.path}",
            expected=f"one that {self.flavor.name} {self.flavor.version} opens here "
            f"({self.wanted} built it)",
            found=found,
            remedy=f"Install {self.wanted}, or compile the model again here.",
        )

    def _check(self, done: bool) -> None:
        """EngineError where TensorRT says no: the log has the reason."""
        if not done:
            raise EngineError(
                f"the engine's {self.path}",
                expected=f"a step that {self.flavor.name} runs",
                found=first_error(self.errors) or "a refusal without a reason",
                remedy="Check the inputs; backend='eager' runs the same graph with torch.",
            )


def _within(shape: tuple[int, ...], ranges: Shapes) -> bool:
    least, _, most = (tuple(sizes) for sizes in ranges)
    return len(shape) == len(least) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )
