"""A described network as TensorRT's own: one method a kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...ir.dtypes import DType
from ...ir.node import Attr
from .network import Constant, Layer, Network

_TYPES = {
    DType.F32: "float32",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.F8E4M3: "fp8",
    DType.I64: "int64",
    DType.I32: "int32",
    DType.I8: "int8",
    DType.BOOL: "bool",
}
_ACTIVATIONS = {"sigmoid": "SIGMOID", "tanh": "TANH", "relu": "RELU"}
_LONGEST = 2**31 - 1


class Assembly:
    """Adds a network to an ``INetworkDefinition``.

    Args:
        api: TensorRT's module.
        made: its network, empty and strongly typed.
        network: what to add.
        fused: whether attention must be one kernel; else TensorRT may compute it by parts.

    Attributes:
        weights: what TensorRT reads until the engine is built.
    """

    def __init__(self, api: Any, made: Any, network: Network, fused: bool) -> None:
        self.api, self.made, self.network, self.fused = api, made, network, fused
        self.weights: list[torch.Tensor] = []
        self.tensors: dict[str, Any] = {}

    def run(self) -> None:
        """Adds everything."""
        for tensor in self.network.inputs:
            shape = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
            self.tensors[tensor.name] = self.made.add_input(
                tensor.name, self.dtype(tensor.dtype), shape
            )
        for constant in self.network.constants.values():
            self.tensors[constant.name] = self._constant(constant)
        for layer in self.network.layers:
            self.tensors[layer.output] = self._layer(layer)
        for name, value in self.network.outputs.items():
            self.tensors[value].name = name
            self.made.mark_output(self.tensors[value])

    def dtype(self, dtype: Attr) -> Any:
        """TensorRT's element type."""
        assert isinstance(dtype, DType)
        return getattr(self.api, _TYPES[dtype])

    def _constant(self, constant: Constant) -> Any:
        value = constant.load().contiguous()
        self.weights.append(value)
        dtype = self.api.int4 if constant.four_bits else self.dtype(constant.dtype)
        count = value.numel() * (2 if constant.four_bits else 1)
        weights = self.api.Weights(dtype, value.data_ptr(), count)
        return self._named(self.made.add_constant(constant.shape, weights), constant.name)

    def _layer(self, layer: Layer) -> Any:
        inputs = [self.tensors[name] for name in layer.inputs]
        made = _ADD[layer.kind](self, inputs, dict(layer.attrs))
        return self._named(made, layer.output)

    def _named(self, made: Any, name: str) -> Any:
        made.name = name
        output = made.get_output(0)
        output.name = name
        return output

    def cast(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """ICastLayer."""
        return self.made.add_cast(*inputs, self.dtype(attrs["dtype"]))

    def unary(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IUnaryLayer."""
        op = getattr(self.api.UnaryOperation, attrs["op"].upper())
        return self.made.add_unary(*inputs, op)

    def activation(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IActivationLayer."""
        op = getattr(self.api.ActivationType, attrs["op"].upper())
        return self.made.add_activation(*inputs, op)

    def elementwise(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IElementWiseLayer."""
        op = getattr(self.api.ElementWiseOperation, attrs["op"].upper())
        return self.made.add_elementwise(*inputs, op)

    def select(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """ISelectLayer."""
        return self.made.add_select(*inputs)

    def reduce(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IReduceLayer."""
        op = getattr(self.api.ReduceOperation, attrs["op"].upper())
        return self.made.add_reduce(*inputs, op, _mask(*attrs["axes"]), True)

    def softmax(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """ISoftMaxLayer."""
        made = self.made.add_softmax(*inputs)
        made.axes = _mask(attrs["axis"])
        return made

    def normalization(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """INormalizationLayer, over the last axis."""
        axes = _mask(len(inputs[0].shape) - 1)
        add = getattr(self.made, "add_normalization_v2", None) or self.made.add_normalization
        made = add(*inputs, axes)
        made.epsilon = attrs["eps"]
        return made

    def matrix_multiply(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IMatrixMultiplyLayer."""
        kinds = self.api.MatrixOperation
        b = kinds.TRANSPOSE if attrs["transpose"] else kinds.NONE
        return self.made.add_matrix_multiply(inputs[0], kinds.NONE, inputs[1], b)

    def shuffle(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IShuffleLayer."""
        made = self.made.add_shuffle(*inputs)
        if attrs.get("first") is not None:
            made.first_transpose = self.api.Permutation(attrs["first"])
        if attrs.get("shape") is not None:
            made.reshape_dims = attrs["shape"]
        return made

    def slice(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """ISliceLayer, whose size is the source's but for the axis."""
        (x,) = inputs
        rank, axis, step = len(x.shape), attrs["axis"], attrs["step"]
        count = -(-(attrs["stop"] - attrs["start"]) // step)
        bounds = torch.tensor([count if at == axis else _LONGEST for at in range(rank)])
        self.weights.append(bounds)
        weights = self.api.Weights(self.api.int64, bounds.data_ptr(), rank)
        most = self.made.add_constant((rank,), weights).get_output(0)
        least = self.api.ElementWiseOperation.MIN
        sizes = self.made.add_elementwise(self.made.add_shape(x).get_output(0), most, least)
        start = tuple(attrs["start"] if at == axis else 0 for at in range(rank))
        steps = tuple(step if at == axis else 1 for at in range(rank))
        made = self.made.add_slice(x, start, (0,) * rank, steps)
        made.set_input(2, sizes.get_output(0))
        return made

    def concatenation(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IConcatenationLayer."""
        made = self.made.add_concatenation(inputs)
        made.axis = attrs["axis"]
        return made

    def gather(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IGatherLayer."""
        return self.made.add_gather(*inputs, attrs["axis"])

    def kv_cache_update(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IKVCacheUpdateLayer."""
        return self.made.add_kv_cache_update(*inputs, self.api.KVCacheMode.LINEAR)

    def rotary_embedding(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IRotaryEmbeddingLayer, over tables that positions index."""
        x, cos, sin, positions = inputs
        made = self.made.add_rotary_embedding(x, cos, sin, attrs["interleaved"], attrs["width"])
        made.set_input(3, positions)
        return made

    def attention(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IAttention under a mask."""
        *qkv, mask = inputs
        softmax = self.api.AttentionNormalizationOp.SOFTMAX
        if hasattr(self.made, "add_attention_v2"):
            made = self.made.add_attention_v2(*qkv, softmax, self.api.CausalMaskKind.NONE)
        else:
            made = self.made.add_attention(*qkv, softmax, False)
        made.mask = mask
        made.decomposable = not self.fused
        return made

    def quantize(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IQuantizeLayer, of whole tensors."""
        return self.made.add_quantize(*inputs, self.dtype(attrs["dtype"]))

    def dequantize(self, inputs: list[Any], attrs: dict[str, Any]) -> Any:
        """IDequantizeLayer: by tensors, by rows or, from the scale's sizes, by groups."""
        made = self.made.add_dequantize(*inputs, self.dtype(attrs["dtype"]))
        if len(inputs[1].shape) == 1:
            made.axis = 0
        return made


_ADD: dict[str, Callable[[Assembly, list[Any], dict[str, Any]], Any]] = {
    kind: getattr(Assembly, kind)
    for kind in (
        "cast",
        "unary",
        "activation",
        "elementwise",
        "select",
        "reduce",
        "softmax",
        "normalization",
        "matrix_multiply",
        "shuffle",
        "slice",
        "concatenation",
        "gather",
        "kv_cache_update",
        "rotary_embedding",
        "attention",
        "quantize",
        "dequantize",
    )
}


def _mask(*axes: int) -> int:
    """Axes as TensorRT's bits."""
    return sum(1 << axis for axis in axes)
