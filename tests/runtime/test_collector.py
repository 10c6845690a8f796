"""What there is when serving begins is not looked at by collections."""

from __future__ import annotations

import gc

import pytest

from tilewright.runtime.collector import freeze


@pytest.mark.quick
def test_what_there_is_is_not_collected_and_what_comes_is():
    class Node:
        alive = 0

        def __init__(self):
            self.own = self
            Node.alive += 1

        def __del__(self):
            Node.alive -= 1

    gc.freeze()  # what other tests have left, which takes seconds to look through
    before = Node()
    try:
        freeze()
        assert gc.get_freeze_count() > 1000
        del before
        Node()
        gc.collect()
        assert Node.alive == 1
    finally:
        gc.unfreeze()
    gc.collect()
    assert Node.alive == 0
    gc.freeze()  # as it was found
