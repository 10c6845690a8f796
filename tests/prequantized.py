"""Writers of quantized checkpoints, from the formats' descriptions, over float64 and ints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_models import tiny_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Edit = Callable[[dict[str, Tensor]], object]


def pack(codes: np.ndarray, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Unsigned codes [R, C] -> int32 [R, C bits / 32]; position i of a word holds column
    order[i] of its columns.
    """
    per = 32 // bits
    order = order or range(per)
    padded = np.pad(codes.astype(np.uint64), ((0, 0), (0, -codes.shape[1] % per)))
    words = np.zeros((codes.shape[0], padded.shape[1] // per), np.uint64)
    for place, column in enumerate(order):
        words |= padded[:, column::per] << np.uint64(bits * place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


@dataclass
class Grid:
    """Unsigned codes [N, K], float64 scales and zero points [N, G], and each column's group."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    groups: np.ndarray

    @property
    def value(self) -> Tensor:
        steps = self.codes.astype(np.float64) - self.zero[:, self.groups]
        return torch.from_numpy(steps * self.scale[:, self.groups])


def grid_of(
    weight: Tensor, bits: int, group: int, symmetric: bool, groups: np.ndarray | None = None
) -> Grid:
    """Rounds to nearest; scales are float16 numbers."""
    wide = weight.detach().double().numpy()
    width = wide.shape[1]
    size = group or width
    groups = np.arange(width) // size if groups is None else groups
    count, top = int(groups.max()) + 1, 2**bits - 1
    scale, zero = np.zeros((2, wide.shape[0], count))
    for index in range(count):
        part = wide[:, groups == index]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        span = 2 * np.maximum(-low, high) if symmetric else high - low
        scale[:, index] = (span / top).astype(np.float16)
        middle = np.full(len(low), 2.0 ** (bits - 1))
        zero[:, index] = middle if symmetric else np.round(-low / scale[:, index])
    zero = zero.clip(1, top)
    codes = np.round(wide / scale[:, groups] + zero[:, groups]).clip(0, top)
    return Grid(codes.astype(np.int64), scale, zero.astype(np.int64), groups)


def gptq_tensors(grid: Grid, bits: int, version: int = 1) -> dict[str, Tensor]:
    zero = (grid.zero.T - (version == 1)) % 2**bits
    return {
        "qweight": pack(grid.codes, bits).T.contiguous(),
        "qzeros": pack(zero, bits),
        "scales": torch.from_numpy(grid.scale.T).half().contiguous(),
        "g_idx": torch.from_numpy(grid.groups).int(),
    }


def awq_tensors(grid: Grid) -> dict[str, Tensor]:
    return {
        "qweight": pack(grid.codes.T, 4, AWQ_ORDER),
        "qzeros": pack(grid.zero.T, 4, AWQ_ORDER),
        "scales": torch.from_numpy(grid.scale.T).half().contiguous(),
    }


def packed_tensors(grid: Grid, bits: int, symmetric: bool) -> dict[str, Tensor]:
    found = {
        "weight_packed": pack(grid.codes, bits),
        "weight_scale": torch.from_numpy(grid.scale).half(),
        "weight_shape": torch.tensor(grid.codes.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = pack(grid.zero.T, bits).T.contiguous()
    return found


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of the layers: not lm_head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


Quantize = Callable[[str, nn.Linear], tuple[dict[str, Tensor], Tensor]]


def write_folder(
    folder: Path, settings: Mapping[str, object], quantize: Quantize, name: str = "llama"
) -> PreTrainedModel:
    """A folder of a tiny model whose linears `quantize` gives the tensors and the value of; the
    model with these values, in float64.
    """
    model = tiny_model(name)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for path, linear in linears(model).items():
        made, value = quantize(path, linear)
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in made.items()}
        linear.weight.data = value.float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=dict(settings))
    return model.double()


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rounding(
    model: nn.Module,
    dtype: torch.dtype,
    static: Mapping[str, float] | None = None,
    group: int | None = None,
) -> None:
    """Rounds the input of each linear of the layers to codes: a scale a token (and group of
    columns), or one by name.
    """
    top = 127.0 if dtype == torch.int8 else 448.0

    def hook(name: str):
        def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0] if group is None else args[0].unflatten(-1, (-1, group))
            scale = x.abs().amax(-1, keepdim=True) / top
            if static is not None:
                scale = torch.tensor(static[name], dtype=x.dtype)
            steps = (x / scale).clamp(-top, top)
            steps = steps.round() if dtype == torch.int8 else steps.to(dtype).to(x)
            return ((steps * scale).reshape(args[0].shape),)

        return before

    for name, linear in linears(model).items():
        linear.register_forward_pre_hook(hook(name))


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]
