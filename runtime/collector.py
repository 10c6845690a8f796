"""Python's garbage collector beside steps.

A collection of the oldest generation looks at every object that may be part of a cycle, and all
threads wait: with torch and transformers imported 360,000 objects, 270 ms, the time of some twenty
steps. It comes whenever a quarter as many new ones have lived on. What is there when an engine has
warmed up stays as long as it serves.
"""

from __future__ import annotations

import gc


def freeze() -> None:
    """Takes all objects that there are out of later collections, in this process: to be called by
    who serves an engine, once it has warmed up. An engine that is given up after that keeps its
    memory until `gc.unfreeze()`.
    """
    gc.collect()
    gc.freeze()
