"""Programs on a GPU, where steps are launched ahead: what they say is what the CPU says."""

from __future__ import annotations

import pytest

import tilewright as tw
from tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.gpu
TEXT = "the quick brown fox jumps over the lazy dog and runs away from the other foxes. " * 2


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> tuple[tw.Engine, tw.Engine]:
    """The same model on the GPU and on the CPU."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    ours = tw.compile(path, backend="triton", max_batch_size=16)
    return ours, tw.compile(path, backend="eager", target="cpu", max_batch_size=16)


@tw.program
def talk(s):
    s += tw.system(TEXT)
    branches = s.fork(4)
    for index, b in enumerate(branches):
        b += tw.user(f"{index} dogs")
        b += tw.assistant(tw.gen("text", max_new_tokens=12), tw.gen("more", regex="[a-z]{4}"))
        b += tw.user("best")
        b += tw.assistant("the", tw.select("best", [" fox", " lazy dog", " other"]))
    s.join(branches)


def test_a_program_says_what_it_says_on_the_cpu(engines) -> None:
    ours, theirs = (talk.run(one) for one in engines)
    assert ours.variables == theirs.variables
    pairs = zip(ours.outcomes["best"], theirs.outcomes["best"], strict=True)
    for one, other in pairs:
        assert one.scores == pytest.approx(other.scores, abs=1e-3)
    shared = len(engines[0].tokenizer.encode(TEXT)) // 16 * 16
    assert all(one.usage.cached_tokens >= shared for one in ours.outcomes["text"])


def test_what_is_given_up_frees_its_pages_with_steps_in_flight(engines) -> None:
    @tw.program
    def endless(s):
        s += tw.user(TEXT)
        for branch in s.fork(4):
            branch += tw.assistant(tw.gen("long", max_new_tokens=150, ignore_eos=True))

    stream = endless.stream(engines[0])
    for _ in stream:
        break
    stream.close()
    loop, pool = engines[0].loop, engines[0].pool
    assert not loop.scheduler.running and not loop.scheduler.waiting
    engines[0].reset_prefix_cache()
    assert pool.num_free == pool.num_pages - 1
    assert talk.run(engines[0]).variables == talk.run(engines[1]).variables
