"""The graphs of a model: when there is a decode graph, and what an engine keeps of it."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

import tilewright as tw
from canned_binaries import canned_binaries
from handed_forms import alone
from tilewright.codegen.base import CHOICES
from tilewright.codegen.triton.hand_on import hands_on
from tilewright.codegen.triton.invocation import plan_call
from tilewright.codegen.triton.package import read_package
from tilewright.errors import UnsupportedError, UsageError
from tilewright.ir.parser import parse_graph
from tilewright.ir.verifier import verify
from tiny_models import tiny_model


def compiled(**options: object) -> tw.Engine:
    with canned_binaries():
        return tw.compile(tiny_model("llama"), target="h100", verify="off", **options)


shared = cache(compiled)  # for tests that only read


@cache
def apart() -> tw.Engine:
    """Compiled so that no norm is handed on."""
    with alone():
        return compiled()


def test_a_causal_lm_on_triton_has_a_decode_program(tmp_path) -> None:
    engine = shared()
    decode = engine.image.decode
    assert decode is not None
    inputs = set(decode.program.inputs)
    assert not inputs & {"query_start", "logits_indices"}
    assert {"temperature", "top_k", "top_p", "min_p", "uniform"} <= inputs
    assert dict(decode.program.outputs)["tokens"]
    names = [name for name, _ in decode.graphs]
    passes = ["one_token", "share_pages", "fuse_linears", "open_rows", "fuse", "sample_tokens"]
    assert names[1:] == passes
    seen = engine.image.decoding
    assert seen.program is decode.program and seen.graphs is decode.graphs
    engine.save(tmp_path / "engine")
    loaded = tw.runtime.folder.load_image(tmp_path / "engine")
    assert loaded.decode == decode


def test_a_decode_layer_is_seven_launches_at_most() -> None:
    """Of which six are calls: attention over many keys is followed by its merge."""
    made = [call for call in compiled_layers() if call.runs_at({})]
    calls = [call.kernel.split("/")[2].rsplit("-", 1)[0] for call in made]
    assert len(calls) == 6
    stems = [name.rpartition("_")[0] if name[-5] == "_" else name for name in calls]
    assert stems == [
        "rms_norm_linear",
        "rope_append_kv",
        "paged_decode",
        "linear_add",
        "rms_norm_linear_gated",
        "linear_add",
    ]


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_a_decode_step_has_a_launch_fewer_for_each_norm_that_is_handed_on(tokens: int) -> None:
    ours = decode_launches(shared(), tokens)
    theirs = decode_launches(apart(), tokens)
    assert len(theirs) - len(ours) == (4 if tokens > 1 else 0)
    normalise = [name for name in ours if name.endswith("_normalise")]
    assert len(normalise) == (1 if tokens > 1 else 0)  # of the embedding, whose kernel is another


def test_norms_whose_steps_round_are_handed_on_too() -> None:
    decode = compiled(dtype="bfloat16").image.decode
    assert decode is not None and sum(map(hands_on, decode.program.calls)) == 4


def decode_launches(engine: tw.Engine, tokens: int) -> list[str]:
    """The functions that a step of so many sequences launches."""
    image = engine.image
    program, names = image.decode.program, []
    for call in program.at({}).calls:
        source = read_package(image.files.__getitem__, call.kernel.rsplit("/", 1)[1]).source
        results = [program.buffers[name] for name in call.results]
        plan = plan_call(source, results, {"B": tokens, "M": 1, "N": tokens})
        names += [launch.function for launch, _, _ in plan.launches]
    return names


def compiled_layers() -> list:
    """The calls of the second layer of two."""
    calls = shared().image.decode.program.calls
    starts = [i for i, call in enumerate(calls) if "append_kv" in call.kernel]
    first, second = starts[:2]
    return list(calls[second - 1 : second - 1 + (second - first)])


@pytest.mark.parametrize(
    "options",
    [{"backend": "eager"}, {"deterministic": True}, {"kv_cache": None}],
)
def test_others_have_none(options: dict[str, object]) -> None:
    assert shared(**options).image.decode is None


def test_a_pass_limit_reaches_into_the_decode_passes(monkeypatch) -> None:
    whole = len(shared().image.graphs) - 1
    monkeypatch.setenv("TILEWRIGHT_PASS_LIMIT", str(whole))
    assert compiled().image.decode is None
    monkeypatch.setenv("TILEWRIGHT_PASS_LIMIT", str(whole + 1))
    decode = compiled().image.decode
    assert decode is not None and [name for name, _ in decode.graphs][1:] == ["one_token"]


def test_a_deterministic_engine_computes_no_sum_in_a_library() -> None:
    engine = shared(deterministic=True)
    kinds = {call.kind for call in engine.image.program.calls}
    assert kinds == {"generated", "template"}
    assert CHOICES not in engine.image.files  # nor is any cut looked up
    verify(parse_graph(engine.image.graphs[-1][1]).with_weights(engine.image.weights))


def test_what_cannot_be_deterministic_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="deterministic=True with backend 'eager'"):
        compiled(deterministic=True, backend="eager")
    conv, image = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with pytest.raises(UnsupportedError, match="deterministic=True with conv"):
        tw.compile(conv, (image,), target="h100", verify="off", deterministic=True)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, "much", True, float("nan")])
def test_a_share_of_memory_is_above_0_and_at_most_1(fraction: object) -> None:
    with pytest.raises(UsageError, match="memory_fraction"):
        compiled(memory_fraction=fraction)


def test_the_share_of_memory_is_kept(tmp_path) -> None:
    compiled(memory_fraction=0.5).save(tmp_path / "engine")
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert manifest["lm"]["memory_fraction"] == 0.5
    assert tw.runtime.folder.load_image(tmp_path / "engine").lm.memory_fraction == 0.5
