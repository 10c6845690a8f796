"""``backend="tensorrt"``: engine folders that run in TensorRT, here by the reference of its layers
in place of the device, and what is left to torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tilewright as tw
from tensorrt_fakes import Device
from tensorrt_running import graph_of
from tilewright.codegen.base import get_backend
from tilewright.codegen.tensorrt import flavor, regions
from tilewright.codegen.tensorrt.backend import NO_PLUGINS
from tilewright.codegen.tensorrt.profiles import Profile, Range
from tilewright.compiler.options import resolve_options
from tilewright.compiler.quantizing import keeps_codes
from tilewright.errors import EngineError, UnsupportedError, UsageError, VerificationError
from tilewright.runtime.engine import start
from tilewright.runtime.folder import save_engine
from tilewright.runtime.image import EngineImage
from tilewright.targets import TARGETS
from tiny_models import PROMPTS, tiny_model

ROOM, STEPS = 64, 8
SHORT = {"batch": Range(1, 1, 1), "length": Range(1, 5, 5), "rows": Range(1, 5, 5)}
PARAMS = tw.SamplingParams(max_new_tokens=STEPS, ignore_eos=True)
OPTIONS = {"backend": "tensorrt", "target": "l4", "max_model_len": ROOM, "max_batch_size": 3}


@pytest.fixture(scope="module")
def compiled() -> tuple[dict[str, EngineImage], list]:
    """The engines of a dense model and of one with experts, and what they were built from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILEWRIGHT_VERIFY", "structure")
        device = Device(patch)
        models = {family: tiny_model(family) for family in ("llama", "mixtral")}
        images = {name: tw.compile(model, **OPTIONS).image for name, model in models.items()}
        return images, device.networks


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, compiled) -> Device:
    device = Device(monkeypatch)
    device.networks = list(compiled[1])
    return device


@pytest.fixture
def saved(compiled, tmp_path: Path):
    """Writes one of them."""

    def save(family: str) -> Path:
        save_engine(compiled[0][family], tmp_path / "e")
        return tmp_path / "e"

    return save


def hugging_face(family: str) -> list[list[int]]:
    model, found = tiny_model(family), []
    for prompt in PROMPTS:
        row = list(prompt)
        for _ in range(STEPS):
            with torch.no_grad():
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        found.append(row[len(prompt) :])
    return found


def test_tokens_are_hugging_faces(device: Device, saved) -> None:
    folder = saved("llama")
    assert "= attention(" in (folder / "tensorrt" / "region_0.txt").read_text()
    with pytest.raises(EngineError, match="a sm_89 device.*found cpu"):
        tw.load(folder)
    device.plug_in()
    engine = tw.load(folder)
    assert engine.report()["calls"] == {"tensorrt": 1} and not engine.report()["fallbacks"]
    assert not engine.image.weights  # they are in TensorRT's own file
    device.runs.clear()
    for cache in engine.executor.caches.tensors.values():
        cache.fill_(torch.nan)  # as a sequence leaves its slot whose numbers overflowed
    found = [c.token_ids for c in engine.generate([list(p) for p in PROMPTS], PARAMS)]
    assert found == hugging_face("llama")
    # Prompts by the profile of prefill, then all sequences at once by that of decode.
    assert {profile for profile, shape in device.runs if shape[1] > 1} == {0}
    assert (1, (3, 1)) in device.runs
    assert all(cache[:3].isfinite().all() for cache in engine.executor.caches.tensors.values())


def test_compiled_kernels_are_kept(device: Device, saved, tmp_path: Path) -> None:
    folder = saved("llama")
    device.plug_in()
    engine = tw.load(folder)
    engine.generate([[5, 6]], PARAMS)
    engine.save(tmp_path / "warm")
    kept = tmp_path / "warm" / "tensorrt" / "region_0.cache"
    assert kept.read_bytes() == b"ran %d" % STEPS
    warm = tw.load(tmp_path / "warm")
    warm.generate([[5, 6]], PARAMS)
    (found,) = warm.runner.artifacts().values()
    assert found == b"ran %d" % (2 * STEPS)
    kept.write_bytes(b"of another GPU")
    with pytest.raises(EngineError, match="region_0.cache: expected sha256"):
        tw.load(tmp_path / "warm")
    warm.image.files["tensorrt/region_0.cache"] = b"of another GPU"  # it compiles its own
    assert start(warm.image).runner.artifacts()
    # A TensorRT that compiles kernels with the engine has nothing to keep.
    del device.api.IRuntimeCache
    assert not tw.load(folder).runner.artifacts()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_long_prompts_go_in_pieces(family: str, device: Device, saved, compiled) -> None:
    """Sequence by sequence, and each in runs of what a profile takes; the same logits of all of a
    prompt's tokens.
    """
    folder = saved(family)
    device.plug_in()
    params = tw.SamplingParams(max_new_tokens=2, prompt_logprobs=1, ignore_eos=True)
    prompts = [list(p) for p in PROMPTS]
    whole = tw.load(folder).generate(prompts, params)
    device.networks = [
        (network, (Profile("prefill", SHORT), decode)) for network, (_, decode) in device.networks
    ]
    device.runs.clear()
    found = tw.load(folder).generate(prompts, params)
    assert {shape for _, shape in device.runs} >= {(1, 5), (1, 4)}
    for one, other in zip(found, whole, strict=True):
        assert one.token_ids == other.token_ids
        for ours, theirs in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert abs(ours.logprob - theirs.logprob) < 1e-4


