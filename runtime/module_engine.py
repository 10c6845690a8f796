"""Engines of plain modules: called like the module, on the device that it was compiled for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch

from ..errors import UsageError
from .base_engine import RunningEngine
from .image import Signature
from .runner import bind_sizes
from .structure import Branch, flatten, rebuild


class ModuleEngine(RunningEngine):
    """A compiled plain module: called like the module, gives what the module gives."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """The module's result for these arguments.

        Raises:
            UsageError: arguments of another structure, shape or element type than at compile time.
        """
        signature = self.image.signature
        assert signature is not None
        inputs = self._inputs(signature, args, kwargs)
        # Results are where the inputs are, as the module's would be.
        device = next((tensor.device for tensor in inputs.values()), self.runner.device)
        outputs = self.runner.run(inputs)
        return rebuild(signature.output, self._unshared(inputs, outputs.values(), device))

    def takes(self, *args: object, **kwargs: object) -> bool:
        """Whether these arguments have the structure, shapes and element types that the engine was
        compiled for.
        """
        signature = self.image.signature
        assert signature is not None
        try:
            self._inputs(signature, args, kwargs)
        except UsageError:
            return False
        return True

    def _inputs(
        self, signature: Signature, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> dict[str, torch.Tensor]:
        try:
            found = flatten(signature.call, _bound(signature, args, kwargs))
        except ValueError as error:
            raise UsageError(
                f"arguments of {self.image.name}",
                expected="the structure given at compile time",
                found=str(error),
                remedy="Call the engine as the module was called in example_inputs.",
            ) from error
        program = self.runner.program
        inputs = {program.inputs[i]: tensor for i, tensor in found.items()}
        sizes = bind_sizes(program, inputs)
        for symbol, least, greatest in signature.ranges:
            size = sizes.get(symbol, least)
            if size < least or (greatest is not None and size > greatest):
                raise self._out_of_range(symbol, least, greatest, size)
        return inputs

    def _out_of_range(self, symbol: str, least: int, greatest: int | None, size: int) -> UsageError:
        buffers = self.runner.program.buffers
        users = [n for n in self.runner.program.inputs if symbol in buffers[n].symbols]
        limits = f"{least} or more" if greatest is None else f"from {least} to {greatest}"
        return UsageError(
            f"size {symbol} of input {', '.join(map(repr, users))}",
            expected=f"{limits}, as dynamic_shapes and the module allow",
            found=str(size),
            remedy="Pass another size, or compile with a wider range in dynamic_shapes.",
        )

    def _unshared(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Iterable[torch.Tensor],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """The outputs on ``device``, copied where they lie in memory of the engine, of an input or
        of another output: whoever gets a result may write to it.
        """
        taken = set(self._constants) | {x.untyped_storage().data_ptr() for x in inputs.values()}
        own = []
        for output in outputs:
            result = output.to(device)
            if result.untyped_storage().data_ptr() in taken:
                result = result.clone()
            taken.add(result.untyped_storage().data_ptr())
            own.append(result)
        return own

    @cached_property
    def _constants(self) -> frozenset[int]:
        held = self.runner.constants.values()
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in held)


def _bound(
    signature: Signature, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The call as it was captured: keywords of parameters that were positional then are made
    positional.
    """
    call = signature.call
    assert isinstance(call, Branch)
    positional, named = (part for part in call.items)
    assert isinstance(positional, Branch) and isinstance(named, Branch)
    rest, bound = dict(kwargs), list(args)
    count = len(positional.items)
    names = signature.arguments[len(args) : count]
    bound.extend(rest.pop(name) for name in names if name in rest)
    rest.update(zip(signature.arguments[count:], bound[count:], strict=False))
    surplus = bound[max(count, len(signature.arguments)) :]
    return (*bound[:count], *surplus), rest
