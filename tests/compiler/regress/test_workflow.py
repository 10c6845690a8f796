"""The workflow and its action: options that exist, the least permissions, nothing for forks."""

from __future__ import annotations

import re

import pytest

from house.tree import ROOT

FLAGS = {
    "compare": (
        "--baseline --expect-identical --only --old --pinned --gpu --budget --strict --history "
        "--markdown --junit --html --json --save"
    ),
    "record": "--baseline --reason",
    "history": "--device --html --markdown --json --max-age",
}
WORKFLOW = ROOT / ".github" / "workflows" / "regress.yml"
ACTION = ROOT / ".github" / "actions" / "regress" / "action.yml"


def wrong_flags(script: str) -> list[str]:
    """Options that a script gives to a verb of ``tilewright regress`` which lacks them."""
    joined = script.replace("\\\n", " ")
    # An array of options belongs to the command that takes it.
    arrays = " ".join(re.findall(r"options\+=\(([^)]*)\)", joined))
    joined = re.sub(r"options\+=\([^)]*\)", "", joined).replace('"${options[@]}"', arrays)
    found = []
    for verb, rest in re.findall(r'(?:tilewright|TILEWRIGHT"?) regress (\w+)([^\n]*)', joined):
        valid = FLAGS.get(verb, "").split()
        found += [flag for flag in re.findall(r"(?<!\S)--[\w-]+", rest) if flag not in valid]
        found += [] if verb in FLAGS else [verb]
    return found


def steps_of(document: dict) -> list[dict]:
    if "runs" in document:
        return document["runs"]["steps"]
    return [step for job in document["jobs"].values() for step in job["steps"]]


@pytest.fixture(scope="module")
def yaml():
    return pytest.importorskip("yaml")


def test_the_workflow_uses_flags_that_exist(yaml):
    used = 0
    for path in (WORKFLOW, ACTION):
        for step in steps_of(yaml.safe_load(path.read_text("utf-8"))):
            script = step.get("run", "")
            assert wrong_flags(script) == [], path
            used += len(re.findall(r"regress (?:compare|history)", script))
    assert used == 2


def test_a_flag_that_does_not_exist_is_found():
    assert wrong_flags("tilewright regress compare s.toml --old base --fast") == ["--fast"]
    assert wrong_flags('options+=(--quick)\n"$TILEWRIGHT" regress compare "${options[@]}"') == [
        "--quick"
    ]
    assert wrong_flags("tilewright regress blame x") == ["blame"]


def test_each_job_has_a_time_limit_and_the_least_permissions(yaml):
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    assert workflow["permissions"] == {}
    assert set(workflow[True]) == {"pull_request", "schedule", "workflow_dispatch"}  # YAML's "on"
    assert workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 60, name
        writes = {key for key, value in job["permissions"].items() if value == "write"}
        assert writes == {"comment": {"pull-requests"}, "history": {"contents"}}.get(name, set())


def test_no_fork_reaches_the_gpu_or_a_token_that_writes(yaml):
    jobs = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]
    same = "github.event.pull_request.head.repo.full_name == github.repository"
    assert jobs["timed"]["runs-on"] == ["self-hosted", "gpu"]
    assert (
        same in jobs["timed"]["if"]
        and "vars.TILEWRIGHT_GPU_RUNNER == 'true'" in jobs["timed"]["if"]
    )
    assert same in jobs["comment"]["if"]
    assert "github.event_name != 'pull_request'" in jobs["history"]["if"]


def test_actions_are_pinned_and_scripts_hold_no_expressions(yaml):
    for path in (WORKFLOW, ACTION):
        for step in steps_of(yaml.safe_load(path.read_text("utf-8"))):
            uses = step.get("uses", "./")
            assert uses.startswith("./") or re.fullmatch(r"actions/[\w-]+@v\d+", uses)
            # An expression in a script is pasted in before the shell reads it.
            assert "${{" not in step.get("run", "")


def test_the_action_takes_what_the_workflow_gives(yaml):
    inputs = set(yaml.safe_load(ACTION.read_text("utf-8"))["inputs"])
    for step in steps_of(yaml.safe_load(WORKFLOW.read_text("utf-8"))):
        if step.get("uses", "").endswith("/.github/actions/regress"):
            assert set(step["with"]) <= inputs
