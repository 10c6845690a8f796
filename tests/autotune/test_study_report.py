"""Reports of studies: told by hand, so that each figure is known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fake_kernels import DEFAULT, SPACE, FakeTunable, InProcess, config
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.outcome import Outcome
from tilewright.autotune.pool import Pool
from tilewright.autotune.search import tune
from tilewright.autotune.study import Board, StorageError
from tilewright.autotune.study_report import ENOUGH, read_studies

REFERENCE = 10e-6


def outcome(c, ratio, **changes):
    return Outcome(c, "ok", "", (ratio * REFERENCE,) * 3, 0.1, (REFERENCE,) * 3, **changes)


def told(storage, outcomes, *, prior=None, name="study", **options):
    """A study in which these came out, in this order."""
    board = Board(storage, name, SPACE, prior=prior, **options)
    board.enqueue([one.config for one in outcomes])
    for one in outcomes:
        claim = board.claim()
        assert claim.config == one.config
        board.tell(claim, one)
    return board


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "journal"


RATIOS = [1.0, 1.2, 0.9, 0.95, 0.8]
CONFIGS = [DEFAULT, config(16, 16, 1), config(64, 64, 2), config(64, 32, 2), config(64, 128, 3)]


def test_the_history_is_the_best_until_each_trial(journal):
    told(journal, [outcome(c, r) for c, r in zip(CONFIGS, RATIOS, strict=True)])
    (report,) = read_studies(journal)
    assert [n for n, _ in report.history] == [0, 2, 4]
    assert [r for _, r in report.history] == pytest.approx([1.0, 0.9, 0.8])
    assert report.best.outcome.config == CONFIGS[4]


def test_predictions_are_kept_with_each_trial_and_ranked(journal):
    expected = dict(zip(CONFIGS, [1e-6, 2e-6, 3e-6, 4e-6, 5e-6], strict=True))
    told(
        journal,
        [outcome(c, r) for c, r in zip(CONFIGS, RATIOS, strict=True)],
        prior=expected.__getitem__,
    )
    (report,) = read_studies(journal)
    assert [p for p, _ in report.predictions] == list(expected.values())
    # Ranks 1 2 3 4 5 against 4 5 2 3 1: 1 - 6 (9 + 9 + 1 + 1 + 16) / (5 * 24) = -0.8
    assert report.rank_correlation == pytest.approx(-0.8)


def test_equal_predictions_share_a_rank(journal):
    told(journal, [outcome(c, r) for c, r in zip(CONFIGS, RATIOS, strict=True)],
         prior=lambda c: 1e-6 if c == DEFAULT else 2e-6)  # fmt: skip
    # Ranks 1 3.5 3.5 3.5 3.5 against 4 5 2 3 1: covariance -2.5 over sqrt(5) sqrt(10)
    assert read_studies(journal)[0].rank_correlation == pytest.approx(-2.5 / 50**0.5)


def test_coverage_is_of_the_space_that_the_study_names(journal):
    told(journal, [outcome(c, r) for c, r in zip(CONFIGS, RATIOS, strict=True)])
    coverage = read_studies(journal)[0].coverage
    assert coverage == SPACE.coverage(CONFIGS)
    assert dict(coverage.by_parameter)["block_m"] == ((16, 1), (32, 1), (64, 3), (128, 0))


def test_the_parameter_that_decides_is_the_most_important(journal):
    configs = [c for c in SPACE.configs() if c["split_k"] == 1][::2]
    told(journal, [outcome(c, 1 + 0.1 * c["stages"]) for c in configs])
    found = read_studies(journal)[0].importances
    assert list(found)[0] == "stages" and found["stages"] > 0.5
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize("ratios", [[1.0] * (ENOUGH + 4), [1 + n for n in range(ENOUGH - 1)]])
def test_too_few_or_too_equal_have_no_importance(journal, ratios):
    configs = list(SPACE.configs())[: len(ratios)]
    told(journal, [outcome(c, r) for c, r in zip(configs, ratios, strict=True)])
    (report,) = read_studies(journal)
    assert report.importances == {}
    assert report.to_json()["importances_note"] == "too few trials"


def test_what_failed_is_kept_by_status_with_its_reason(journal):
    told(
        journal,
        [
            outcome(DEFAULT, 1.0),
            Outcome(CONFIGS[1], "refused", "spills 96 bytes"),
            Outcome(CONFIGS[2], "wrong", "its error is 50 times the tolerance"),
            Outcome(CONFIGS[3], "refused", "too much shared memory"),
            outcome(CONFIGS[4], 1.5, stopped=True),
        ],
    )
    (report,) = read_studies(journal)
    assert list(report.failures) == ["refused", "wrong"]
    assert [o.outcome.reason for o in report.failures["refused"]] == [
        "spills 96 bytes",
        "too much shared memory",
    ]
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["failed"]["wrong"][0]["config"] == CONFIGS[2].to_json()
    assert [row["stopped"] for row in data["tried"]] == [False] * 4 + [True]


def test_two_processes_and_what_is_under_way_are_counted(journal, monkeypatch):
    told(journal, [outcome(DEFAULT, 1.0)])
    monkeypatch.setattr("os.getpid", lambda: 1)
    other = Board(journal, "study", SPACE)
    other.enqueue(CONFIGS)
    other.tell(other.claim(), outcome(CONFIGS[1], 1.1))
    assert other.claim()
    (report,) = read_studies(journal)
    assert (report.processes, report.running, report.waiting) == (2, 1, 2)


@pytest.mark.parametrize("name", ["quick", "full"])
def test_studies_of_searches_tell_problem_default_and_choice(journal, name):
    effort = replace(EFFORTS[name], share=0.3, candidates=6, trials=6 if name == "quick" else 8)
    for kernel in ("b", "a"):
        with Pool(start=InProcess) as pool:
            tuned = tune(FakeTunable(name=kernel), effort, pool, storage=journal)
    first, second = read_studies(journal)
    assert (first.problem["template"], second.problem["template"]) == ("a", "b")
    assert first.default == DEFAULT and first.choice == tuned.choice
    assert first.coverage == tuned.coverage
    assert len(first.predictions) == len(first.tried) == len(tuned.outcomes)


def test_a_study_of_an_earlier_version_still_reports(journal, monkeypatch):
    monkeypatch.setattr(Board, "_describe", lambda self, facts: None)
    told(journal, [outcome(DEFAULT, 1.0)])
    (report,) = read_studies(journal)
    assert (report.coverage, report.rank_correlation, report.problem) == (None, None, {})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file"),
        (b"", "no studies"),
        (b'{"key": 1}\n{"key": 2}\n', "no journal"),
        (b"\xff\xfe\n\n\n", "no journal"),
        (b"not json\nat all\n", "no journal"),
    ],
)
def test_what_is_no_storage_is_a_clear_error_and_is_left_alone(tmp_path, content, words):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=words):
        read_studies(path)
    assert path.exists() == (content is not None)
    assert content is None or path.read_bytes() == content


@pytest.mark.quick
def test_databases_and_servers_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tilewright.autotune.study.ANSWER_SECONDS", 0.2)
    for storage in (f"sqlite:///{tmp_path}/no.db", "grpc://127.0.0.1:1", str(tmp_path)):
        with pytest.raises(StorageError) as caught:
            read_studies(storage)
        assert storage in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    empty = tmp_path / "empty.db"
    empty.touch()
    with pytest.raises(StorageError, match="no such table"):
        read_studies(f"sqlite:///{empty}")


def test_the_studies_of_others_are_no_report(journal):
    import optuna

    from tilewright.autotune.study import open_storage

    optuna.create_study(storage=open_storage(journal), study_name="theirs")
    with pytest.raises(StorageError, match="others: theirs"):
        read_studies(journal)
