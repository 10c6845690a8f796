"""What the driver is given at a launch, by a driver that only looks; plans that calls share."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from tilewright.codegen.base import get_backend
from tilewright.codegen.program import Call, Program
from tilewright.codegen.triton import invocation, launch
from tilewright.codegen.triton.package import Binary, KernelPackage, Resources, launch_key
from tilewright.codegen.triton.source import (
    Described,
    KernelSource,
    Launch,
    Pointer,
    Scalar,
    Variant,
)
from tilewright.codegen.triton.tensor_map import BYTES, Mapped
from tilewright.errors import EngineError, KernelError
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.types import TensorType

T = symbol("T")
RESULT = TensorType(DType.F32, (T,))
CPU = torch.device("cpu", 0)
X, Y = (Pointer(name, DType.F32, role, 0) for name, role in (("x", "operand"), ("y", "result")))


class Driver:
    """Stands for ``cuda.bindings.driver``.

    Attributes:
        seen: (stream, grid, cells) of each launch.
        answers: what comes of the next launches; then all go well.
    """

    CUstream = CUlaunchConfig = CUlaunchAttribute = CUdevice = SimpleNamespace

    def __init__(self, parameters: int) -> None:
        self.parameters = parameters
        self.seen: list[tuple[int, tuple[int, int, int], list[int]]] = []
        self.answers: list[str] = []
        self.entered = 0
        self.CUstream = lambda value: SimpleNamespace(value=value)

    def cuLaunchKernelEx(self, config, kernel, packed, extra):
        if self.answers:
            return (SimpleNamespace(name=self.answers.pop(0)),)
        where = (ctypes.c_uint64 * self.parameters).from_address(packed)
        cells = [ctypes.c_int64.from_address(address).value for address in where]
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        self.seen.append((config.hStream.value, grid, cells))
        return (0,)


def source_of(*arguments, name: str = "k") -> KernelSource:
    one = Launch("f", arguments, (T, 1, 2))
    return KernelSource(name, "generated", "text", (Variant((one,)),))


@pytest.fixture
def stream(monkeypatch):
    """torch's current stream."""
    current = SimpleNamespace(value=7)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: current.value, raising=False
    )
    return current


def kernel_of(monkeypatch, source: KernelSource, scratch: int = 0, types: tuple[str, ...] = ()):
    (one,) = source.variants[0].launches
    types = types or ("u64",) * len(one.arguments)
    driver = Driver(len(types) + 2)
    driver.CUdevice = lambda index: index
    monkeypatch.setattr(launch, "cuda_driver", lambda: driver)
    monkeypatch.setattr(launch, "_load", lambda binary, index: object())
    monkeypatch.setattr(launch.LoadedFunction, "_loaded", {})
    monkeypatch.setattr(launch, "enter_context", lambda device: setattr(driver, "entered", 1))
    parameters = (*types, "u64", "u64")
    binary = Binary("f", 90, b"", Resources(1, 0, 0, 0, 128), parameters, scratch)
    package = KernelPackage(source, {launch_key(one): binary})
    return launch.LaunchedKernel(package, [RESULT], (), CPU), driver


@pytest.mark.quick
def test_parameters_are_addresses_sizes_and_scratch(monkeypatch, stream) -> None:
    scalars = Scalar("n", T - 5), Scalar("m", T * (1 << 40), "i64")
    kernel, driver = kernel_of(monkeypatch, source_of(X, Y, *scalars), scratch=16)
    x = torch.zeros(3)
    (y,) = kernel((x,), {"T": 3})
    ((_, grid, cells),) = driver.seen
    assert grid == (3, 1, 2) and y.shape == (3,)
    assert cells[:4] == [x.data_ptr(), y.data_ptr(), -2, 3 << 40]
    assert cells[4] % 16 == 0 and cells[4] and cells[5] == 0


