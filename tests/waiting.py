"""To wait for what other threads do."""

from __future__ import annotations

import threading
from collections.abc import Callable


def wait_until(condition: Callable[[], object]) -> None:
    """Until it holds; a thread of its own looks, so that nothing here sleeps."""
    done = threading.Event()

    def look() -> None:
        while not condition():
            threading.Event().wait(0.01)
        done.set()

    threading.Thread(target=look, daemon=True).start()
    assert done.wait(30)
