"""Modules that stand for TensorRT where it is not installed, or where there is no GPU for it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace
from typing import BinaryIO

import pytest
import torch

from tilewright.codegen.tensorrt import backend, flavor
from tilewright.codegen.tensorrt.builder import Built
from tilewright.codegen.tensorrt.evaluate import evaluate
from tilewright.codegen.tensorrt.flavor import Flavor
from tilewright.codegen.tensorrt.network import Network
from tilewright.codegen.tensorrt.profiles import Profile, check_profiles
from tilewright.targets import TARGETS, Target


def fake_tensorrt(*capabilities: str) -> SimpleNamespace:
    """A module that has the layers we need, and builds for ``capabilities``."""
    layers = ("add_kv_cache_update", "add_rotary_embedding", "add_attention")
    return SimpleNamespace(
        __version__="9.9",
        INetworkDefinition=SimpleNamespace(**dict.fromkeys(layers)),
        ComputeCapability=SimpleNamespace(__members__=dict.fromkeys(capabilities)),
    )


class Device:
    """A TensorRT and an L4 that are the reference of the layers, on this machine's CPU.

    Args:
        monkeypatch: puts them in place of what is installed.

    Attributes:
        networks: that engines were built from; an engine's bytes are its number.
        notes: that each build gives.
        runs: the profile and input_ids' shape of each run, where an engine has some.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.networks: list[tuple[Network, Sequence[Profile]]] = []
        self.notes: tuple[str, ...] = ()
        self.runs: list[tuple[int, tuple[int, ...]]] = []
        self.api = fake_tensorrt("SM75", "SM80", "SM89", "SM120")
        self.api.ILogger = _Logger
        self.api.IRuntimeCache = _Cache
        self.api.Runtime = lambda logger: _Runtime(self, logger)
        monkeypatch.setattr(flavor, "find_spec", lambda name: name == "tensorrt_rtx" or None)
        monkeypatch.setattr(flavor, "import_module", lambda name: self.api)
        monkeypatch.setattr(backend, "build_engine", self._build)

    def plug_in(self) -> None:
        """From now on this machine has the GPU."""
        self.monkeypatch.setattr(Target, "detect", classmethod(lambda cls: TARGETS["l4"]))
        self.monkeypatch.setattr(Target, "device_type", property(lambda target: "cpu"))

    def _build(
        self,
        network: Network,
        flavor: Flavor,
        archs: Sequence[int],
        profiles: Sequence[Profile],
        file: BinaryIO,
    ) -> Built:
        check_profiles(network, profiles)
        flavor.check(archs, network.dtypes)
        file.write(b"engine %d" % len(self.networks))
        self.networks.append((network, profiles))
        return Built(tuple(archs), file.tell(), 0.0, not self.notes, self.notes)


class _Logger:
    INTERNAL_ERROR, ERROR = range(2)


class _Runtime:
    def __init__(self, device: Device, logger) -> None:
        self.device, self.logger = device, logger

    def deserialize_cuda_engine(self, data: bytes) -> _Engine | None:
        word, _, number = data.partition(b" ")
        if word != b"engine":
            self.logger.log(_Logger.ERROR, "the magic tag\ndoes not match")
            return None
        return _Engine(self.device, *self.device.networks[int(number)])


class _Engine:
    def __init__(self, device: Device, network: Network, profiles: Sequence[Profile]) -> None:
        self.device, self.network, self.profiles = device, network, profiles
        self.inputs = {tensor.name: tensor for tensor in network.inputs}
        self.names = [*self.inputs, *network.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_profile_shape(self, name: str, profile: int):
        return self.profiles[profile].shapes(self.inputs[name])

    def create_runtime_config(self) -> _Config:
        return _Config()

    def create_execution_context(self, config: _Config | None = None) -> _Context:
        return _Context(self, config)


class _Cache:
    """Of kernels: how often any ran, as text."""

    def __init__(self) -> None:
        self.runs = 0

    def serialize(self) -> bytes:
        return b"ran %d" % self.runs

    def deserialize(self, data: bytes) -> bool:
        word, _, count = data.partition(b" ")
        self.runs = int(count) if word == b"ran" else 0
        return word == b"ran"


class _Config:
    cache: _Cache

    def create_runtime_cache(self) -> _Cache:
        return _Cache()

    def set_runtime_cache(self, cache: _Cache) -> bool:
        self.cache = cache
        return True


class _Context:
    """Reads and writes the memory that it is given the addresses of."""

    def __init__(self, engine: _Engine, config: _Config | None) -> None:
        self.engine, self.profile, self.config = engine, 0, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 16 == 0

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        given = {
            name: _at(self.addresses[name], tensor.dtype.torch, self.shapes[name])
            for name, tensor in engine.inputs.items()
        }
        if self.config is not None:
            self.config.cache.runs += 1
        if "input_ids" in given:
            engine.device.runs.append((self.profile, tuple(given["input_ids"].shape)))
        for name, value in evaluate(engine.network, given).items():
            _at(self.addresses[name], value.dtype, tuple(value.shape)).copy_(value)
        return True


def _at(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
