"""How a region's session gets its weights and operands: without copies or stale ones."""

from __future__ import annotations

import pytest
import torch

from onnx_running import running
from tilewright.codegen.onnx import session as session_module
from tilewright.codegen.onnx.session import open_session
from tilewright.errors import EngineError, UsageError


def test_small_and_large_weights_of_every_kind_of_op() -> None:
    text = (
        "def g(x: f32[2, 8, 16, 16], t: f32[N, 300]):\n"
        '    kernel: f32[32, 8, 3, 3] = param("kernel")\n    bias: f32[32] = param("bias")\n'
        '    wide: f32[400, 300] = param("wide")\n    table: f32[1, 400] = param("table")\n'
        "    c: f32[2, 32, 16, 16] = conv(x, kernel, bias, stride=(1, 1), padding=(1, 1), "
        "dilation=(1, 1), groups=1)\n"
        "    relu_0: f32[2, 32, 16, 16] = relu(c)\n"
        "    y: f32[N, 400] = linear(t, wide)\n"
        "    squared: f32[1, 400] = mul(table, table)\n"
        "    z: f32[N, 400] = add(y, squared)\n"
        '    return {"c": relu_0, "z": z}\n'
    )
    shapes = {"kernel": (32, 8, 3, 3), "bias": (32,), "wide": (400, 300), "table": (1, 400)}
    engine = running(text, {name: torch.randn(shape) for name, shape in shapes.items()})
    assert engine.whole
    engine.check([torch.randn(2, 8, 16, 16), torch.randn(3, 300)], 1e-4)


def test_large_weights_within_a_branch() -> None:
    text = """\
def g(x: f32[2, 64], p: bool[()]):
    def yes(a: f32[2, 64], w: f32[64, 64]):
        y: f32[2, 64] = linear(a, w)
        return {"out0": y}
    def no(a: f32[2, 64], w: f32[64, 64]):
        t: f32[64, 64] = permute(w, dims=(1, 0))
        y: f32[2, 64] = linear(a, t)
        return {"out0": y}
    w: f32[64, 64] = param("w")
    y: f32[2, 64] = cond(p, x, w, then=yes, otherwise=no)
    return {"y": y}
"""
    engine = running(text, {"w": torch.randn(64, 64)})
    assert engine.whole, engine.lowered.notes
    for p in (True, False):
        engine.check([torch.randn(2, 64), torch.tensor(p)], 1e-4)


def test_weights_of_matmuls_are_shared_not_copied() -> None:
    weight = torch.randn(64, 64)
    text = (
        'def g(ids: i64[N]):\n    w: f32[64, 64] = param("w")\n'
        '    y: f32[N, 64] = embedding(w, ids)\n    return {"y": y}\n'
    )
    engine = running(text, {"w": weight})
    ids = torch.tensor([3, 5])
    torch.testing.assert_close(engine.run([ids])["y"], weight[ids])
    weight[3] = 7.0
    assert (engine.run([ids])["y"][0] == 7.0).all()


def test_inputs_beyond_the_kept_buffers_are_bound_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "COPY_BYTES", 16)
    monkeypatch.setattr(session_module, "_KEPT_BINDINGS", 2)
    text = 'def g(x: f32[N, 4]):\n    y: f32[N, 4] = exp(x)\n    return {"y": y}\n'
    engine = running(text)
    for rows in (1, 5, 3, 5, 1, 2, 1):
        engine.check([torch.randn(rows, 4)])


def test_results_stay_when_the_next_run_comes() -> None:
    text = 'def g(x: f32[N]):\n    y: f32[N] = exp(x)\n    return {"y": y}\n'
    engine = running(text)
    first = engine.run([torch.zeros(3)])["y"]
    engine.run([torch.ones(3)])
    assert (first == 1.0).all()


def test_strided_and_empty_inputs() -> None:
    text = 'def g(x: f32[N, M]):\n    y: f32[N, M] = exp(x)\n    return {"y": y}\n'
    engine = running(text)
    engine.check([torch.randn(4, 3).t()])
    assert engine.run([torch.empty(0, 3)])["y"].shape == (0, 3)


def test_wrong_inputs_are_refused_before_the_session_sees_them() -> None:
    text = 'def g(x: f32[N, 4]):\n    y: f32[N, 4] = exp(x)\n    return {"y": y}\n'
    with pytest.raises(UsageError, match="input 'x'"):
        running(text).run([torch.randn(2, 5)])


def test_the_setting_gives_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_THREADS", "1")
    text = 'def g(x: f32[4]):\n    y: f32[4] = exp(x)\n    return {"y": y}\n'
    model = running(text).lowered.files["onnx/model_0.onnx"]
    assert open_session(model, {}).get_session_options().intra_op_num_threads == 1


def test_values_that_an_op_cannot_take_are_one_clear_error() -> None:
    text = (
        "def g(table: f32[4, 2], ids: i64[N]):\n"
        '    y: f32[N, 2] = embedding(table, ids)\n    return {"y": y}\n'
    )
    with pytest.raises(UsageError, match="ids within their table"):
        running(text).run([torch.randn(4, 2), torch.tensor([1, 9])])


def test_a_model_that_does_not_open_names_the_remedy() -> None:
    with pytest.raises(EngineError, match="backend='eager'"):
        open_session(b"", {})


def test_half_precision_weights() -> None:
    text = (
        'def g(x: f16[N, 64]):\n    w: f16[64, 64] = param("w")\n'
        '    y: f16[N, 64] = linear(x, w)\n    return {"y": y}\n'
    )
    running(text, {"w": torch.randn(64, 64).half()}).check([torch.randn(3, 64).half()], 2e-2)
