"""A whole comparison: tiers 1 and 2 against a baseline or a checkout, tier 3 against checkouts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import EngineError, UsageError
from .baseline import Baseline, read_baseline
from .checkout import Checkout, run_in
from .collect import Key, collect, working_tree
from .compare import compare_snapshots
from .model import Comparison, Side
from .snapshot import Snapshot
from .suite import Suite
from .timing.session import Timed, time_suite, timed_cases

Advance = Callable[[str, float], None]
OF_PINNED = "against the pinned baseline"


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be compared.

    Attributes:
        suite: what is watched.
        baseline: folder of a recorded baseline; None: that of `old`'s own code.
        old, pinned: checkouts; the second is an old one that stays the same for months.
        only: names of cases; None for all.
        expect_identical: whether any difference of generated code is a finding.
        gpu: whether tier 3 is run, against `old` and `pinned`.
        budget: seconds of measuring for each.
        strict: whether what is not decidable is a finding.
    """

    suite: Suite
    baseline: Path | None = None
    old: Checkout | None = None
    pinned: Checkout | None = None
    only: Sequence[str] | None = None
    expect_identical: bool = False
    gpu: bool = False
    budget: float = 60.0
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a comparison.

    Attributes:
        comparison: all its rows.
        snapshots: what was collected.
        timed: tier 3 against `old`; None where it was not run.
        against_pinned: tier 3 against `pinned`.
    """

    comparison: Comparison
    snapshots: Mapping[Key, Snapshot]
    timed: Timed | None = None
    against_pinned: Timed | None = None


def run_comparison(request: Request, advance: Advance = lambda phase, share: None) -> Outcome:
    """Collects, compares, and times if that was asked for.

    Raises:
        UsageError: options that do not go together, or sides that cannot be compared.
        TilewrightError: a case that does not compile, a process that dies.
    """
    _check(request)
    started, tiers = time.perf_counter(), 0.4 if request.gpu else 1.0
    recorded = _recorded(request)
    snapshots = collect(
        request.suite, request.only, lambda phase, share: advance(phase, tiers * share)
    )
    baseline = recorded or _baseline_of_old(request, advance)
    comparison = compare_snapshots(
        request.suite, baseline, snapshots, request.expect_identical, request.only, working_tree()
    )
    timed = _timed(request, request.old, advance) if request.gpu else None
    pinned = _timed(request, request.pinned, advance) if request.gpu else None
    rows = list(comparison.rows)
    if timed is not None:
        rows += timed.rows
    if pinned is not None:
        rows += [replace(row, note=f"{OF_PINNED}. {row.note}".rstrip(". ")) for row in pinned.rows]
    measured = timed or pinned
    new = comparison.new
    if measured is not None:
        versions = {**measured.versions, **new.versions}
        new = replace(new, device=measured.device, versions=versions)
    comparison = replace(
        comparison,
        new=new,
        rows=tuple(rows),
        seconds=time.perf_counter() - started,
        strict=request.strict,
    )
    return Outcome(comparison, snapshots, timed, pinned)


def _check(request: Request) -> None:
    if request.gpu and request.old is None and request.pinned is None:
        raise UsageError(
            "option --gpu",
            expected="a checkout to time against: --old CHECKOUT or --pinned CHECKOUT",
            found="neither",
            remedy="Make one: git worktree add ../base main, then --old ../base.",
        )
    if request.old is not None and request.baseline is not None and not request.gpu:
        raise UsageError(
            "option --old",
            expected="--gpu beside it, or no --baseline: one of the two is compared with",
            found="--baseline, and no --gpu",
            remedy="Leave one of them out, or add --gpu to time against the checkout.",
        )
    if request.pinned is not None and not request.gpu:
        raise UsageError(
            "option --pinned",
            expected="--gpu beside it: the pinned baseline is timed against",
            found="no --gpu",
            remedy="Add --gpu, or leave it out.",
        )
    check_budget(request.budget)
    if request.gpu:
        timed_cases(request.suite, request.only)


def check_budget(seconds: float) -> None:
    """Refuses a budget of nothing; UsageError."""
    if not seconds > 0:
        raise UsageError(
            "option --budget",
            expected="more than 0 seconds",
            found=f"{seconds:g}",
            remedy="Give it 60.",
        )


def _recorded(request: Request) -> Baseline | None:
    """The baseline of a folder; one that will be refused is so before minutes of collecting."""
    if request.baseline is None:
        return None
    found = read_baseline(request.baseline)
    compare_snapshots(request.suite, found, {}, only=request.only)
    return found


def _baseline_of_old(request: Request, advance: Advance) -> Baseline | None:
    if request.baseline is not None or request.old is None:
        return None
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        advance(f"collecting with the code of {request.old.root.name}", 0.35)
        return baseline_of(request.old, request.suite, request.only, Path(folder) / "baseline")


def baseline_of(
    checkout: Checkout, suite: Suite, only: Sequence[str] | None, folder: Path
) -> Baseline | None:
    """A baseline that a checkout's own code records of this suite.

    Raises:
        EngineError: it cannot; what it said is in the message.
    """
    arguments = ["record", str(suite.path.resolve()), "--baseline", str(folder)]
    chosen = [word for name in only or () for word in ("--only", name)]
    words = ["regress", *arguments, *chosen, "--reason", "the other side of a comparison"]
    done = run_in(checkout, "__main__", words)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EngineError(
            f"the code in {checkout.root}",
            expected=f"a baseline of the suite {suite.name}",
            found=" ".join(line.strip() for line in said[-4:]),
            remedy="Run tilewright regress record with that checkout by hand.",
        )
    found = read_baseline(folder)
    if found is None:
        return None
    label = checkout.commit[:12] if checkout.commit else str(checkout.root)
    side = Side(label, checkout.commit, found.side.recorded, None, found.side.versions)
    return replace(found, side=side)


def _timed(request: Request, old: Checkout | None, advance: Advance) -> Timed | None:
    if old is None:
        return None
    return time_suite(
        request.suite,
        old,
        Checkout.running(),
        only=request.only,
        budget=request.budget,
        advance=lambda phase, share: advance(phase, 0.4 + 0.6 * share),
    )
