"""The reference of the layers, in torch, by TensorRT's documentation of its operators: as strict
about types and ranks as a strongly typed network, each layer computed wide and rounded once.

It is what a described network is checked with before TensorRT builds it, and on machines without a
GPU that could run the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from ...ir.dtypes import DType
from .network import Constant, Network

Op = Callable[..., torch.Tensor]

_UNARY: dict[str, Op] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "recip": torch.reciprocal,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "not": torch.logical_not,
}
_ACTIVATIONS: dict[str, Op] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu_erf": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
_BINARY: dict[str, Op] = {
    "sum": torch.add,
    "sub": torch.sub,
    "prod": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "max": torch.maximum,
    "min": torch.minimum,
    "equal": torch.eq,
    "greater": torch.gt,
    "less": torch.lt,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
}
_REDUCE: dict[str, Op] = {
    "sum": torch.sum,
    "avg": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
}


def evaluate(network: Network, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of a network, by name; caches among ``given`` are written in place.

    Args:
        network: what to compute.
        given: a tensor an input, by name, of its element type and sizes.
    """
    values = dict(given)
    _check(network, values)
    values.update(load_constants(network.constants.values()))
    return run_layers(network, values)


def load_constants(constants: Iterable[Constant]) -> dict[str, torch.Tensor]:
    """Their values by name, 4-bit codes as i8."""
    return {constant.name: _constant(constant) for constant in constants}


