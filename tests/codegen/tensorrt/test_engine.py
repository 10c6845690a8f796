"""Engines of a tiny model, built by TensorRT for RTX without a GPU, where it is installed.

CI does not install it: a download of 96 MB, 233 MB on the disk.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tilewright as tw
from tensorrt_running import ROOM, graph_of, lowered
from tilewright.codegen.tensorrt.builder import Built, build_engine
from tilewright.codegen.tensorrt.decoder import lower_decoder
from tilewright.codegen.tensorrt.flavor import Flavor, find_flavor
from tilewright.codegen.tensorrt.network import Network
from tilewright.codegen.tensorrt.plan import read_plan
from tilewright.codegen.tensorrt.profiles import decoder_profiles
from tilewright.errors import UnsupportedError
from tilewright.formats.atomic import atomic_file

pytest.importorskip("tensorrt_rtx", reason="needs pip install tilewright[tensorrt], 96 MB")
ALL = (80, 89, 120)


@pytest.fixture(scope="module")
def flavor() -> Flavor:
    return find_flavor(["tensorrt_rtx"])


def built(network: Network, flavor: Flavor, path: Path, archs=ALL, strict=True) -> Built:
    with atomic_file(path) as file:
        return build_engine(network, flavor, archs, decoder_profiles(4, ROOM), file, strict)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_is_fused_and_caches_stay(dtype: str, flavor: Flavor, tmp_path: Path) -> None:
    found = lowered("llama", dtype)
    engine = built(found.network, flavor, tmp_path / "e")
    assert engine.fused and engine.archs == ALL and not engine.notes
    assert engine.bytes == (tmp_path / "e").stat().st_size > 10_000
    plan = read_plan(tmp_path / "e")
    # One kernel a layer in each of the two profiles.
    assert sum(plan.attention_kernels.values()) == 4, plan.kernels
    assert {cache.present for cache in found.caches} <= plan.in_place


@pytest.mark.parametrize(
    ("scheme", "group", "archs"),
    [("int4", 32, ALL), ("int8-weight", None, ALL), ("fp8-weight", None, (89, 120))],
)
def test_codes(scheme: str, group: int | None, archs, flavor: Flavor, tmp_path: Path) -> None:
    config = tw.QuantConfig(scheme, group, method="rtn")
    network = lower_decoder(graph_of("llama", "bfloat16", config), {}, ROOM).network
    assert built(network, flavor, tmp_path / "e", archs).fused


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
