"""The suite file: what it may say, and what every wrong line is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regress_suites import GRAPH, HEAD, LLAMA, suite_of
from tilewright.autotune.verdicts import Verdict
from tilewright.compiler.regress.gates import Gate, judge
from tilewright.compiler.regress.single import write_suite
from tilewright.compiler.regress.suite import HostCase, load_suite
from tilewright.errors import UsageError

OWN = Path(__file__).resolve().parents[3] / "benchmarks" / "suite.toml"


@pytest.mark.quick
def test_cases_in_order_with_owners_and_definitions(tmp_path):
    text = HEAD + LLAMA + GRAPH.replace("targets", 'owner = "norms"\ntargets')
    suite = suite_of(tmp_path, text)
    assert [(case.name, case.owner) for case in suite.cases] == [
        ("tiny", "kernels"),
        ("norm", "norms"),
    ]
    assert suite.chosen(["norm"]) == suite.cases[1:]
    # How it is written, who owns it and what is watched decide nothing of what is generated.
    again = suite_of(tmp_path, text.replace('"norms"', '"others"').replace("paged_attention", "x"))
    assert [c.definition for c in again.cases] == [c.definition for c in suite.cases]
    other = suite_of(tmp_path, text.replace("hidden_size = 64", "hidden_size = 128"))
    assert other.cases[0].definition != suite.cases[0].definition
    assert other.cases[1].definition == suite.cases[1].definition


def test_a_config_file_and_a_folder_stand_for_a_table(tmp_path):
    suite = suite_of(tmp_path, HEAD + LLAMA)
    head, _ = LLAMA.split("[model.config]")
    (tmp_path / "config.json").write_text(json.dumps(suite.cases[0].config))
    from_file = suite_of(tmp_path, HEAD + head + 'config = "config.json"')
    assert from_file.cases[0].definition == suite.cases[0].definition
    from_folder = suite_of(tmp_path, HEAD + head + 'path = "."')
    first = from_folder.cases[0].definition
    (tmp_path / "config.json").write_text(json.dumps({**suite.cases[0].config, "vocab_size": 9}))
    assert from_folder.cases[0].definition != first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", ["suite.toml", "TOML"]),
        (HEAD, ["model", "[[model]]"]),
        (HEAD + "colour = 1\n" + LLAMA, ["'colour'", "thresholds"]),
        (LLAMA, ["'name'", "no such key"]),
        (HEAD + LLAMA.replace("max_batch_size", "max_batch"), ["tiny", "max_batch", "dtype"]),
        (HEAD + LLAMA.replace("= 64\nmax_b", '= "64"\nmax_b'), ["tiny", "max_model_len", "'64'"]),
        (HEAD + LLAMA.replace("max_batch_size = 4", "max_batch_size = 0"), ["max_batch_size", "0"]),
        (HEAD + LLAMA.replace('"h100"', '"h1000"'), ["tiny", "'targets'", "h1000", "a100"]),
        (HEAD + LLAMA.replace('"h100"', '"cpu"'), ["'targets'", "'cpu'", "h100"]),
        (HEAD + LLAMA.replace('["h100"]', '["h100", "h100"]'), ["targets", "each once"]),
        (HEAD + LLAMA.replace('["h100"]', '"h100"'), ["targets", "list of texts"]),
        (HEAD + LLAMA.replace('"tiny"', '"../x"'), ["'name'", "../x"]),
        (HEAD + LLAMA.replace("targets", 'dtype = "int3"\ntargets'), ["'dtype'", "bfloat16"]),
        (HEAD + LLAMA.replace("targets", 'timed = ["all"]\ntargets'), ["'timed'", "phases"]),
        (HEAD + LLAMA + LLAMA.replace('"tiny"', '"Tiny"'), ["Tiny", "twice"]),
        (HEAD + LLAMA.replace("model_type", "kind"), ["tiny", "'config'", "model_type"]),
        (HEAD + LLAMA.split("[model.config]")[0], ["either config or path", "neither"]),
        (HEAD + LLAMA.split("[model.config]")[0] + 'config = "no.json"', ["config", "no.json"]),
        (HEAD + LLAMA.split("[model.config]")[0] + 'path = "no"', ["'path'", "no"]),
        (HEAD + '[thresholds]\n"*/time" = "fast"\n' + LLAMA, ["*/time", "'fast'", '"5%"']),
        (HEAD + '[thresholds]\n"*/time" = 2\n' + LLAMA, ["thresholds", "*/time", "2"]),
        (HEAD + GRAPH.replace("add(a, b)", "addd(a, b)"), ["norm", "'text'", "addd"]),
        (HEAD + GRAPH.replace("T = 512", "S = 512"), ["'sizes'", "T", "S"]),
        (HEAD + GRAPH.replace("T = 512", "T = 0"), ["'sizes'", "0"]),
        (HEAD + '[[host]]\nname = "h"\ntargets = ["h100"]\n', ["'targets'", "name, owner"]),
        (HEAD + '[[host]]\nname = "h/h"\n', ["[[host]]", "'name'", "h/h"]),
        (HEAD + GRAPH + '[[host]]\nname = "Norm"\n', ["Norm", "twice"]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_valid(tmp_path, text, words):
    with pytest.raises(UsageError) as caught:
        suite_of(tmp_path, text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_file_and_no_such_case(tmp_path):
    with pytest.raises(UsageError, match="none.toml"):
        load_suite(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="'nrom'.*one of norm"):
        suite_of(tmp_path, HEAD + GRAPH).chosen(["nrom"])


def test_later_thresholds_win_and_name_parts_of_kernels_too(tmp_path):
    lines = '[thresholds]\n"*/registers" = "10%"\n"add/*" = "3"\n"mul/MUFU" = "any"\n'
    suite = suite_of(tmp_path, HEAD + lines + GRAPH)
    assert suite.rule("x", "registers (merge)") == ("lower", Gate(0.1, True))
    assert suite.rule("add", "registers") == ("lower", Gate(3.0, False))
    assert suite.rule("x", "spills") == ("lower", Gate(0.0, False))
    assert suite.rule("x", "warps per SM")[0] == "higher"
    assert suite.rule("mul", "MUFU")[1].words("lower") == "any"
    assert suite.rule("x", "HMMA")[0] == "equal"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("old", "new", "better", "gate", "verdict"),
    [
        (100, 110, "lower", "10%", Verdict.NO_CHANGE),
        (100, 111, "lower", "10%", Verdict.REGRESSION),
        (100, 89, "lower", "10%", Verdict.IMPROVEMENT),
        (0, 1, "lower", "0", Verdict.REGRESSION),
        (1, 0, "lower", "0", Verdict.IMPROVEMENT),
        (5, 5, "lower", "0", Verdict.NO_CHANGE),
        (0, 1, "lower", "50%", Verdict.REGRESSION),  # a share of nothing is nothing
        (5, 7, "lower", "2", Verdict.NO_CHANGE),
        (5, 8, "lower", "+2", Verdict.REGRESSION),
        (64, 63, "higher", "0", Verdict.REGRESSION),
        (63, 64, "higher", "0", Verdict.IMPROVEMENT),
        (0.1 + 0.2, 0.3, "lower", "0", Verdict.NO_CHANGE),  # the order of a sum
        (3, 4, "equal", "any", Verdict.CHANGED),
        (3, 4, "equal", "0", Verdict.REGRESSION),
        (3, 9, "lower", "any", Verdict.NO_CHANGE),
    ],
)
def test_what_a_change_is(old, new, better, gate, verdict):
    assert judge(old, new, better, Gate.parse(gate)) is verdict


def test_the_projects_own_suite_loads():
    suite = load_suite(OWN)
    assert len({case.name for case in suite.cases}) >= 10
    assert {"h100", "a100", "l4", "b200"} <= {t for case in suite.cases for t in case.targets}
    host, *others = reversed(suite.cases)
    assert isinstance(host, HostCase) and host.targets == ("cpu",)
    assert all(case.watch for case in others)


def test_a_host_case_is_written_as_it_is_read(tmp_path):
    suite = suite_of(tmp_path, HEAD + '[[host]]\nname = "steps"\n' + GRAPH)
    assert [case.name for case in suite.cases] == ["norm", "steps"]
    (tmp_path / "copy").mkdir()
    copy = load_suite(write_suite(suite, tmp_path / "copy"))
    assert [(c.name, c.definition) for c in copy.cases] == [
        (c.name, c.definition) for c in suite.cases
    ]
