"""Tuning records for tests: one to start from, and strategies for any."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from tilewright.autotune.config import Config
from tilewright.autotune.key import Conditions, Key
from tilewright.autotune.record import Record

KEY = Key(
    template="linear",
    template_hash="a" * 64,
    space_hash="b" * 64,
    problem=(("tokens", 64), ("n", 4096), ("k", 4096), ("dtype", "bfloat16")),
    device="h100",
    arch=90,
)
CONDITIONS = Conditions(triton="3.6.0", driver="580.65", version="0.1.0")
DEFAULT = Config((("block_m", 64), ("num_warps", 4)))


def problem(**changes):
    """The problem of KEY with other values."""
    return tuple({**dict(KEY.problem), **changes}.items())


def record(block_m=128, *, key=KEY, conditions=CONDITIONS, **changes):
    """A record of a key, which chose `block_m`."""
    config = Config((("block_m", block_m), ("num_warps", 8)))
    made = Record(
        key=key,
        conditions=conditions,
        config=config,
        seconds=1.0e-5,
        default=DEFAULT,
        default_seconds=1.25e-5,
        numerics="k in order",
        runners_up=((DEFAULT, 1.25e-5),),
        failed=((Config((("block_m", 256), ("num_warps", 4))), "spills 12 registers"),),
        trials=17,
        seed=0,
        budget="quick",
        made="2026-01-02T03:04:05+00:00",
    )
    return replace(made, **changes)


def choice_of(tunable, config=None, **changes):
    """A record of a tunable, which chose a config: by default its default."""
    config = tunable.default if config is None else config
    made = Record(
        key=tunable.key,
        conditions=CONDITIONS,
        config=config,
        seconds=9e-6,
        default=tunable.default,
        default_seconds=1e-5,
        numerics=tunable.numerics(config),
        runners_up=(),
        failed=(),
        trials=4,
        seed=0,
        budget="quick",
        made="2026-01-01T00:00:00+00:00",
    )
    return replace(made, **changes)


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
seconds = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
configs = st.dictionaries(words, plain, max_size=4).map(lambda d: Config(tuple(d.items())))
keys = st.builds(
    Key,
    words,
    words,
    words,
    st.dictionaries(words, st.one_of(words, st.integers(min_value=0)), max_size=4).map(
        lambda d: tuple(d.items())
    ),
    words,
    st.integers(),
)
conditions = st.builds(Conditions, words, st.none() | words, words)
moments = st.datetimes().map(lambda when: when.isoformat())
records = st.builds(
    Record,
    key=keys,
    conditions=conditions,
    config=configs,
    seconds=seconds,
    default=configs,
    default_seconds=seconds,
    numerics=words,
    runners_up=st.lists(st.tuples(configs, seconds), max_size=2).map(tuple),
    failed=st.lists(st.tuples(configs, words), max_size=2).map(tuple),
    trials=st.integers(min_value=0),
    seed=st.integers(),
    budget=words,
    made=moments,
)
