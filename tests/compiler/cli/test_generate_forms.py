"""`generate` with a form for the output, with beams, and with logprobs of the prompt."""

from __future__ import annotations

import json
import re

import pytest
import torch

import tilewright as tw
from cli_running import refused, run
from tiny_gguf import tiny_hf_model

PROMPT = ("the quick", "--no-chat")
SCHEMA = {"anyOf": [{"type": "boolean"}, {"enum": ["a fox", 7]}]}


def data(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("forms") / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def test_a_schema_a_regex_a_grammar_and_choices(engine, schema, tmp_path):
    grammar = tmp_path / "grammar.lark"
    grammar.write_text('start: "over " ("fox" | "dog") "."')
    sampled = ("--temperature", 1, "--seed", 3)
    found = data(run("generate", engine, *PROMPT, "--json-schema", schema, "--json", *sampled))
    assert json.loads(found["completions"][0]["text"]) in (True, False, "a fox", 7)
    text = run("generate", engine, *PROMPT, "--regex", "[0-3]{2}:[0-5]0", *sampled).stdout
    assert re.fullmatch("[0-3]{2}:[0-5]0\n", text)
    text = run("generate", engine, *PROMPT, "--grammar", grammar).stdout
    assert text in ("over fox.\n", "over dog.\n")
    text = run("generate", engine, *PROMPT, "--choice", "lazy", "--choice", "brown").stdout
    assert text in ("lazy\n", "brown\n")


def test_beams_are_the_librarys(engine):
    loaded = tw.load(engine)
    ids = loaded.tokenizer.encode(PROMPT[0])
    (expected,) = loaded.beam_search([ids], beam_width=3, max_new_tokens=5, length_penalty=0.5)
    options = ("--beams", 3, "--max-new-tokens", 5, "--length-penalty", 0.5)
    found = data(run("generate", engine, *PROMPT, *options, "--json"))["completions"]
    assert [one["token_ids"] for one in found] == [one.token_ids for one in expected]
    assert [one["score"] for one in found] == [one.score for one in expected]
    scores = [one.score for one in expected]
    assert scores == sorted(scores, reverse=True)
    assert run("generate", engine, *PROMPT, *options).stdout.count(" of 3 (") == 3


def test_logprobs_of_the_prompt(engine):
    options = ("--prompt-logprobs", 2, "--max-new-tokens", 1, "--json")
    found = data(run("generate", engine, *PROMPT, *options))
    logprobs = found["completions"][0]["prompt_logprobs"]
    assert logprobs[0] is None
    assert [one["token_id"] for one in logprobs[1:]] == found["prompt_token_ids"][1:]
    assert all(len(one["top"]) == 2 for one in logprobs[1:])


def test_beams_and_prompt_logprobs_of_an_engine_are_hugging_faces(engine):
    loaded, model = tw.load(engine), tiny_hf_model()
    ids = loaded.tokenizer.encode("the quick brown fox jumps over")
    tokens = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=8,
            eos_token_id=list(loaded.config.eos_token_ids),
            return_dict_in_generate=True,
            output_scores=True,
        )
        exact = model(tokens).logits[0].double().log_softmax(-1)
    (found,) = loaded.beam_search([ids], beam_width=3, max_new_tokens=8)
    assert [ids + one.token_ids for one in found] == out.sequences.tolist()
    scores = out.sequences_scores.tolist()
    assert [one.score for one in found] == pytest.approx(scores, abs=1e-4)
    params = tw.SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    logprobs = loaded.generate([ids], params)[0].prompt_logprobs[1:]
    expected = [float(row[token]) for row, token in zip(exact, ids[1:], strict=False)]
    assert [one.logprob for one in logprobs] == pytest.approx(expected, abs=1e-4)


def test_what_does_not_go_is_refused(engine, schema, tmp_path):
    generate = ("generate", engine, *PROMPT)
    refused(run(*generate, "--json-schema", tmp_path / "no.json"), "--json-schema", "no.json")
    refused(run(*generate, "--regex", "a", "--json-schema", schema), "exactly one of", "json and")
    refused(run(*generate, "--regex", "(a"), "StructuredOutputsParams.regex", "unclosed group")
    (tmp_path / "bad.json").write_text("{")
    refused(run(*generate, "--json-schema", tmp_path / "bad.json"), "a JSON schema")
    refused(run(*generate, "--beams", 2, "--temperature", 1), "--beams", "--temperature")
    refused(run(*generate, "--beams", 2, "--regex", "a"), "--structured-outputs")
    refused(run(*generate, "--beams", 99), "BeamSearchParams.beam_width")
    refused(run(*generate, "--beams", 0), "BeamSearchParams.beam_width")
