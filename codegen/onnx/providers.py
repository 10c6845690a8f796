"""Which execution provider of ONNX Runtime runs a session: that of the device, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...errors import EngineError

if TYPE_CHECKING:
    import onnxruntime as ort

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INSTALL = "pip install onnxruntime-gpu in place of onnxruntime"


def cuda_missing() -> str:
    """What the installed onnxruntime has in place of a CUDA provider; '' where it has that."""
    import onnxruntime as ort

    available = ort.get_available_providers()
    return "" if CUDA in available else f"onnxruntime {ort.__version__} with {', '.join(available)}"


def providers_on(device: torch.device) -> list[str | tuple[str, dict[str, Any]]]:
    """What a session on ``device`` asks for, best first. Behind CUDA stands the CPU, for nodes that
    CUDA has no kernel for.

    Raises:
        EngineError: the device is a GPU, and the installed onnxruntime has no provider for it.
    """
    if device.type == "cpu":
        return [CPU]
    missing = cuda_missing()
    if missing:
        raise _no_cuda(missing, f"{INSTALL}, or compile for target='cpu'.")
    return [(CUDA, {"device_id": device.index or 0}), CPU]


def check_taken(session: ort.InferenceSession, device: torch.device) -> None:
    """EngineError where ONNX Runtime left CUDA out by itself, as it does with a mere log line when
    a library is missing or of another version.
    """
    taken = session.get_providers()
    if device.type != "cpu" and taken[:1] != [CUDA]:
        raise _no_cuda(
            f"a session by {', '.join(taken)} alone: CUDA was left out",
            "Install the CUDA and cuDNN that this onnxruntime was built for (it logs what is "
            "missing), or compile for target='cpu'.",
        )


def _no_cuda(found: str, remedy: str) -> EngineError:
    return EngineError(
        "an engine of backend 'onnxruntime' on a GPU",
        expected=f"an onnxruntime with {CUDA}",
        found=found,
        remedy=remedy,
    )
