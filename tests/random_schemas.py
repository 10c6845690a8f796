"""Random JSON schemas, and whether a value has one: only what the generator can say."""

from __future__ import annotations

import random

Schema = dict[str, object]
_WORDS = ("id", "name", "the quick", "größe", 'a"b', "tags", "x", "fox", "over")


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """A schema whose values are finite in size, but for digits and whitespace."""
    leaves = [_string, _integer, _number, _enum, _const, _atom]
    make = rng.choice(leaves if depth == 0 else [*leaves, _array, _object, _object, _any_of])
    return make(rng, depth - 1)


def _string(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-200, 200)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-20, 20)
    return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 50)}


def _enum(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample([*_WORDS, 1, 2.5, None, True], rng.randint(1, 4))}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice([*_WORDS, 17, False])}


def _atom(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null"])}


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 2)
    sizes = {"minItems": low, "maxItems": low + rng.randint(0, 2)}
    return {"type": "array", "items": random_schema(rng, depth), **sizes}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_WORDS, rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [random_schema(rng, depth) for _ in range(rng.randint(1, 3))]}


def has_schema(value: object, schema: Schema) -> bool:
    """Whether a value has a schema that the generator made (JSON Schema 2020-12)."""
    if "enum" in schema:
        return any(_same(value, one) for one in schema["enum"])
    if "const" in schema:
        return _same(value, schema["const"])
    if "anyOf" in schema:
        return any(has_schema(value, one) for one in schema["anyOf"])
    return _TYPES[schema["type"]](value, schema)


def _same(value: object, wanted: object) -> bool:
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def _is_number(value: object, schema: Schema) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and schema["minimum"] <= value <= schema["maximum"]


def _is_integer(value: object, schema: Schema) -> bool:
    return _is_number(value, schema) and float(value).is_integer()


def _is_string(value: object, schema: Schema) -> bool:
    return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]


def _is_array(value: object, schema: Schema) -> bool:
    if not isinstance(value, list) or not schema["minItems"] <= len(value) <= schema["maxItems"]:
        return False
    return all(has_schema(one, schema["items"]) for one in value)


def _is_object(value: object, schema: Schema) -> bool:
    known = schema["properties"]
    if not isinstance(value, dict) or not set(schema["required"]) <= set(value) <= set(known):
        return False
    return all(has_schema(one, known[name]) for name, one in value.items())


_TYPES = {
    "string": _is_string,
    "integer": _is_integer,
    "number": _is_number,
    "array": _is_array,
    "object": _is_object,
    "boolean": lambda value, schema: isinstance(value, bool),
    "null": lambda value, schema: value is None,
}
