"""Modules that stand for TensorRT where it is not installed."""

from __future__ import annotations

from types import SimpleNamespace


def fake_tensorrt(*capabilities: str) -> SimpleNamespace:
    """A module that has the layers we need, and builds for ``capabilities``."""
    layers = ("add_kv_cache_update", "add_rotary_embedding", "add_attention")
    return SimpleNamespace(
        __version__="9.9",
        INetworkDefinition=SimpleNamespace(**dict.fromkeys(layers)),
        ComputeCapability=SimpleNamespace(__members__=dict.fromkeys(capabilities)),
    )
