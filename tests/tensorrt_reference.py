"""The layers that we emit for TensorRT, in torch, by TensorRT's documentation of its operators: as
strict about types and ranks as a strongly typed network, each layer computed wide and rounded once.
"""

from __future__ import annotations

import torch

from tilewright.codegen.tensorrt.network import Constant, Layer, Network
from tilewright.ir.dtypes import DType

UNARY = {
    "neg": torch.neg, "abs": torch.abs, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt,
    "recip": torch.reciprocal, "sin": torch.sin, "cos": torch.cos, "erf": torch.erf,
    "not": torch.logical_not,
}  # fmt: skip
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu_erf": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
BINARY = {
    "sum": torch.add, "sub": torch.sub, "prod": torch.mul, "div": torch.div, "pow": torch.pow,
    "max": torch.maximum, "min": torch.minimum, "equal": torch.eq, "greater": torch.gt,
    "less": torch.lt, "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor,
}  # fmt: skip
REDUCE = {"sum": torch.sum, "avg": torch.mean, "max": torch.amax, "min": torch.amin}


def evaluate(network: Network, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of a network; caches among ``given`` are written in place."""
    values: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}
    for tensor in network.inputs:
        x = given[tensor.name]
        assert x.dtype is tensor.dtype.torch and x.ndim == len(tensor.shape), tensor
        for size, wanted in zip(x.shape, tensor.shape, strict=True):
            known = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            assert size == known, f"{tensor}: {tuple(x.shape)}"
        values[tensor.name] = x
    values.update({name: _constant(constant) for name, constant in network.constants.items()})
    with torch.inference_mode():
        for layer in network.layers:
            assert layer.output not in values
            inputs = [values[name] for name in layer.inputs]
            values[layer.output] = globals()[f"_{layer.kind}"](*inputs, **layer.attrs)
    return {name: values[value] for name, value in network.outputs.items()}


def reads(network: Network, kind: str) -> list[Layer]:
    """The layers of a kind."""
    return [layer for layer in network.layers if layer.kind == kind]


def _constant(constant: Constant) -> torch.Tensor:
    value = constant.load()
    if constant.four_bits:
        halves = torch.stack((value & 15, value >> 4), -1).flatten(-2).to(torch.int8)
        value = torch.where(halves > 7, halves - 16, halves)
    else:
        assert value.dtype is constant.dtype.torch, constant
    assert tuple(value.shape) == constant.shape, constant
    return value


def _wide(x: torch.Tensor) -> torch.Tensor:
    assert x.dtype is not torch.float8_e4m3fn and x.dtype is not torch.int8
    return x.float() if x.is_floating_point() else x


def _cast(x, *, dtype: DType):
    return x.to(dtype.torch)


def _unary(x, *, op):
    return UNARY[op](_wide(x)).to(x.dtype)


def _activation(x, *, op):
    assert x.is_floating_point()
    return ACTIVATIONS[op](_wide(x)).to(x.dtype)


def _elementwise(a, b, *, op):
    assert a.dtype is b.dtype and a.ndim == b.ndim
    found = BINARY[op](_wide(a), _wide(b))
    return found if found.dtype is torch.bool else found.to(a.dtype)


def _select(condition, a, b):
    assert condition.dtype is torch.bool and a.dtype is b.dtype
    assert condition.ndim == a.ndim == b.ndim
    return torch.where(condition, a, b)


def _reduce(x, *, op, axes):
    return REDUCE[op](_wide(x), axes, keepdim=True).to(x.dtype)


def _softmax(x, *, axis):
    return _wide(x).softmax(axis).to(x.dtype)


def _normalization(x, scale, bias, *, eps):
    assert x.dtype is scale.dtype is bias.dtype and x.ndim == scale.ndim == bias.ndim
    width = x.shape[-1:]
    affine = (_wide(scale).reshape(width), _wide(bias).reshape(width))
    return torch.nn.functional.layer_norm(_wide(x), width, *affine, eps).to(x.dtype)


def _matrix_multiply(a, b, *, transpose):
    assert a.dtype is b.dtype and a.ndim == b.ndim
    return (_wide(a) @ _wide(b.mT if transpose else b)).to(a.dtype)


def _shuffle(x, *, first=None, shape=None, second=None):
    x = x if first is None else x.permute(first)
    if shape is not None:
        x = x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])
    return x if second is None else x.permute(second)


def _slice(x, *, axis, start, stop, step):
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def _concatenation(*xs, axis):
    assert len({x.dtype for x in xs}) == 1
    return torch.cat(xs, axis)


def _gather(x, indices, *, axis, batch_dims):
    if batch_dims == 0:
        return x.index_select(axis, indices.flatten()).unflatten(axis, indices.shape)
    assert batch_dims == axis == 1
    return torch.stack([row[picked] for row, picked in zip(x, indices, strict=True)])


def _kv_cache_update(cache, update, start):
    assert cache.dtype is update.dtype and start.dtype in (torch.int32, torch.int64)
    length = update.shape[2]
    for row, (new, first) in enumerate(zip(update, start.tolist(), strict=True)):
        assert 0 <= first <= cache.shape[2] - length
        cache[row, :, first : first + length] = new
    return cache


def _rotary_embedding(x, cos, sin, positions, *, interleaved, width):
    assert x.dtype is cos.dtype is sin.dtype and positions.ndim == 2
    turned, rest = (x, x[..., :0]) if width == 0 else (x[..., :width], x[..., width:])
    c, s = (_wide(table)[positions][:, None] for table in (cos, sin))
    turned = _wide(turned)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = (a * c - b * s, a * s + b * c)
    found = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((found.to(x.dtype), rest), -1)


def _attention(q, k, v, mask):
    assert q.dtype is k.dtype is v.dtype and mask.dtype is torch.bool
    assert mask.shape == (q.shape[0], 1, q.shape[2], k.shape[2]) and mask.any(-1).all()
    repeats = q.shape[1] // k.shape[1]
    k, v = (_wide(x).repeat_interleave(repeats, 1) for x in (k, v))
    scores = (_wide(q) @ k.mT).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).to(q.dtype)


def _quantize(x, scale, *, dtype: DType):
    assert scale.ndim == 0 and dtype is DType.F8E4M3
    return (_wide(x) / scale.float()).clamp(-448, 448).to(dtype.torch)


def _dequantize(codes, scale, *, dtype: DType):
    if scale.ndim == 2:  # by groups of columns
        assert scale.dtype is dtype.torch
        spread = scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    else:
        assert scale.dtype is torch.float32
        spread = scale if scale.ndim == 0 else scale[:, None]
    return (codes.float() * spread).to(dtype.torch)
