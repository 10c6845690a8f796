"""Tensor maps (CUtensorMap) that the host makes, and that a launch takes by value.

A kernel may make them itself, which costs 1.5 to 2 us of each launch: every block writes its own to
memory, and waits until that is seen. The host makes one once for each buffer and shape; a captured
graph holds it as it holds addresses, so that what moves buffers has to capture anew in either case.

The driver is called by ctypes: cuda-bindings keeps the map in a Python object, which begins at a
multiple of 16 where the driver's code needs 64 (128 from CUDA 13 on), and may crash.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from ...errors import EngineError

BYTES = 128
"""Of a map, and what it has to begin at a multiple of."""

# Of cuda.h: types of elements, no interleaving, swizzles by bytes of a line, promotion to lines of
# 128 bytes in L2, zeros out of bounds, and the status of a thread without a context.
_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_INTERLEAVE, _PROMOTION, _FILL = 0, 2, 0
_SWIZZLES = {0: 0, 128: 3}
_NO_CONTEXT = 201


@dataclass(frozen=True, slots=True)
class Mapped:
    """A buffer, and where in it what a `Described` argument says lies.

    Attributes:
        tensor: the buffer.
        offset: of the first element, in elements.
        shape, strides: in elements.
        box: elements of a copy, along each dimension.
        swizzle: bytes of the lines that copies lie in, swizzled; 0 for as they come.
    """

    tensor: torch.Tensor
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 128

    def values(self, enter: Callable[[], None]) -> tuple[bytes | int, ...]:
        """What a kernel takes for it: the map, shape and strides.

        Args:
            enter: makes the device's context this thread's, where it has none.

        Raises:
            EngineError: the driver refuses the map.
        """
        start = self.tensor.data_ptr() + self.offset * self.tensor.element_size()
        wanted = (start, self.tensor.dtype, self.shape, self.strides, self.box, self.swizzle)
        try:
            made = _encoded(*wanted)
        except _NoContextError:
            enter()
            made = _encoded(*wanted)
        return (made, *self.shape, *self.strides)


class _NoContextError(Exception):
    """The thread has not called CUDA before."""


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def aligned(count: int) -> tuple[ctypes.Array[ctypes.c_uint8], int]:
    """Memory for so many maps, and the address of the first in it."""
    memory = (ctypes.c_uint8 * (BYTES * (count + 1)))()
    return memory, -(-ctypes.addressof(memory) // BYTES) * BYTES


@lru_cache(maxsize=1 << 12)
def _encoded(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> bytes:
    """The bytes of a map as Triton's kernels expect it."""

    def counts(values: Sequence[int], kind: Any) -> Any:
        return (kind * len(values))(*reversed(values))  # the fastest dimension comes first

    memory, start = aligned(1)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        ctypes.c_int(_TYPES[dtype]),
        ctypes.c_uint32(len(shape)),
        ctypes.c_void_p(address),
        counts(shape, ctypes.c_uint64),
        counts([stride * dtype.itemsize for stride in strides[:-1]], ctypes.c_uint64),
        counts(box, ctypes.c_uint32),
        counts([1] * len(shape), ctypes.c_uint32),
        *map(ctypes.c_int, (_INTERLEAVE, _SWIZZLES[swizzle], _PROMOTION, _FILL)),
    )
    if status == _NO_CONTEXT:
        raise _NoContextError
    if status:
        raise EngineError(
            f"tensor map of {list(shape)} {dtype} with strides {list(strides)}",
            expected="the driver to take it: rows that begin at multiples of 16 bytes",
            found=f"status {status} of cuTensorMapEncodeTiled",
            remedy="Report it with the model's name; backend='eager' runs without.",
        )
    begin = start - ctypes.addressof(memory)
    return bytes(memory[begin : begin + BYTES])
