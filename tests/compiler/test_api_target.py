"""What target="auto" and backend="auto" mean on machines with and without a GPU."""

from __future__ import annotations

import pytest

from tilewright.compiler.options import CompileOptions, KVCacheConfig, resolve_options
from tilewright.errors import UnsupportedError
from tilewright.ir.dtypes import DType
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


def with_codes(target: str, backend: str, kind: str, dtype: str) -> CompileOptions:
    return resolve_options(
        target=target,
        backend=backend,
        kv_cache=KVCacheConfig(kind, dtype=dtype),
        dtype="auto",
        max_model_len=None,
        max_batch_size=None,
        verify="off",
        trust_remote_code=False,
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("target", "backend", "kind", "dtype", "codes"),
    [
        ("h100", "triton", "auto", "fp8", DType.F8E4M3),
        ("h100", "triton", "paged", "int8", DType.I8),
        ("a100", "triton", "auto", "int8", DType.I8),
        ("a100", "eager", "auto", "fp8", DType.F8E4M3),
        ("cpu", "eager", "auto", "fp8", DType.F8E4M3),
        ("cpu", "triton", "auto", "fp8", DType.F8E4M3),
        ("h100", "triton", "auto", "auto", None),
    ],
)
def test_what_a_cache_holds(target: str, backend: str, kind: str, dtype: str, codes) -> None:
    found = with_codes(target, backend, kind, dtype)
    assert (found.codes, found.cache) == (codes, "paged")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("target", "backend", "kind", "dtype", "says"),
    [
        ("cpu", "onnxruntime", "auto", "fp8", "triton and eager"),
        ("cpu", "auto", "auto", "int8", "triton and eager"),
        ("h100", "triton", "static", "int8", "kv_cache 'auto' or 'paged'"),
        ("a100", "triton", "auto", "fp8", "dtype='int8'"),
    ],
)
def test_codes_that_cannot_be_had_say_what_can(
    target: str, backend: str, kind: str, dtype: str, says: str
) -> None:
    with pytest.raises(UnsupportedError) as raised:
        with_codes(target, backend, kind, dtype)
    assert says in str(raised.value)


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


def test_onnxruntime_compiles_for_a_gpu_where_it_has_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    match = "triton, eager, or onnxruntime with CUDAExecutionProvider.*onnxruntime-gpu"
    with pytest.raises(UnsupportedError, match=match):
        resolved("h100", "onnxruntime")
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    assert resolved("h100", "onnxruntime").backend == "onnxruntime"
    assert resolved("h100", "auto").backend == "triton"  # which was not asked for
