"""What can be wrong with a GPU: said in one message, exit code 2, and nothing written."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import tilewright as tw
from canned_binaries import canned_binaries
from cli_running import COMPILE, refused, run
from tilewright.codegen.persistent import loading
from tilewright.codegen.triton.launch import refused as driver_refused
from tilewright.codegen.triton.package import read_package
from tilewright.errors import CapacityError, EngineError, KernelError, UnsupportedError
from tilewright.runtime import refit as refitting
from tilewright.runtime.engine import start
from tilewright.runtime.refit import refit
from tilewright.targets import TARGETS, Target, gpu_problem
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def cross_compiled():
    with canned_binaries():
        return tw.compile(tiny_model("llama"), target="h100", verify="off", max_model_len=64)


def test_an_engine_for_a_gpu_on_a_machine_without(cross_compiled, tmp_path) -> None:
    cross_compiled.save(tmp_path / "engine")
    result = run("generate", tmp_path / "engine", "hello")
    refused(result, "a sm_90 device, which it was compiled for (h100)", "cpu")
    if torch.version.cuda is None:
        assert "is a build without CUDA" in result.stderr


def test_a_driver_that_is_too_old_is_told_in_torchs_words(monkeypatch) -> None:
    def init() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nMore"
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert gpu_problem() == "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert gpu_problem() == "no CUDA device is visible"


def test_an_engine_for_another_gpu_is_compiled_there_with_a_note(
    cross_compiled, monkeypatch
) -> None:
    monkeypatch.setattr(Target, "detect", lambda: TARGETS["a100"])
    anew = r"compiled for h100 \(sm_90\).*anew for a100 \(sm_80\)"
    with canned_binaries(), pytest.warns(UserWarning, match=anew):
        image = refit(cross_compiled.image)
    assert image.target == "a100" and image.weights is cross_compiled.image.weights
    assert [call.kernel for call in image.program.calls if "linear" in call.kernel]
    binaries = [name for name in image.files if name.endswith(".cubin")]
    assert binaries and all(name.endswith("sm_80.cubin") for name in binaries)


@pytest.fixture(scope="module")
def one_launch():
    """An engine whose decode steps are one launch of 132 programs, and one without."""
    model = tiny_model("llama").bfloat16()
    options = {"target": "h100", "verify": "off", "max_model_len": 64, "backend": "triton"}
    with canned_binaries():
        return [tw.compile(model, decode=way, **options) for way in ("persistent", "kernels")]


@pytest.mark.parametrize(
    ("sms", "triton", "lacking"),
    [(114, True, "more multiprocessors than the 114 of h100"), (132, False, "Triton, which")],
)
def test_one_launch_that_cannot_be_here_becomes_separate_kernels(
    one_launch, monkeypatch, sms, triton, lacking
) -> None:
    with_it, without = (engine.image for engine in one_launch)
    monkeypatch.setattr(Target, "detect", lambda: TARGETS["h100"].override(sms=sms))
    monkeypatch.setattr(refitting, "find_spec", lambda name: name if triton else None)
    with pytest.warns(UserWarning, match=f"run as separate kernels.*{lacking}"):
        image = refit(with_it)
    assert image.decode.program == without.decode.program
    assert refit(without) is without
    monkeypatch.setattr(Target, "detect", lambda: TARGETS["h100"])
    monkeypatch.setattr(refitting, "find_spec", lambda name: name)
    assert refit(with_it) is with_it
    decode = with_it.decode

    def launch_source(call):
        raise ImportError("no hopper here")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="another Triton"):
        patch.setattr(loading, "launch_source", launch_source)
        assert refit(with_it).decode.program == without.decode.program
    calls = [
        dataclasses.replace(call, attrs={**call.attrs, "ahead": 3})
        if call.kind == "persistent"
        else call
        for call in decode.program.calls
    ]
    older = dataclasses.replace(decode.program, calls=tuple(calls))
    other = dataclasses.replace(with_it, decode=dataclasses.replace(decode, program=older))
    with pytest.warns(UserWarning, match="which needs the version of Tilewright"):
        assert refit(other).decode.program == without.decode.program


def test_an_engine_for_another_gpu_without_triton_is_refused(cross_compiled, monkeypatch) -> None:
    monkeypatch.setattr(Target, "detect", lambda: TARGETS["a100"])
    monkeypatch.setattr(refitting, "find_spec", lambda name: None)
    assert refit(cross_compiled.image) is cross_compiled.image
    with pytest.raises(EngineError, match=r"expected a sm_90 device.*compile with target='a100'"):
        cross_compiled(torch.tensor([1, 2]))


def test_kernels_that_the_driver_refuses_are_compiled_here_or_named(
    cross_compiled, monkeypatch
) -> None:
    image = cross_compiled.image
    ids = {name.split("/")[1] for name in image.files if name.endswith(".cubin")}
    package = read_package(image.files.__getitem__, sorted(ids)[0])
    error = driver_refused(next(iter(package.binaries.values())), "CUDA_ERROR_INVALID_IMAGE")
    assert "cubin of" in str(error) and "Update the NVIDIA driver" in str(error)
    loaded = []

    def load(image):
        loaded.append(image)
        if len(loaded) == 1:
            raise error
        return image

    monkeypatch.setattr(Target, "detect", lambda: TARGETS["h100"])
    monkeypatch.setattr("tilewright.runtime.engine.CausalLMEngine", load)
    anew = r"do not load \(CUDA_ERROR_INVALID_IMAGE\).*anew for h100"
    with canned_binaries(), pytest.warns(UserWarning, match=anew):
        again = start(image)
    # Kernels are those of no tuning, so the note of what was tuned is gone too.
    assert again is loaded[1] and again.files.keys() == image.files.keys() - {"tuning.jsonl"}
    loaded.clear()
    monkeypatch.setattr(refitting, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="CUDA_ERROR_INVALID_IMAGE"):
        start(image)


def test_a_device_of_the_same_architecture_takes_the_engine_as_it_is(
    cross_compiled, monkeypatch
) -> None:
    monkeypatch.setattr(Target, "detect", lambda: TARGETS["h200"])
    assert refit(cross_compiled.image) is cross_compiled.image


def test_a_target_that_triton_does_not_know(gguf, tmp_path, monkeypatch) -> None:
    old = dataclasses.replace(TARGETS["a100"], name="v100", arch=70)
    with pytest.raises(UnsupportedError, match=r"sm_70: expected one of sm_80, .*found sm_70"):
        tw.compile(torch.nn.LayerNorm(4), (torch.randn(2, 4),), target=old, verify="off")
    monkeypatch.setattr("tilewright.targets.table.TARGETS", {**TARGETS, "v100": old})
    result = run(
        "compile", gguf, "-o", tmp_path / "e", *COMPILE, "--target", "v100", "--backend", "triton"
    )
    refused(result, "sm_70", "backend='eager'")
    assert not (tmp_path / "e").exists()


def test_triton_that_is_not_installed(monkeypatch) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("tilewright.codegen.triton.aot.metadata.version", version)
    with pytest.raises(UnsupportedError, match="the package triton.*pip install triton"):
        tw.compile(torch.nn.LayerNorm(4), (torch.randn(2, 4),), target="h100", backend="triton")


def test_too_little_memory_for_the_cache_says_how_much_it_needs() -> None:
    engine = tw.compile(tiny_model("llama"), backend="eager", target="cpu", verify="off")
    with pytest.raises(CapacityError, match=r"KV cache: expected .* GB for 4 buffers.*max_model"):
        engine.executor.allocate(1 << 50, 16)


def test_targets_says_why_there_is_no_gpu() -> None:
    assert json.loads(run("targets", "--json").stdout)["gpu_problem"] == gpu_problem()