def run_layers(network: Network, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs, given the values of inputs and constants, to which those of layers are added."""
    with torch.inference_mode():
        for layer in network.layers:
            assert layer.output not in values, layer
            inputs = [values[name] for name in layer.inputs]
            values[layer.output] = _LAYERS[layer.kind](*inputs, **layer.attrs)
    return {name: values[value] for name, value in network.outputs.items()}


def _check(network: Network, given: Mapping[str, torch.Tensor]) -> None:
    sizes: dict[str, int] = {}
    for tensor in network.inputs:
        x = given[tensor.name]
        assert x.dtype is tensor.dtype.torch and x.ndim == len(tensor.shape), tensor
        for size, wanted in zip(x.shape, tensor.shape, strict=True):
            known = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            assert size == known, f"{tensor}: {tuple(x.shape)}"


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


def _cast(x: torch.Tensor, *, dtype: DType) -> torch.Tensor:
    return x.to(dtype.torch)


def _unary(x: torch.Tensor, *, op: str) -> torch.Tensor:
    return _UNARY[op](_wide(x)).to(x.dtype)


def _activation(x: torch.Tensor, *, op: str) -> torch.Tensor:
    assert x.is_floating_point()
    return _ACTIVATIONS[op](_wide(x)).to(x.dtype)


def _elementwise(a: torch.Tensor, b: torch.Tensor, *, op: str) -> torch.Tensor:
    assert a.dtype is b.dtype and a.ndim == b.ndim
    assert op != "div" or a.is_floating_point()  # of integers it cuts off, where torch's does not
    found = _BINARY[op](_wide(a), _wide(b))
    return found if found.dtype is torch.bool else found.to(a.dtype)


def _select(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert condition.dtype is torch.bool and a.dtype is b.dtype
    assert condition.ndim == a.ndim == b.ndim
    return torch.where(condition, a, b)


def _reduce(x: torch.Tensor, *, op: str, axes: tuple[int, ...]) -> torch.Tensor:
    return _REDUCE[op](_wide(x), axes, keepdim=True).to(x.dtype)


def _softmax(x: torch.Tensor, *, axis: int) -> torch.Tensor:
    return _wide(x).softmax(axis).to(x.dtype)


def _normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, eps: float
) -> torch.Tensor:
    assert x.dtype is scale.dtype is bias.dtype and x.ndim == scale.ndim == bias.ndim
    width = x.shape[-1:]
    affine = (_wide(scale).reshape(width), _wide(bias).reshape(width))
    return torch.nn.functional.layer_norm(_wide(x), width, *affine, eps).to(x.dtype)


def _matrix_multiply(a: torch.Tensor, b: torch.Tensor, *, transpose: bool) -> torch.Tensor:
    assert a.dtype is b.dtype and a.ndim == b.ndim
    return (_wide(a) @ _wide(b.mT if transpose else b)).to(a.dtype)


def _shuffle(
    x: torch.Tensor,
    *,
    first: tuple[int, ...] | None = None,
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    x = x if first is None else x.permute(first)
    if shape is None:
        return x
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def _slice(x: torch.Tensor, *, axis: int, start: int, stop: int, step: int) -> torch.Tensor:
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def _concatenation(*xs: torch.Tensor, axis: int) -> torch.Tensor:
    assert len({x.dtype for x in xs}) == 1
    return torch.cat(xs, axis)


def _gather(x: torch.Tensor, indices: torch.Tensor, *, axis: int) -> torch.Tensor:
    rows: torch.Tensor = x.index_select(axis, indices.flatten())
    return rows.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _kv_cache_update(
    cache: torch.Tensor, update: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    assert cache.dtype is update.dtype and start.dtype in (torch.int32, torch.int64)
    length = update.shape[2]
    for row, (new, first) in enumerate(zip(update, start.tolist(), strict=True)):
        assert 0 <= first <= cache.shape[2] - length, f"row {row} writes {length} at {first}"
        cache[row, :, first : first + length] = new
    return cache


def _rotary_embedding(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    interleaved: bool,
    width: int,
) -> torch.Tensor:
    assert x.dtype is cos.dtype is sin.dtype and positions.ndim == 2
    turned, rest = (x, x[..., :0]) if width == 0 else (x[..., :width], x[..., width:])
    c, s = (_wide(table)[positions][:, None] for table in (cos, sin))
    turned = _wide(turned)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = (a * c - b * s, a * s + b * c)
    found: torch.Tensor = (
        torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    )
    return torch.cat((found.to(x.dtype), rest), -1)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    assert q.dtype is k.dtype is v.dtype and mask.dtype is torch.bool
    assert mask.shape == (q.shape[0], 1, q.shape[2], k.shape[2]) and mask.any(-1).all()
    repeats = q.shape[1] // k.shape[1]
    # What no query sees may be anything in a check, and is cleared in an engine's caches.
    seen = mask.any(2, keepdim=True).mT  # [B, 1, L, 1]
    v = torch.where(seen, v, torch.zeros((), dtype=v.dtype))
    keys, values = (_wide(x).repeat_interleave(repeats, 1) for x in (k, v))
    scores = (_wide(q) @ keys.mT).masked_fill(~mask, float("-inf"))
    found: torch.Tensor = scores.softmax(-1) @ values
    return found.to(q.dtype)


def _quantize(x: torch.Tensor, scale: torch.Tensor, *, dtype: DType) -> torch.Tensor:
    assert scale.ndim == 0 and dtype is DType.F8E4M3
    return (_wide(x) / scale.float()).clamp(-448, 448).to(dtype.torch)


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, *, dtype: DType) -> torch.Tensor:
    if scale.ndim == 2:  # by groups of columns
        assert scale.dtype is dtype.torch
        spread = scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    else:
        assert scale.dtype is torch.float32
        spread = scale if scale.ndim == 0 else scale[:, None]
    return (codes.float() * spread).to(dtype.torch)


_LAYERS: dict[str, Op] = {
    "cast": _cast,
    "unary": _unary,
    "activation": _activation,
    "elementwise": _elementwise,
    "select": _select,
    "reduce": _reduce,
    "softmax": _softmax,
    "normalization": _normalization,
    "matrix_multiply": _matrix_multiply,
    "shuffle": _shuffle,
    "slice": _slice,
    "concatenation": _concatenation,
    "gather": _gather,
    "kv_cache_update": _kv_cache_update,
    "rotary_embedding": _rotary_embedding,
    "attention": _attention,
    "quantize": _quantize,
    "dequantize": _dequantize,
}
