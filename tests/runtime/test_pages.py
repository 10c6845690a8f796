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


class Model:
    """Pages by plain counts: who holds them, and which the prefix cache has."""

    def __init__(self, count):
        self.held, self.cached = [0] * count, [False] * count

    def agrees(self, pages):
        assert [*pages.references] == [h + c for h, c in zip(self.held, self.cached, strict=True)]
        idle = [
            page for page in range(1, len(self.held)) if self.cached[page] and not self.held[page]
        ]
        assert pages.num_idle == len(idle) and all(map(pages.is_idle, idle))
        free = (
            len(self.held)
            - 1
            - sum(h > 0 or c for h, c in zip(self.held, self.cached, strict=True))
        )
        assert pages.num_free == free
        return idle


@given(data=st.data())
def test_many_pages_at_once_are_each_by_itself(data):
    pages, model = Pages(1, 25), Model(25)
    for _ in range(data.draw(st.integers(5, 25))):
        mine = [page for page, count in enumerate(model.held) if count]
        idle = model.agrees(pages)
        rule = data.draw(st.sampled_from(["take", "hold", "cache", "drop", "drop", "uncache"]))
        some = data.draw(st.lists(st.sampled_from(mine), unique=True)) if mine else []
        if rule == "take":
            for page in pages.take_each(data.draw(st.integers(0, pages.num_free))):
                model.held[page] = 1
        elif rule == "hold":
            for page in some:
                pages.hold(page)
                model.held[page] += 1
        elif rule == "cache":
            new = [page for page in some if not model.cached[page]]
            pages.cache_each(new)
            for page in new:
                model.cached[page] = True
        elif rule == "drop":
            pages.drop_each(some)
            for page in some:
                model.held[page] -= 1
        else:
            gone = data.draw(st.lists(st.sampled_from(idle), unique=True)) if idle else []
            pages.uncache_idle(gone)
            for page in gone:
                model.cached[page] = False
    model.agrees(pages)
    left = pages.num_free
    free = [page for page in range(1, 25) if not (model.held[page] or model.cached[page])]
    assert pages.take_each(left) == free


def test_a_page_that_is_not_there_is_refused():
    pages = Pages(1, 3)
    assert pages.take_each(2) == [1, 2]
    with pytest.raises(AssertionError, match="no page is free"):
        pages.take()
