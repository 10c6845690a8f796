"""Free pages against a heap of them."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.runtime import pages as module
from tilewright.runtime.pages import Pages


@pytest.mark.quick
@given(
    first=st.integers(0, 2),
    count=st.integers(3, 40),
    window=st.sampled_from([1, 2, 5, 256]),
    does=st.lists(st.integers(-9, 3), max_size=60),
)
def test_the_lowest_free_page_goes_first(first, count, window, does):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WINDOW", window)
        pages, free, held = Pages(first, count), [*range(first, count)], []
        heapify(free)
        for one in does:
            if one > 0 and len(free) >= one:
                taken = pages.take_each(one) if one > 1 else [pages.take()]
                assert taken == [heappop(free) for _ in range(one)]
                held += taken
            elif one <= 0 and held:
                page = held.pop(one % len(held))
                pages.drop(page)
                heappush(free, page)
            assert pages.num_free == len(free)
            assert [pages.references[page] for page in held] == [1] * len(held)


def test_a_page_that_is_not_there_is_refused():
    pages = Pages(1, 3)
    assert pages.take_each(2) == [1, 2]
    with pytest.raises(AssertionError, match="no page is free"):
        pages.take()