def test_experts_are_left_to_torch(device: Device, saved) -> None:
    folder = saved("mixtral")
    device.plug_in()
    engine = tw.load(folder)
    report = engine.report()
    assert report["calls"]["tensorrt"] == 3, report["calls"]  # around the experts of two layers
    assert any("moe_experts" in note and "1 like it" in note for note in report["fallbacks"])
    assert NO_PLUGINS in report["fallbacks"]
    found = [c.token_ids for c in engine.generate([list(p) for p in PROMPTS], PARAMS)]
    assert found == hugging_face("mixtral")


def test_strict_refuses_what_is_left(device: Device) -> None:
    match = r"option strict with backend 'tensorrt'.*moe_experts.*no layer computes it"
    with pytest.raises(UnsupportedError, match=match):
        tw.compile(tiny_model("mixtral"), **OPTIONS, strict=True)
    # What TensorRT computes by parts is among what strict refuses.
    device.notes = ("attention is computed by parts",)
    graph = graph_of("llama", "float32")
    assert get_backend("tensorrt").lower(graph, TARGETS["l4"], ROOM).notes == device.notes


def test_a_wrong_network_is_found(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_VERIFY", "sample")
    monkeypatch.setitem(regions.CONVERTERS, "gated", lambda w, node: w.value(node.operands[0]))
    with pytest.raises(VerificationError, match="backend tensorrt"):
        tw.compile(tiny_model("llama"), **OPTIONS)


@pytest.mark.usefixtures("device")
def test_a_files_codes_become_numbers() -> None:
    """Those of GGUF have zero points or short groups, and TensorRT no layer for them."""
    common = {
        "dtype": "bfloat16",
        "max_model_len": None,
        "max_batch_size": None,
        "kv_cache": "auto",
    }
    options = resolve_options(
        target="l4", backend="tensorrt", verify="off", trust_remote_code=False, **common
    )
    assert not keeps_codes(options)


def test_plain_modules_are_left_to_torch(device: Device) -> None:
    module = torch.nn.Linear(4, 3)
    engine = tw.compile(module, (torch.zeros(2, 4),), backend="tensorrt", target="l4")
    assert set(engine.report()["calls"]) == {"eager"} and engine.report()["fallbacks"]


@pytest.mark.usefixtures("device")
def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedError, match="a GPU of sm_75, .*found a CPU. Name a GPU"):
        tw.compile(model, backend="tensorrt")
    with pytest.raises(UnsupportedError, match="targets among sm_75, sm_80.*found sm_90"):
        tw.compile(model, backend="tensorrt", target="h100")
    with pytest.raises(UnsupportedError, match="cache='paged' with backend 'tensorrt'"):
        tw.compile(model, backend="tensorrt", target="l4", kv_cache="paged")
    monkeypatch.setattr(flavor, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install tilewright\[tensorrt\]"):
        tw.compile(model, backend="tensorrt", target="l4")


def test_engines_that_do_not_open(device: Device, saved, monkeypatch) -> None:
    folder = saved("llama")
    device.plug_in()
    part = folder / "tensorrt" / "region_0.engine"
    whole = part.read_bytes()
    part.write_bytes(b"x")
    with pytest.raises(EngineError, match="region_0.engine: expected sha256"):
        tw.load(folder)
    part.write_bytes(whole)
    device.networks[0] = (device.networks[0][0], ())  # an engine without profiles
    with pytest.raises(UsageError, match=r"a step with input_ids of \[1, 1\]"):
        tw.load(folder).generate([list(PROMPTS[0])], PARAMS)
    monkeypatch.setattr(device.api, "Runtime", _Refusing)
    opened = "expected one that tensorrt_rtx 9.9 opens here .tensorrt_rtx 9.9 built it., found tag"
    with pytest.raises(EngineError, match=opened):
        tw.load(folder)
    monkeypatch.setattr(flavor, "find_spec", lambda name: None)
    missing = r"expected tensorrt_rtx 9.9, which built it, found none.*pip install"
    with pytest.raises(EngineError, match=missing):
        tw.load(folder)


class _Refusing:
    def __init__(self, logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> None:
        self.logger.log(1, "tag")


def test_another_engine_of_another_model(device: Device, saved) -> None:
    folder = saved("llama")
    device.plug_in()
    network, profiles = device.networks[0]
    device.networks[0] = (type(network)(network.inputs[1:], {}, (), network.outputs), profiles)
    with pytest.raises(EngineError, match="other inputs or outputs: input_ids"):
        tw.load(folder)
    assert json.loads((folder / "manifest.json").read_text())["backend"] == "tensorrt"
