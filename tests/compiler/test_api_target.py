"""What target="auto" and backend="auto" mean on machines with and without a GPU."""

from __future__ import annotations

import pytest

from tilewright.compiler.options import CompileOptions, resolve_options
from tilewright.errors import UnsupportedError
from tilewright.targets import Target


def resolved(target: str, backend: str) -> CompileOptions:
    return resolve_options(
        target=target,
        backend=backend,
        kv_cache="auto",
        dtype="auto",
        max_model_len=None,
        max_batch_size=None,
        verify="off",
        trust_remote_code=False,
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("here", "backend", "target", "chosen"),
    [
        ("cpu", "auto", "cpu", "onnxruntime"),
        ("cpu", "eager", "cpu", "eager"),
        ("h100", "auto", "h100", "triton"),
        ("h100", "eager", "h100", "eager"),
        ("h100", "onnxruntime", "cpu", "onnxruntime"),
    ],
)
def test_auto(
    here: str, backend: str, target: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "detect", lambda: Target.parse(here))
    options = resolved("auto", backend)
    assert (options.target.name, options.backend) == (target, chosen)


def test_a_backend_of_cpus_does_not_compile_for_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="runs on that device: triton or eager"):
        resolved("h100", "onnxruntime")
