"""The decode graph that an engine really has: read, computed and compiled whole."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

import tilewright as tw
from persistent_forms import GREEDY, Model, step_inputs
from tilewright.codegen.base import get_backend
from tilewright.codegen.persistent.beside import (
    launches_of,
    multiprocessors,
    without_launches,
)
from tilewright.codegen.persistent.loading import PersistentKernel
from tilewright.codegen.persistent.lowering import with_one_launch
from tilewright.codegen.persistent.reading import Attention, Begin, Product, read_decode
from tilewright.codegen.persistent.tiling import Tiling
from tilewright.codegen.program import Program
from tilewright.codegen.triton.package import read_package
from tilewright.compiler import engine_checks
from tilewright.compiler.engine_checks import verify_image
from tilewright.compiler.graphs import pass_graphs
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.inspect.facts import Setting
from tilewright.compiler.inspect.kernels import kernel_report
from tilewright.compiler.lowering import lower
from tilewright.errors import (
    EngineError,
    KernelError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from tilewright.ir.graph import Graph, param_name
from tilewright.runtime.folder import load_image
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import Target
from tiny_models import greedy, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGE = 4
MODEL = Model(layers=1)
GRAPH = MODEL.graph()


@cache
def decode_graph(family: str) -> tuple[PreTrainedModel, Graph]:
    """A tiny model in bfloat16, and the decode graph that an engine on Triton has of it."""
    model = tiny_model(family).bfloat16()
    graph = lower(capture_causal_lm(model), family)
    passed = pass_graphs(graph, "paged", get_backend("triton"), "off", None, PAGE)
    assert passed.decode is not None
    return model, passed.decode


def test_all_calls_of_a_llama_are_read() -> None:
    shape = read_decode(decode_graph("llama")[1])
    kinds = [type(shape.form(step)) for step in shape.calls]
    layer = [Product, Attention, Product, Product, Product]
    assert kinds == [Begin, *layer, *layer, Product]
    assert shape.form(shape.calls[-1]) == Product(160, 64, True, 1e-6, chosen=True)
    assert (shape.width, shape.head_dim) == (64, 16)


def test_a_program_decodes_one_sequence_in_one_launch_as_hugging_face_does() -> None:
    model, graph = decode_graph("llama")
    cpu = Target.parse("cpu")
    kernels = get_backend("triton").lower(graph, cpu)
    lowered = with_one_launch(kernels, graph, cpu)
    program = Program.from_json(json.loads(json.dumps(lowered.program.to_json())))
    assert program == lowered.program
    made = [call.kernel.split("/")[1] for call in program.at({"B": 1}).calls]
    assert made == ["persistent", "template"]  # the other one samples
    assert program.at({"B": 2}).calls == kernels.program.at({"B": 2}).calls
    weights = {param_name(node): graph.weights[param_name(node)].load() for node in graph.params}
    runner = ProgramRunner(program, weights, lowered.files.__getitem__)
    prompt, new = [136, 114], 3  # whose best logits are at least 0.34 apart
    types = {name: type_ for name, type_ in program.buffers.items() if name in program.inputs}
    caches = {
        name: torch.zeros(4, *type_.shape[1:], dtype=torch.bfloat16)
        for name, type_ in types.items()
        if "cache" in name
    }
    tokens = list(prompt)
    for position in range(len(prompt) + new - 1):
        inputs = step_inputs([2, 1, 3], position + 1, tokens[position], PAGE)
        found = runner.run({**inputs, **GREEDY, **caches})
        if position + 1 == len(tokens):
            tokens.append(int(found["tokens"]))
    assert tokens[len(prompt) :] == greedy(model, prompt, new)


@pytest.mark.parametrize("batches", [(1,), (2,), (1, 2, 4, 8)])
def test_launches_can_be_taken_out_again(batches: tuple[int, ...]) -> None:
    _, graph = decode_graph("llama")
    kernels = get_backend("triton").lower(graph, Target.parse("cpu"))
    lowered = with_one_launch(kernels, graph, Target.parse("cpu"), batches)
    assert len(launches_of(lowered.program)) == len(batches)
    assert multiprocessors(lowered.program) == 1 and multiprocessors(kernels.program) == 0
    assert without_launches(lowered.program) == kernels.program


def test_a_call_behind_the_logits_that_needs_more_is_refused() -> None:
    _, graph = decode_graph("llama")
    cpu = Target.parse("cpu")
    kernels = get_backend("triton").lower(graph, cpu)
    *calls, last = kernels.program.calls
    other = calls[-2].results[0]
    taking = replace(last, operands=(*last.operands, other))
    program = replace(kernels.program, calls=(*calls, taking))
    with pytest.raises(UnsupportedError, match=f"behind the logits.*operands {other}"):
        with_one_launch(replace(kernels, program=program), graph, cpu)
    inputs = tuple(name for name in kernels.program.inputs if name != "positions")
    program = replace(kernels.program, inputs=inputs)
    with pytest.raises(UnsupportedError, match="a Program with inputs"):
        with_one_launch(replace(kernels, program=program), graph, cpu)


def test_a_device_of_fewer_multiprocessors_is_refused(monkeypatch) -> None:
    properties = SimpleNamespace(multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    graph = GRAPH
    kernels = get_backend("triton").lower(graph, Target.parse("cpu"))
    tiling = Tiling(rows=2, num_warps=1, ahead=1, splits=4, block_n=16)
    lowered = with_one_launch(kernels, graph, Target.parse("h100"), cut=tiling)
    (call,) = launches_of(lowered.program)
    read, gpu = lowered.files.__getitem__, torch.device("cuda")
    with pytest.raises(EngineError, match="132 multiprocessors.*found 100"):
        get_backend("triton").load(call, lowered.program, MODEL.tensors(1, 4), read, gpu)


@pytest.fixture
def compiled():
    """Compiles the tiny model."""
    model, _ = decode_graph("llama")
    return lambda **options: tw.compile(model, target="cpu", verify="off", tune="none", **options)


def test_an_engine_has_it_where_it_is_asked_for(compiled, tmp_path) -> None:
    engine = compiled(backend="triton", decode="persistent:2", max_batch_size=4)
    calls = engine.image.decode.program.calls
    one, *more = (call for call in calls if "/persistent/" in call.kernel)
    assert [str(call.guard) for call in more] == ["(-1*B + 2, B - 2)"]
    for number in (1, 2, 3):
        made = [call.kind for call in engine.image.decode.program.at({"B": number}).calls]
        assert ("persistent" in made) == (number < 3) == (len(made) == 2)
    assert one.kind == "persistent" and str(one.guard) == "(-1*B + 1,)"
    engine.save(tmp_path / "engine")
    assert load_image(tmp_path / "engine").decode == engine.image.decode
    settings = [Setting("decode", 1, 64)]
    report = kernel_report(engine.image, settings)
    assert [kernel.kind for kernel in report.kernels].count("persistent") == 2
    without = kernel_report(compiled(backend="triton").image, settings)
    assert report.whole["decode"].flops == without.whole["decode"].flops


def test_verify_runs_it_on_its_device_and_separate_kernels_by_themselves(compiled, monkeypatch):
    image = compiled(backend="triton", decode="persistent:2", max_batch_size=4).image
    checks = {check.name: check.found for check in verify_image(image)}
    assert [*checks][-2:] == ["one launch, batch 1", "one launch, batch 2"]
    assert "decode program, one sequence" in checks
    monkeypatch.setattr(engine_checks, "runs_here", lambda target: target.is_cpu)
    elsewhere = {check.name: check.found for check in verify_image(replace(image, target="h100"))}
    assert elsewhere["one launch"] == "not run: that takes a sm_90 device"
    assert [*elsewhere][:-1] == [*checks][:-2]
    run = PersistentKernel.__call__

    def half(self, operands, sizes):
        logits, *caches = run(self, operands, sizes)
        return (logits / 2, *caches)

    monkeypatch.setattr(PersistentKernel, "__call__", half)
    with pytest.raises(VerificationError, match="one launch, batch 1"):
        list(verify_image(image))
    told = KernelError("call 3 of 11", expected="what it reads", found="nothing", remedy="None.")
    monkeypatch.setattr(PersistentKernel, "recover", lambda self: told)
    with pytest.raises(KernelError, match="call 3 of 11"):  # rather than that numbers are wrong
        list(verify_image(image))


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"decode": "graph"}, UsageError, "option decode.*kernels, persistent"),
        ({"decode": "persistent", "backend": "eager"}, UnsupportedError, "decode graph.*eager"),
        (
            {"decode": "persistent", "backend": "triton", "quantize": "int8-weight"},
            UnsupportedError,
            "one launch for all layers: .*dequantize|quant",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(compiled, options, error, named) -> None:
    with pytest.raises(error, match=named):
        compiled(**options)


def test_a_launch_of_other_buffers_weights_or_text_is_not_loaded() -> None:
    graph = GRAPH
    cpu = Target.parse("cpu")
    lowered = with_one_launch(get_backend("triton").lower(graph, cpu), graph, cpu)
    program, read = lowered.program, lowered.files.__getitem__
    (call,) = (call for call in program.calls if "/persistent/" in call.kernel)
    tensors = MODEL.tensors(1, 4)
    backend, here = get_backend("triton"), torch.device("cpu")
    backend.load(call, program, tensors, read, here)
    for wrong in (
        {"attrs": {**call.attrs, "rows": 4}},
        {"attrs": {**call.attrs, "rows": "8"}},
        {"attrs": {**call.attrs, "graph": "def"}},
        {"operands": ("positions", *call.operands[1:])},
    ):
        with pytest.raises(EngineError, match="one launch as this version makes it"):
            backend.load(replace(call, **wrong), program, tensors, read, here)
    short = {**tensors, "o_0": tensors["o_0"][:-1]}
    with pytest.raises(EngineError, match="weight o_0"):
        backend.load(call, program, short, read, here)


def test_the_launch_of_an_engine_compiles_for_a_gpu_without_spilling() -> None:
    _, graph = decode_graph("llama")
    tiling = Tiling(rows=2, num_warps=1, ahead=1, splits=4, block_n=16)
    kernels = get_backend("triton").lower(graph, Target.parse("cpu"))
    lowered = with_one_launch(kernels, graph, Target.parse("h100"), cut=tiling)
    (call,) = (call for call in lowered.program.calls if "/persistent/" in call.kernel)
    package = read_package(lowered.files.__getitem__, call.kernel.rpartition("/")[2])
    (binary,) = package.binaries.values()
    assert binary.cooperative
    assert binary.resources.spills == 0
