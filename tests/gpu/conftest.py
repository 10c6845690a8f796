"""Tests that need a CUDA device; elsewhere they are not collected."""

from __future__ import annotations

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def left_idle(engine):
    """Each test leaves its module's engine as it was."""
    yield
    loop, pool = engine.loop, engine.pool
    assert not loop.scheduler.running and not loop.scheduler.waiting
    engine.reset_prefix_cache()
    assert pool.num_free == pool.num_pages - 1
