"""The provider is the device's, or an error that says what to install: never another in silence."""

from __future__ import annotations

import onnxruntime as ort
import pytest
import torch

from onnx_running import running
from tilewright.codegen.onnx import providers
from tilewright.codegen.onnx.session import open_session
from tilewright.errors import EngineError

GPU = torch.device("cuda", 1)
TEXT = 'def g(x: f32[N, 3]):\n    y: f32[N, 3] = neg(x)\n    return {"y": y}\n'


def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [providers.CUDA, providers.CPU])


def test_the_cpu_asks_for_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch)
    assert providers.providers_on(torch.device("cpu")) == ["CPUExecutionProvider"]


def test_a_gpu_asks_for_cuda_on_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch)
    wanted = [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]
    assert providers.providers_on(GPU) == wanted


def test_an_onnxruntime_without_cuda_says_what_to_install() -> None:
    (model,) = running(TEXT).lowered.files.values()
    with pytest.raises(EngineError, match=r"found onnxruntime .*CPUExecutionProvider.*-gpu"):
        open_session(model, {}, GPU)


def test_a_session_that_left_cuda_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu does, with a log line, where its libraries do not load."""
    (model,) = running(TEXT).lowered.files.values()
    plain = ort.InferenceSession
    with_cuda(monkeypatch)
    monkeypatch.setattr(
        ort, "InferenceSession", lambda m, o, providers: plain(m, o, providers=providers[1:])
    )
    with pytest.raises(EngineError, match="CUDA was left out.*Install the CUDA and cuDNN"):
        open_session(model, {}, GPU)
