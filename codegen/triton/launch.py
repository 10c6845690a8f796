"""Cubins on a device: loaded and launched through the driver. No Triton, no compiler.

Arguments are packed into memory that lives as long as the kernel: one 8-byte cell a parameter (128
bytes for a tensor map), in the order of the kernel's PTX, and an array of their addresses, as
``cuLaunchKernelEx`` takes them.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ...errors import CapacityError, EngineError, KernelError
from ...ir.types import TensorType
from .invocation import Given, Invocation
from .package import Binary, KernelPackage, launch_key
from .source import Launch
from .tensor_map import BYTES, Mapped, aligned

_STATIC_SHARED = 48 << 10  # bytes of shared memory that a block may use without asking


class LaunchedKernel(Invocation):
    """One call's kernels on a GPU.

    Args:
        package: the source's variants, with a binary of each launch.
        results, aliases, device: as `Invocation` takes them.

    Raises:
        EngineError: the driver does not take a binary.
    """

    def __init__(
        self,
        package: KernelPackage,
        results: Sequence[TensorType],
        aliases: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        super().__init__(package.source, results, aliases, device)
        functions = {key: LoadedFunction.of(b, device) for key, b in package.binaries.items()}
        self.functions: Mapping[int, tuple[Launch, LoadedFunction]] = {
            id(launch): (launch, functions[launch_key(launch)])
            for variant in self.source.variants
            for launch in variant.launches
        }

    def launch(
        self,
        launch: Launch,
        grid: tuple[int, int, int],
        arguments: Sequence[Given],
    ) -> None:
        function = self.functions[id(launch)][1]
        values: Sequence[Any] = [
            a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments
        ]
        function(grid, self._with_maps(values) if function.maps else values)

    def _with_maps(self, values: Sequence[Mapped | int]) -> Sequence[bytes | int]:
        """Values with what a kernel takes for a buffer that has a tensor map."""
        found: list[bytes | int] = []
        for value in values:
            if isinstance(value, Mapped):
                found += value.values(partial(enter_context, self.device))
            else:
                found.append(value)
        return found


class LoadedFunction:
    """A kernel in the driver's hands, with the memory that its arguments are packed in."""

    _loaded: dict[tuple[bytes, int], Any] = {}  # noqa: RUF012  layers share their kernels

    def __init__(self, binary: Binary, kernel: Any, device: torch.device) -> None:
        driver = cuda_driver()
        self.binary, self.kernel, self.device = binary, kernel, device
        count = len(binary.parameters)
        self.pack = struct.Struct(f"={count}q").pack_into  # i32 are read from their cells' low half
        self.cells = (ctypes.c_uint64 * count)()
        start = ctypes.addressof(self.cells)
        self.addresses = (ctypes.c_uint64 * count)(*(start + 8 * i for i in range(count)))
        self.packed = ctypes.addressof(self.addresses)
        maps = [index for index, type_ in enumerate(binary.parameters) if type_ == "b8"]
        self.memory, start = aligned(len(maps))
        self.maps = tuple((index, start + BYTES * i) for i, index in enumerate(maps))
        for index, where in self.maps:
            self.addresses[index] = where
        self.config = driver.CUlaunchConfig()
        self.config.blockDimX, self.config.blockDimY, self.config.blockDimZ = (
            binary.resources.threads,
            1,
            1,
        )
        self.config.sharedMemBytes = binary.resources.shared
        attributes = [_early_start(driver)] if binary.pdl else []
        attributes += [_together(driver)] if binary.cooperative else []
        if attributes:
            self.config.attrs = attributes
            self.config.numAttrs = len(attributes)
        self.launch_kernel = driver.cuLaunchKernelEx
        self.stream_type = driver.CUstream
        self.stream: int | None = None  # that the config has
        self.index = _index_of(device)
        self.lock = threading.Lock()  # threads may share an engine, and so these cells

    @classmethod
    def of(cls, binary: Binary, device: torch.device) -> LoadedFunction:
        """The function of a binary; equal binaries are loaded once a device."""
        index = _index_of(device)
        key = (binary.cubin, index)
        if key not in cls._loaded:
            cls._loaded[key] = _load(binary, index)
        return cls(binary, cls._loaded[key], device)

    @classmethod
    def forget(cls) -> None:
        """Loads every binary anew from here on, at another address. What runs keeps its own."""
        cls._loaded.clear()

    def __call__(self, grid: tuple[int, int, int], values: Sequence[bytes | int]) -> None:
        """Launches on torch's current stream.

        Args:
            grid: number of programs along each axis.
            values: addresses, sizes and tensor maps, all parameters but the two of scratch memory.
        """
        scratch, where = None, 0
        if self.binary.scratch_bytes:
            size = grid[0] * grid[1] * grid[2] * self.binary.scratch_bytes
            scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
            where = scratch.data_ptr()
        # torch.cuda.current_stream makes an object of it each time, which takes longer than all
        # else here. A capture has a stream of its own, so this is asked at each launch.
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        config = self.config
        with self.lock:
            if self.maps:
                values = self._without_maps(values)
            self.pack(self.cells, 0, *values, where, 0)
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            if stream != self.stream:
                config.hStream, self.stream = self.stream_type(stream), stream
            (status,) = self.launch_kernel(config, self.kernel, self.packed, 0)
            if status:
                self._again(grid, status)

    def _without_maps(self, values: Sequence[bytes | int]) -> Sequence[bytes | int]:
        """Puts tensor maps where the launch reads them, which is no cell."""
        left = list(values)
        for index, where in self.maps:
            made = left[index]
            assert isinstance(made, bytes) and len(made) == BYTES
            ctypes.memmove(where, made, BYTES)
            left[index] = 0
        return left

    def _again(self, grid: tuple[int, int, int], status: Any) -> None:
        """After a failed launch: once more where the thread lacked a context, else an error."""
        if status.name == "CUDA_ERROR_INVALID_CONTEXT":
            # A thread whose first CUDA call this is: torch served its memory from what it holds.
            enter_context(self.device)
            (status,) = self.launch_kernel(self.config, self.kernel, self.packed, 0)
        if status:
            raise _failed(f"launch of {self.binary.function} with grid {grid}", status)


