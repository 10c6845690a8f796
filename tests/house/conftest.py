"""Trees of our sources, for as long as the tests of the house run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from house.tree import nodes_of


@pytest.fixture(scope="package", autouse=True)
def _parsed_once() -> Iterator[None]:
    yield
    nodes_of.cache_clear()  # a million objects, through which Python would look for garbage
