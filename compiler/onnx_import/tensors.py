"""Tensors of a file as torch's, mapped from disk where they lie beside it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx_ir
import torch

from ...errors import CheckpointError
from .rules.dtypes import DTYPES

_BITS = {"BFLOAT16": (np.int16, torch.bfloat16), "FLOAT8E4M3FN": (np.uint8, torch.float8_e4m3fn)}


def read_tensor(tensor: onnx_ir.TensorProtocol, path: str) -> torch.Tensor:
    """The numbers of a tensor; codes of 4 bits as int8 or uint8, one a byte.

    Raises:
        CheckpointError: bytes that are missing or too few, or an element type that torch lacks.
    """
    kind = tensor.dtype.name
    try:
        array = np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape.numpy())
        if kind in ("INT4", "UINT4"):
            array = array.astype(np.int8 if kind == "INT4" else np.uint8)
        elif kind in _BITS:
            array = array.view(_BITS[kind][0])
        elif int(tensor.dtype) not in DTYPES:
            raise TypeError(f"element type {kind}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"tensor {tensor.name!r} of {path}",
            expected=f"{kind} [{', '.join(map(str, tensor.shape))}]",
            found=" ".join(str(error).split())[:200],
            remedy="Copy the file and its data again.",
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mapped array is read-only, and so is a weight
        found = torch.from_numpy(array)
    return found.view(_BITS[kind][1]) if kind in _BITS else found


def check_external(tensor: onnx_ir.ExternalTensor, path: Path) -> None:
    """That the bytes of a tensor beside the file are there.

    Raises:
        CheckpointError: no such file, one outside of the folder, or one that is too short.
    """
    folder, place = path.parent.resolve(), Path(tensor.location)
    target = (folder / place).resolve()
    wanted = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if place.is_absolute() or not target.is_relative_to(folder):
        found = "a place outside of the folder"
    elif not target.is_file():
        found = "no such file"
    elif target.stat().st_size < wanted:
        found = f"{target.stat().st_size} bytes"
    else:
        return
    raise CheckpointError(
        f"external data {tensor.location!r} of tensor {tensor.name!r} in {path}",
        expected=f"a file beside the model with {wanted} bytes or more",
        found=found,
        remedy="Copy it into the folder of the model, under this name.",
    )