def _index_of(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def cuda_driver() -> Any:
    """The module ``cuda.bindings.driver``.

    Raises:
        EngineError: it is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EngineError(
            "kernels of this engine",
            expected="the package cuda-bindings, to launch them",
            found=f"{type(error).__name__}: {error}",
            remedy="Run pip install 'tilewright[cuda]'.",
        ) from error
    return driver


def _early_start(driver: Any) -> Any:
    """The launch attribute of programmatic dependent launch; a capture makes an edge of it."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _together(driver: Any) -> Any:
    """The launch attribute of cooperative launch: all blocks are resident at once, or none is."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    attribute.value.cooperative = 1
    return attribute


def _load(binary: Binary, device: int) -> Any:
    driver = cuda_driver()
    torch.cuda.synchronize(device)  # torch's context is made and current from here on
    status, library = driver.cuLibraryLoadData(binary.cubin, [], [], 0, [], [], 0)
    if status:
        raise refused(binary, getattr(status, "name", str(status)))
    status, kernel = driver.cuLibraryGetKernel(library, binary.function.encode())
    if status:
        raise _failed(f"entry point {binary.function}", status)
    count = len(binary.parameters)
    status, *_ = driver.cuKernelGetParamInfo(kernel, count)  # of one more there must be none
    if not status:
        raise _failed(f"{binary.function}, which takes more than {count} parameters", status)
    if binary.resources.shared > _STATIC_SHARED:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(
            attribute, binary.resources.shared, kernel, driver.CUdevice(device)
        )
        if status:
            raise _failed(f"{binary.resources.shared} bytes of shared memory", status)
    return kernel


def enter_context(device: torch.device) -> None:
    """Makes torch's context, the device's primary one, current in this thread."""
    driver = cuda_driver()
    index = _index_of(device)
    status, context = driver.cuDevicePrimaryCtxRetain(driver.CUdevice(index))
    if status:
        raise _failed(f"context of device {index}", status)
    driver.cuCtxSetCurrent(context)
    driver.cuDevicePrimaryCtxRelease(driver.CUdevice(index))  # torch holds it too


def _failed(what: str, status: Any) -> EngineError | CapacityError | KernelError:
    name = getattr(status, "name", str(status))
    if name == "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE":
        return KernelError(
            what,
            expected="all its programs to be resident at once",
            found=f"{name}: this process may use fewer multiprocessors, as MPS can have it",
            remedy="Compile the model here with decode='kernels'.",
        )
    if name == "CUDA_ERROR_OUT_OF_MEMORY":
        return CapacityError(
            what,
            expected="device memory for it",
            found=name,
            remedy="Lower memory_fraction, max_batch_size or max_model_len.",
        )
    return EngineError(
        what,
        expected="the driver to take it",
        found=name,
        remedy="Run tilewright verify on the engine; see the driver's log.",
    )


def refused(binary: Binary, found: str) -> KernelError:
    """The error of machine code that the driver does not load, by the driver's name for why."""
    return KernelError(
        f"cubin of {binary.function} for sm_{binary.arch}",
        expected="the driver to take it",
        found=found,
        remedy="Update the NVIDIA driver, or compile the model on this machine.",
    )
