"""Random JSON schemas: what a model writes under them parses, and has the schema."""

from __future__ import annotations

import json
import os
import random

import pytest

from random_schemas import has_schema, random_schema
from tilewright.runtime import SamplingParams, StructuredOutputsParams
from writing_model import writing_loop

SCHEMAS = int(os.environ.get("TILEWRIGHT_TEST_SCHEMAS", "40"))


def test_what_is_written_has_its_schema():
    rng = random.Random(9)
    schemas = [random_schema(rng) for _ in range(SCHEMAS)]
    params = [
        SamplingParams(
            structured_outputs=StructuredOutputsParams(json=schema),
            temperature=rng.choice([0.0, 1.0]),
            seed=index,
            max_new_tokens=400,
        )
        for index, schema in enumerate(schemas)
    ]
    loop = writing_loop(max_num_seqs=8)
    completions = loop.generate([[5, 6, 7]] * SCHEMAS, params)
    for schema, (one,) in zip(schemas, completions, strict=True):
        assert one.finish_reason == "stop", (schema, one.text)
        assert has_schema(json.loads(one.text), schema), (schema, one.text)


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ("abc", {"type": "string", "minLength": 0, "maxLength": 2}),
        (True, {"type": "integer", "minimum": 0, "maximum": 2}),
        (1.5, {"type": "integer", "minimum": 0, "maximum": 2}),
        (3, {"type": "number", "minimum": 0, "maximum": 2}),
        (1, {"enum": [True, "1"]}),
        ({"a": None}, {"type": "object", "properties": {}, "required": []}),
        ({}, {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}),
        ([None], {"type": "array", "items": {"type": "boolean"}, "minItems": 0, "maxItems": 1}),
        (None, {"anyOf": [{"const": 0}, {"type": "boolean"}]}),
    ],
)
def test_the_judge_refuses(value, schema):
    assert not has_schema(value, schema)
