"""The space counts, orders and names its configs, and Optuna's parameters are the same thing."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.autotune.space import (
    Boolean,
    Choice,
    Config,
    Constraint,
    Integer,
    PowerOfTwo,
    Space,
    When,
)
from tilewright.errors import UsageError
from tuning_records import configs, plain

BLOCKS = Space(
    (
        PowerOfTwo("block_m", 16, 128),
        Choice("scheme", ("flat", "split")),
        Integer("split_k", 2, 9, 3, when=When("scheme", ("split",)), otherwise=1),
        Boolean("pipelined"),
    ),
    (
        Constraint(
            "the tile exceeds shared memory", lambda v: not (v["pipelined"] and v["block_m"] == 128)
        ),
        Constraint("too many parts", lambda v: v["block_m"] * v["split_k"] < 300),
    ),
)


def config(**changes):
    start = {"block_m": 64, "scheme": "flat", "split_k": 1, "pipelined": False}
    return Config.of({**start, **changes}, BLOCKS.names)


@st.composite
def spaces(draw):
    """Spaces of up to five parameters, some of them conditional, with a constraint or none."""
    parameters = []
    for index in range(draw(st.integers(0, 5))):
        name, conditions = f"p{index}", {}
        if parameters and draw(st.booleans()):
            asked = draw(st.sampled_from(parameters))
            values = draw(st.lists(st.sampled_from(list(asked.options())), min_size=1, max_size=2))
            otherwise = draw(st.sampled_from([None, 0, 1, 4, "off"]))
            conditions = {"when": When(asked.name, tuple(values)), "otherwise": otherwise}
        low, span = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        parameters.append(
            draw(
                st.sampled_from(
                    [
                        PowerOfTwo(name, 1 << low, 1 << (low + span), **conditions),
                        Integer(name, low - 2, low - 2 + span, 1 + span % 2, **conditions),
                        Choice(name, ("a", None, 2.5, True)[: span + 1], **conditions),
                        Boolean(name, **conditions),
                    ]
                )
            )
        )
    odd = Constraint("the text is of odd length", lambda v: len(str(v)) % 2 == 0)
    return Space(tuple(parameters), (odd,) if draw(st.booleans()) else ())


def everything(space):
    """The product, the plain way: all combinations, and those out that no condition allows."""
    pools = [
        [*p.options(), *([p.otherwise] if p.when is not None else [])] for p in space.parameters
    ]
    found = (dict(zip(space.names, values, strict=True)) for values in itertools.product(*pools))
    return {
        json.dumps(values) for values in found if all(_fits(p, values) for p in space.parameters)
    }


def _fits(p, values):
    value = values[p.name]
    among = [(type(v), v) for v in p.options()]
    if p.when is None or (values[p.when.name] in p.when.values):
        return (type(value), value) in among
    return (type(value), value) == (type(p.otherwise), p.otherwise)


@given(spaces())
def test_canonical_order_index_and_size_agree(space):
    bare = Space(space.parameters)
    every = list(bare.configs())
    assert bare.size == bare.count() == len(every) == space.size
    assert [bare.index(c) for c in every] == list(range(len(every)))
    assert {json.dumps(c.as_dict()) for c in every} == everything(space)
    valid = list(space.configs())
    assert valid == [c for c in every if space.contains(c)]
    assert space.count() == len(valid)
    assert sorted(valid, key=space.index) == valid


@given(spaces(), st.randoms(use_true_random=False))
def test_configs_and_optunas_params_are_the_same_thing(space, random):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    every = list(Space(space.parameters).configs())
    for c in random.sample(every, min(8, len(every))):
        params = json.loads(json.dumps(space.to_params(c)))
        assert space.from_params(params) == c
        trial = optuna.trial.FixedTrial(params)
        assert space.suggest(trial) == c
        assert trial.params == params
        assert all(space.distributions()[name] == d for name, d in trial.distributions.items())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for c in every[:4]:
        study.enqueue_trial(space.to_params(c))
    assert [space.suggest(study.ask()) for _ in every[:4]] == every[:4]
    trial = study.ask()
    drawn = space.suggest(trial)
    assert space.from_params(trial.params) == drawn
    assert space.to_params(drawn) == trial.params
    assert space.index(drawn) in range(space.size)


@pytest.mark.quick
def test_params_are_exponents_and_only_those_that_apply():
    assert BLOCKS.to_params(config()) == {"block_m": 6, "scheme": "flat", "pipelined": False}
    split = config(scheme="split", split_k=8)
    assert BLOCKS.to_params(split)["split_k"] == 8
    stray = {**BLOCKS.to_params(config()), "split_k": 5}
    assert BLOCKS.from_params(stray) == config()


@pytest.mark.quick
def test_the_first_reason_is_given():
    assert BLOCKS.why_not(config()) is None
    assert BLOCKS.why_not(config(block_m=48)) == "block_m=48 is not one of 16, 32, 64, 128"
    assert "scheme=flat fixes it at 1" in BLOCKS.why_not(config(split_k=2))
    both = config(block_m=128, scheme="split", split_k=8, pipelined=True)
    assert BLOCKS.why_not(both) == "the tile exceeds shared memory"
    assert BLOCKS.why_not(config(pipelined=0)).startswith("pipelined=0 is not one of false, true")
    other_order = Config(tuple(reversed(config().values)))
    assert "in this order" in BLOCKS.why_not(other_order)
    assert BLOCKS.why_not(Config(())) == "its names are none, in this order"


@pytest.mark.quick
def test_what_the_parameters_do_not_give_has_no_place_and_no_params():
    for ask in (BLOCKS.index, BLOCKS.to_params):
        with pytest.raises(UsageError, match="block_m=48 is not one of"):
            ask(config(block_m=48))
    for params, name in [
        ({"block_m": 9, "scheme": "flat", "pipelined": False}, "block_m"),
        ({"block_m": 6, "scheme": "flat", "pipelined": 0}, "pipelined"),
        ({"block_m": 6, "scheme": "split", "pipelined": True}, "split_k"),
        ({"block_m": 6, "scheme": "split", "split_k": 3, "pipelined": True}, "split_k"),
        ({"block_m": 6, "scheme": "flat", "pipelined": True, "waves": 1}, "waves"),
    ]:
        with pytest.raises(UsageError, match=f"parameter {name}"):
            BLOCKS.from_params(params)


@pytest.mark.filterwarnings("ignore:Fixed parameter")
def test_a_trial_with_a_value_that_is_no_option_is_refused():
    import optuna

    study = optuna.create_study()
    study.enqueue_trial({"block_m": 9})
    with pytest.raises(UsageError, match="parameter block_m"):
        BLOCKS.suggest(study.ask())


@pytest.mark.quick
def test_coverage_counts_valid_configs_once():
    tried = [config(), config(), config(block_m=32), config(block_m=48)]
    coverage = BLOCKS.coverage(tried)
    assert (coverage.tried, coverage.valid) == (2, BLOCKS.count())
    assert coverage.share == 2 / BLOCKS.count()
    counts = dict(coverage.by_parameter)
    assert counts["block_m"] == ((16, 0), (32, 1), (64, 1), (128, 0))
    assert counts["split_k"] == ((2, 0), (5, 0), (8, 0), (1, 2))  # its `otherwise` comes last
    assert json.loads(json.dumps(coverage.to_json()))["tried"] == 2
    assert "block_m    16: 0  32: 1" in str(coverage)
    nothing = Space((), (Constraint("never", lambda v: False),)).coverage([])
    assert (nothing.valid, nothing.share) == (0, 1.0)


@pytest.mark.quick
def test_the_digest_is_of_what_is_declared():
    same = Space(BLOCKS.parameters, tuple(Constraint(c.reason, bool) for c in BLOCKS.constraints))
    assert same.digest == BLOCKS.digest
    p = BLOCKS.parameters
    others = [
        Space(p),
        Space(p, BLOCKS.constraints[:1]),
        Space((*p[:3], Boolean("other")), BLOCKS.constraints),
        Space((p[1], p[0], *p[2:]), BLOCKS.constraints),
        Space((p[0], Choice("scheme", ("split", "flat")), *p[2:]), BLOCKS.constraints),
        Space((*p[:2], Integer("split_k", 2, 9, 3), p[3]), BLOCKS.constraints),
        Space((*p[:3], Choice("pipelined", (False, True))), BLOCKS.constraints),
    ]
    assert len({space.digest for space in (BLOCKS, *others)}) == 1 + len(others)


@pytest.mark.quick
@pytest.mark.parametrize(
    "declare",
    [
        lambda: PowerOfTwo("x", 3, 8),
        lambda: PowerOfTwo("x", 8, 4),
        lambda: PowerOfTwo("x", 0, 4),
        lambda: PowerOfTwo("x", 1, 2**60),
        lambda: Integer("x", 4, 2),
        lambda: Integer("x", 0, 4, 0),
        lambda: Integer("x", 0, 2**60),
        lambda: Integer("x", 0, 1.5),
        lambda: Choice("x", ()),
        lambda: Choice("x", "abc"),
        lambda: Choice("x", (1, True)),
        lambda: Choice("x", (0.0, 0)),
        lambda: Choice("x", (math.nan,)),
        lambda: Choice("x", ((1, 2),)),
        lambda: Choice("x", ("\ud800",)),
        lambda: Boolean("x", otherwise=True),
        lambda: Boolean("x", when=When("y", (1,)), otherwise=math.inf),
        lambda: Space((Boolean("x"), Boolean("x"))),
        lambda: Space((Boolean("x", when=When("y", (True,))), Boolean("y"))),
        lambda: Space((Boolean("y"), Boolean("x", when=When("y", ())))),
        lambda: Space((Boolean("y"), Boolean("x", when=When("y", (1,))))),
        lambda: Space((Choice("y", ("a",)), Boolean("x", when=When("y", ("b",))))),
    ],
)
def test_a_declaration_that_makes_no_sense_is_refused(declare):
    with pytest.raises(UsageError, match="parameter x"):
        declare()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["", "block m", "größe", "1st", 3])
def test_names_are_identifiers(name):
    with pytest.raises(UsageError, match="identifier"):
        Boolean(name)


@pytest.mark.quick
def test_a_condition_may_ask_for_the_fixed_value_of_another():
    space = Space(
        (
            Boolean("a"),
            PowerOfTwo("b", 2, 4, when=When("a", (True,)), otherwise=1),
            Boolean("c", when=When("b", (1, 4))),
        )
    )
    texts = [str(c) for c in space.configs()]
    assert texts == [
        "a=false b=1 c=false",
        "a=false b=1 c=true",
        "a=true b=2 c=null",
        "a=true b=4 c=false",
        "a=true b=4 c=true",
    ]


@given(configs)
def test_configs_survive_json(c):
    again = Config.from_json(json.loads(json.dumps(c.to_json())))
    assert again == c
    assert [type(v) for _, v in again.values] == [type(v) for _, v in c.values]


@given(plain, plain)
def test_the_canonical_text_tells_values_apart(one, other):
    texts = [str(Config((("x", value),))) for value in (one, other)]
    alike = type(one) is type(other) and (one == other and str(one) == str(other))
    assert (texts[0] == texts[1]) == alike


@pytest.mark.quick
def test_a_config_is_read_by_name():
    c = config()
    assert (c["block_m"], c.get("scheme"), c.get("none", 3)) == (64, "flat", 3)
    assert str(c) == "block_m=64 scheme=flat split_k=1 pipelined=false"
    assert str(Config((("x", "true"), ("y", "a b")))) == 'x="true" y="a b"'
    with pytest.raises(KeyError):
        c["none"]
    for wrong in ({"a": 1}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(UsageError, match="the names a, b"):
            Config.of(wrong, ("a", "b"))
    for wrong in ([1], {"a": [1]}, {"a": math.nan}):
        with pytest.raises(UsageError, match="config"):
            Config.from_json(wrong)
    with pytest.raises(UsageError, match="each name once"):
        Config((("a", 1), ("a", 2)))


@pytest.mark.quick
def test_a_long_range_is_neither_walked_nor_listed():
    space = Space((Integer("seed", 0, 2**40), Boolean("x")))
    assert space.size == 2 * (2**40 + 1)
    last = Config((("seed", 2**40), ("x", True)))
    assert space.index(Config((("seed", 5), ("x", True)))) == 11
    assert "…" in space.why_not(Config((("seed", -1), ("x", True))))
    assert space.to_params(last) == {"seed": 2**40, "x": True}
