"""The decode graph that an engine really has: read, computed and compiled whole."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING

import torch

from persistent_forms import GREEDY, step_inputs
from tilewright.codegen.base import get_backend
from tilewright.codegen.persistent.lowering import with_one_launch
from tilewright.codegen.persistent.reading import Attention, Begin, Product, read_decode
from tilewright.codegen.program import Program
from tilewright.compiler.graphs import pass_graphs
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.lowering import lower
from tilewright.ir.graph import Graph, param_name
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import Target
from tiny_models import greedy, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGE = 4


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
    prompt, new = [136, 114], 4  # whose best logits are at least 0.34 apart
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
