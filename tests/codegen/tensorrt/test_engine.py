"""Engines that TensorRT for RTX builds without a GPU: it comes with the extra `dev` on Linux."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

import tilewright as tw
from tensorrt_running import ROOM, graph_of, lowered
from tilewright.codegen.base import get_backend
from tilewright.codegen.tensorrt import builder
from tilewright.codegen.tensorrt.builder import Built, build_engine
from tilewright.codegen.tensorrt.decoder import lower_decoder
from tilewright.codegen.tensorrt.flavor import Flavor, find_flavor
from tilewright.codegen.tensorrt.network import Constant, Network
from tilewright.codegen.tensorrt.plan import read_plan
from tilewright.codegen.tensorrt.profiles import decoder_profiles
from tilewright.errors import UnsupportedError
from tilewright.formats.atomic import atomic_file
from tilewright.targets import TARGETS

pytest.importorskip("tensorrt_rtx", reason="needs pip install tilewright[tensorrt], 96 MB")
ALL = (80, 89, 120)
BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_tensorrt_build.py"


@pytest.fixture(scope="module")
def flavor() -> Flavor:
    return find_flavor(["tensorrt_rtx"])


def built(network: Network, flavor: Flavor, path: Path, archs=ALL, strict=True) -> Built:
    with atomic_file(path) as file:
        return build_engine(network, flavor, archs, decoder_profiles(4, ROOM), file, strict)


INT4 = tw.QuantConfig("int4", 64, method="rtn")
FP8 = tw.QuantConfig("fp8-weight", method="rtn")


@pytest.mark.parametrize(
    ("shape", "dtype", "codes", "archs"),
    [
        ("SmolLM2", "bfloat16", None, ALL),
        ("SmolLM2", "bfloat16", INT4, ALL),
        ("SmolLM2", "bfloat16", FP8, (89, 120)),
        pytest.param("1B", "float16", None, ALL, marks=pytest.mark.nightly),
        pytest.param("SmolLM2", "float16", None, ALL, marks=pytest.mark.nightly),
        pytest.param("1B", "bfloat16", None, ALL, marks=pytest.mark.nightly),
        pytest.param("1B", "bfloat16", INT4, ALL, marks=pytest.mark.nightly),
        pytest.param("1B", "bfloat16", FP8, (89, 120), marks=pytest.mark.nightly),
    ],
)
def test_attention_is_fused_and_caches_stay(
    shape: str, dtype: str, codes, archs, flavor: Flavor, tmp_path: Path
) -> None:
    """True widths, few layers: one engine for all targets, by what it says of itself."""
    found = lower_decoder(graph_of(shape, dtype, codes), {}, ROOM)
    engine = built(found.network, flavor, tmp_path / "e", archs)
    assert engine.fused and engine.archs == archs and not engine.notes
    assert engine.bytes == (tmp_path / "e").stat().st_size
    alone = sum(size_of(constant) for constant in found.network.constants.values())
    assert alone < engine.bytes < 1.2 * alone + 10e6
    plan = read_plan(tmp_path / "e")
    layers = len(found.caches) // 2
    # One kernel a layer in each of the two profiles, and no cache is copied.
    assert sum(plan.attention_kernels.values()) == 2 * layers, plan.kernels
    assert {cache.present for cache in found.caches} <= plan.in_place


def size_of(constant: Constant) -> float:
    """Its bytes in an engine."""
    return prod(constant.shape) * (0.5 if constant.four_bits else constant.dtype.bytes)


def test_int8_codes(flavor: Flavor, tmp_path: Path) -> None:
    config = tw.QuantConfig("int8-weight", method="rtn")
    network = lower_decoder(graph_of("SmolLM2", "bfloat16", config), {}, ROOM).network
    assert built(network, flavor, tmp_path / "e", (80,)).fused


def test_float32_has_attention_in_parts(flavor: Flavor, tmp_path: Path) -> None:
    network = lowered("llama", "float32").network
    with pytest.raises(UnsupportedError, match="option strict.*no fused kernel of it for sm_89"):
        built(network, flavor, tmp_path / "e", (89,))
    assert list(tmp_path.iterdir()) == []
    engine = built(network, flavor, tmp_path / "e", (89,), strict=False)
    assert not engine.fused and "by parts" in engine.notes[0]


def test_a_target_that_it_has_not(flavor: Flavor, tmp_path: Path) -> None:
    network = lowered("llama", "bfloat16").network
    with pytest.raises(UnsupportedError, match="targets among .*sm_89.*found sm_90"):
        built(network, flavor, tmp_path / "e", (90,))
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_it_refuses(flavor: Flavor, tmp_path: Path) -> None:
    network = lowered("llama", "bfloat16").network
    broken = [
        replace(layer, kind="unary", attrs={"op": "not"}) if layer.kind == "cast" else layer
        for layer in network.layers
    ]
    wrong = Network(network.inputs, network.constants, tuple(broken), network.outputs)
    with pytest.raises(UnsupportedError, match="one that tensorrt_rtx .* builds"):
        built(wrong, flavor, tmp_path / "e", (89,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
def test_refit_needs_a_gpu(flavor: Flavor, tmp_path: Path, monkeypatch) -> None:
    """Why there is no refit: once this builds, offer it."""
    configure = builder._Build._config

    def refittable(build, made):
        config = configure(build, made)
        config.set_flag(flavor.api.BuilderFlag.REFIT)
        return config

    monkeypatch.setattr(builder._Build, "_config", refittable)
    network = lower_decoder(graph_of("SmolLM2", "bfloat16"), {}, ROOM).network
    with pytest.raises(UnsupportedError, match="CUDA_SUCCESS"):
        built(network, flavor, tmp_path / "e", (89,))


@pytest.mark.nightly
def test_regions_around_experts(flavor: Flavor) -> None:
    """What an engine folder of a model with experts holds."""
    backend = get_backend("tensorrt")
    lowered = backend.lower(graph_of("mixtral", "bfloat16"), TARGETS["l4"], ROOM, False, 4)
    kernels = [call.kernel for call in lowered.program.calls if call.loader == "tensorrt"]
    assert kernels == [f"tensorrt/tensorrt/region_{i}.engine" for i in range(3)]
    assert all(len(lowered.files[kernel.split("/", 1)[1]]) > 10_000 for kernel in kernels)


@pytest.mark.nightly
def test_engines_of_whole_models(smollm2_gguf: Path, tmp_path: Path) -> None:
    """SmolLM2 and the 1B shape, all layers, in every form: prints sizes and build times, and fails
    where attention is in parts or a cache is copied.
    """
    out = tmp_path / "builds.jsonl"
    command = [sys.executable, str(BENCHMARK), str(smollm2_gguf), "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert len(out.read_text().splitlines()) == 11