@pytest.mark.quick
def test_a_tensor_map_is_taken_by_value_beside_its_shape_and_strides(monkeypatch, stream) -> None:
    made = bytes(range(BYTES))
    asked = []

    def values(self, enter):
        asked.append((self.tensor, self.offset, self.shape, self.strides, self.box))
        return (made, *self.shape, *self.strides)

    monkeypatch.setattr(Mapped, "values", values)
    described = Described("x", DType.F32, "operand", 0, T - 1, (T, 8), (T * 8, 1), (4, 8))
    types = ("b8", "u32", "u32", "u64", "u64", "u64", "u64")
    source = source_of(described, Y, Scalar("n", T, "i64"))
    kernel, driver = kernel_of(monkeypatch, source, types=types)
    x = torch.zeros(24)
    for count in (3, 2):  # another step's are others
        (y,) = kernel((x,), {"T": count})
        cells = driver.seen[-1][2]
        assert cells == [0x0706050403020100, count, 8, 8 * count, 1, y.data_ptr(), count, 0, 0]
        assert asked[-1][0] is x and asked[-1][1:] == (
            count - 1,
            (count, 8),
            (8 * count, 1),
            (4, 8),
        )
    (function,) = [function for _, function in kernel.functions.values()]
    ((index, where),) = function.maps
    assert index == 0 and where % BYTES == 0 and ctypes.string_at(where, BYTES) == made


@pytest.mark.quick
def test_each_launch_is_on_the_stream_of_its_moment(monkeypatch, stream) -> None:
    kernel, driver = kernel_of(monkeypatch, source_of(X, Y))
    for stream.value in (7, 7, 0, 9, 7):
        kernel((torch.zeros(1),), {"T": 1})
    assert [found for found, _, _ in driver.seen] == [7, 7, 0, 9, 7]


@pytest.mark.quick
def test_the_default_stream_may_be_the_first(monkeypatch, stream) -> None:
    stream.value = 0
    kernel, driver = kernel_of(monkeypatch, source_of(X, Y))
    kernel((torch.zeros(1),), {"T": 1})
    assert driver.seen[0][0] == 0


@pytest.mark.quick
def test_a_thread_without_a_context_enters_it_and_other_errors_are_named(
    monkeypatch, stream
) -> None:
    kernel, driver = kernel_of(monkeypatch, source_of(X, Y))
    driver.answers = ["CUDA_ERROR_INVALID_CONTEXT"]
    kernel((torch.zeros(1),), {"T": 1})
    assert driver.entered and len(driver.seen) == 1
    driver.answers = ["CUDA_ERROR_LAUNCH_FAILED"]
    with pytest.raises(EngineError, match=r"launch of f with grid \(1, 1, 2\).*LAUNCH_FAILED"):
        kernel((torch.zeros(1),), {"T": 1})
    driver.answers = ["CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"]
    with pytest.raises(KernelError, match=r"resident at once.*MPS.*decode='kernels'"):
        kernel((torch.zeros(1),), {"T": 1})


@pytest.mark.quick
def test_calls_of_equal_kernels_share_their_plans(monkeypatch, stream) -> None:
    made = []

    def counted(source, results, sizes):
        made.append(dict(sizes))
        return real(source, results, sizes)

    real = invocation.plan_call
    monkeypatch.setattr(invocation, "plan_call", counted)
    kernels = [kernel_of(monkeypatch, source_of(X, Y, name="shared"))[0] for _ in range(3)]
    sizes = {"T": 2}
    for count in (2, 2, 5):
        sizes["T"] = count  # a caller may use one mapping for all its calls
        for kernel in kernels:
            (y,) = kernel((torch.zeros(count),), sizes)
            assert y.shape == (count,)
    assert made == [{"T": 2}, {"T": 5}]
    other, _ = kernel_of(monkeypatch, source_of(X, X, Y, name="shared"))
    other((torch.zeros(5),), sizes)
    assert made == [{"T": 2}, {"T": 5}, {"T": 5}]


@pytest.mark.quick
def test_what_torch_makes_for_a_call_is_on_the_programs_device_and_no_longer() -> None:
    call = Call("eager/iota", (), ("y",), {"size": T, "dtype": DType.F32})
    program = Program("p", {"y": RESULT}, (), {}, (("y", "y"),), (call,))
    meta = torch.device("meta")
    kernel = get_backend("eager").load(call, program, {}, lambda name: b"", meta)
    (result,) = kernel((), {"T": 4})
    assert result.device.type == "meta" and result.shape == (4,)
    assert torch.arange(2).device.type == "cpu"
