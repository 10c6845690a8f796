"""How large a JSON schema of a client may be, for it to be compiled in a second or so."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UsageError

# llguidance reads 128 levels, and follows 2000 items at once, of which an optional property is
# four. What it takes to compile grows with the square of the properties: 5000 were 10 seconds.
_MOST_LEVELS = 120
_MOST_PROPERTIES = 1000  # of one object; more than 500 have to be required
_MOST_SIZE = 1 << 17


def check_schema(schema: Mapping[str, object]) -> None:
    """Refuses a schema that is too deep or too large. JSON data of any depth may be passed.

    Raises:
        UsageError: it is.
    """
    size, left = 0, [(schema, 1, "")]
    while left:
        one, level, name = left.pop()
        size += len(one) + 1 if isinstance(one, str | dict | list) else 1
        if level > _MOST_LEVELS:
            raise _too_large(f"at most {_MOST_LEVELS} levels", "more")
        if size > _MOST_SIZE:
            raise _too_large(f"at most {_MOST_SIZE} characters and items", "more")
        if isinstance(one, dict):
            if name == "properties" and len(one) > _MOST_PROPERTIES:
                raise _too_large(f"at most {_MOST_PROPERTIES} properties", f"{len(one)}")
            size += sum(map(len, one))
            left += [(value, level + 1, key) for key, value in one.items()]
        elif isinstance(one, list):
            left += [(value, level + 1, "") for value in one]


def _too_large(expected: str, found: str) -> UsageError:
    return UsageError(
        "the JSON schema", expected=expected, found=found, remedy="Ask for less at once."
    )
