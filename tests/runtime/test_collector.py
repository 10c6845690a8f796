"""What there is when serving begins is not looked at by collections."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tilewright.runtime import collector

# By itself: of the objects of a whole suite each collection takes a second.
ALONE = """
import gc, runpy, sys
freeze = runpy.run_path(sys.argv[1])["freeze"]

class Node:
    alive = 0
    def __init__(self):
        self.own = self
        Node.alive += 1
    def __del__(self):
        Node.alive -= 1

before = Node()
freeze()
assert gc.get_freeze_count() > 1000
del before
Node()
gc.collect()
assert Node.alive == 1, Node.alive
gc.unfreeze()
gc.collect()
assert Node.alive == 0, Node.alive
print("all as promised")
"""


@pytest.mark.quick
def test_what_there_is_is_not_collected_and_what_comes_is():
    command = [sys.executable, "-c", ALONE, collector.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "all as promised\n", done.stderr
