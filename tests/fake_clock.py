"""A clock that moves when it is told to, and a model whose steps take as long as one says."""

from __future__ import annotations

from fake_executor import PAGED, VOCAB, FakeExecutor
from tilewright.runtime import GenerationLoop, PagedPool, Sampler, Scheduler


class FakeClock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, until: float) -> None:
        """Moves on; to wait for what is over is an error."""
        assert until > self.now, "a wait that is none"
        self.now = until


class TimedExecutor(FakeExecutor):
    """Each step takes `seconds(tokens)` of the clock."""

    def __init__(self, clock, seconds=lambda tokens: 1.0, capabilities=PAGED, fail_at=None):
        super().__init__(capabilities, fail_at)
        self.clock, self.seconds = clock, seconds

    def run(self, step):
        logits = super().run(step)
        self.clock.now += self.seconds(len(step.token_ids))
        return logits


def timed_loop(
    seconds=lambda tokens: 1.0, num_pages=200, page_size=4, *, caching=False, fail_at=None, **knobs
):
    """A loop over the fake model, whose clock is `loop.clock`."""
    clock = FakeClock()
    executor = TimedExecutor(clock, seconds, fail_at=fail_at)
    pool = PagedPool(num_pages, page_size, prefix_caching=caching, clock=clock)
    scheduler = Scheduler(pool, executor.capabilities, clock=clock, **knobs)
    return GenerationLoop(executor, pool, scheduler, Sampler(), None, [], 48, vocab_size=VOCAB)
