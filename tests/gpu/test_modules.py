"""Random plain modules on a GPU, against themselves in torch (tests/e2e/test_fuzz_modules.py)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2e.test_fuzz_modules import check

pytestmark = pytest.mark.gpu


@given(seed=st.integers(0, 10**9), depth=st.integers(1, 6), dynamic=st.booleans())
@settings(max_examples=25)
def test_random_modules(seed: int, depth: int, dynamic: bool) -> None:
    check(seed, depth, "triton", dynamic)
