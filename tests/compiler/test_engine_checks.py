"""`verify` checks both Programs of a causal LM: what each computes, and the texts of its graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tilewright as tw
from tilewright.codegen.base import get_backend
from tilewright.compiler.engine_checks import _check_tokens, verify_image
from tilewright.compiler.inspect.facts import graph_texts
from tilewright.errors import VerificationError
from tilewright.ir.parser import parse_graph
from tilewright.passes.one_token import one_token_pass
from tilewright.passes.sample_tokens import SAMPLE_TOKENS
from tilewright.runtime.image import DecodePart
from tilewright.targets import Target
from tiny_gguf import tiny_hf_model


@pytest.fixture(scope="module")
def image():
    """Of torch's ops, for speed, and with a decode Program of the same."""
    options = {"target": "cpu", "max_model_len": 32, "max_batch_size": 2, "verify": "off"}
    general = tw.compile(tiny_hf_model("llama"), backend="eager", **options).image
    # Bodies of fused groups are over the tokens of any step.
    graphs = [next(pair for pair in general.graphs[::-1] if pair[0] != "fuse")]
    for step in (one_token_pass(general.lm.page_size), SAMPLE_TOKENS):
        graphs.append((step.name, str(step.run(parse_graph(graphs[-1][1])))))
    lowered = get_backend("eager").lower(parse_graph(graphs[-1][1]), Target.parse("cpu"))
    return replace(general, decode=DecodePart(lowered.program, tuple(graphs)))


def test_each_program_is_checked(image):
    checks = {check.name: check.found for check in verify_image(image)}
    assert list(checks) == [
        "graphs",
        "program, prefill",
        "program, decode",
        "decode program, one sequence",
        "decode program, 8 sequences",
    ]
    assert checks["graphs"].startswith(f"{len(graph_texts(image))} texts")
    assert len(graph_texts(image)) > len(image.graphs)


def test_without_a_decode_program_there_is_nothing_more_to_check(image):
    names = [check.name for check in verify_image(replace(image, decode=None))]
    assert names == ["graphs", "program, prefill", "program, decode"]


def test_a_decode_program_that_computes_something_else_is_found(image):
    def swapped(program):
        """The weights of the second layer for those of the first."""
        names = {
            buffer: name.replace("layers.0.", "layers.1.")
            for buffer, name in program.weights.items()
        }
        return replace(program, weights=names)

    spoiled = replace(image.decode, program=swapped(image.decode.program))
    with pytest.raises(VerificationError, match="decode program, one sequence"):
        list(verify_image(replace(image, decode=spoiled)))


def test_a_text_of_the_decode_graph_that_is_not_well_formed_is_named(image):
    *others, (name, text) = image.decode.graphs
    broken = replace(image.decode, graphs=(*others, (name, text.replace("f32[B", "f32[C", 1))))
    number = len(graph_texts(image)) - 1
    with pytest.raises(VerificationError, match=f"graph {number:03d}-{name}"):
        list(verify_image(replace(image, decode=broken)))


@pytest.mark.quick
def test_tokens_are_likeliest_by_their_own_logits():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, -1.0]])
    for tokens in ([1, 0], [1, 1]):  # of two alike either will do
        _check_tokens("program", logits, torch.tensor(tokens))
    for tokens in ([2, 0], [1, 2], [1, -1], [3, 0]):
        with pytest.raises(VerificationError, match="likeliest tokens"):
            _check_tokens("program", logits, torch.tensor(tokens))
