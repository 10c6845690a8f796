"""The regression suite on a device: against itself many times, and against planted defects.

    python benchmarks/gpu/check_regress.py same --runs 20 -o same.jsonl
    python benchmarks/gpu/check_regress.py defects -o defects.jsonl [--no-gpu] [NAME …]

`same` compares this checkout with a copy of it: whatever it finds is a false alarm. `defects` makes
a copy with one line spoiled, lets the copy's own code compare itself with this checkout, and looks
whether the expected tier blames the expected kernel or phase. Lines are appended as they come.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewright.compiler.regress.checkout import Checkout, run_in
from tilewright.compiler.regress.suite import load_suite
from tilewright.compiler.regress.timing.session import time_suite

SUITE = Path(__file__).resolve().parents[1] / "suite.toml"
LEFT_OUT = (".git", ".venv", ".pkg", ".carry", ".whl", ".*_cache", ".hypothesis", "*.egg-info")


@dataclass(frozen=True)
class Defect:
    """One line spoiled, and who is to be blamed for it."""

    name: str
    file: str
    before: str
    after: str
    tier: int
    subject: str
    series: str
    case: str = "llama-1b"


DEFECTS = (
    Defect(
        "a config that spills",
        "codegen/triton/kernels/paged_attention.py",
        "_ANY_PAGE = Tiles(64, 64, 4, 2)",
        "_ANY_PAGE = Tiles(64, 128, 2, 3)",
        2,
        "paged_attention",
        "spills",
        "llama-8b",
    ),
    Defect(
        "a dropped fusion",
        "passes/fuse_linears.py",
        "return [norm] if plain and",
        "return [] if plain and",
        2,
        "decode step",
        "launches",
    ),
    Defect(
        "PDL switched off",
        "codegen/triton/source.py",
        "return target.arch >= EARLY_START",
        "return target.arch >= 10 * EARLY_START",
        2,
        "paged_decode",
        "pdl",
    ),
    Defect(
        "a lost vectorised load",
        "codegen/triton/compat.py",
        '[["tt.divisibility", 16]]',
        '[["tt.divisibility", 2]]',
        2,
        "add_rms_norm",
        "bits per global load",
    ),
    Defect(
        "one extra copy",
        "codegen/triton/library.py",
        "self.function(*operands, **attrs).contiguous()",
        "self.function(*operands, **attrs).contiguous().clone()",
        3,
        "linear",
        "time",
    ),
    Defect(
        "one extra copy, counted",
        "codegen/triton/library.py",
        "self.function(*operands, **attrs).contiguous()",
        "self.function(*operands, **attrs).contiguous().clone()",
        2,
        "host",
        "C calls a decode step without graphs, batch 1",
        "host",
    ),
    Defect(
        "a sleep in the host loop",
        "runtime/loop.py",
        "        flight = self._flight\n        if flight is None:\n",
        "        time.sleep(2e-3)\n        flight = self._flight\n        if flight is None:\n",
        3,
        "decode step",
        "itl",
    ),
    Defect(
        "a sleep in the host loop, counted",
        "runtime/loop.py",
        "        flight = self._flight\n        if flight is None:\n",
        "        time.sleep(2e-3)\n        flight = self._flight\n        if flight is None:\n",
        2,
        "host",
        "C calls a decode step, batch 1",
        "host",
    ),
    Defect(
        "a host that waits in each step",
        "runtime/device_queue.py",
        "    def record(self, event: Any) -> Event:\n",
        "    def record(self, event: Any) -> Event:\n        torch.cuda.synchronize()\n",
        3,
        "decode step",
        "itl",
    ),
)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("same", "defects"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=540.0, help="Begin nothing after that.")
    parser.add_argument("--no-gpu", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="checkout-") as folder:
        if options.what == "same":
            same(options, Path(folder) / "old")
        else:
            sys.exit(defects(options, Path(folder)))


def same(options: argparse.Namespace, folder: Path) -> None:
    """Runs the whole suite against a copy of itself."""
    started, suite, here = time.monotonic(), load_suite(SUITE), Checkout.running()
    old = Checkout.at(copied(here.root, folder))
    for run in range(options.first, options.first + options.runs):
        if time.monotonic() - started > options.seconds:
            print(f"stopped before run {run}")
            break
        timed = time_suite(suite, old, here, seed=run, budget=options.budget)
        counts: dict[str, int] = {}
        for row in timed.rows:
            counts[row.verdict] = counts.get(row.verdict, 0) + 1
        rounds = max(map(len, timed.pairs.values()))
        print(f"run {run}: {counts}, {timed.seconds:.0f} s, {rounds} rounds", flush=True)
        for row in timed.rows:
            if row.verdict != "no change":
                print("   ", row.verdict, row.case, row.subject, row.series, row.note, flush=True)
        keep(options.output, {"run": run, "seconds": timed.seconds, "verdicts": counts,
                              "device": timed.device, "versions": timed.versions,
                              "clocks": timed.clocks, "pairs": shortened(timed.pairs)})  # fmt: skip


def shortened(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, list[list[float]]]:
    """Six digits each."""
    return {
        name: [[float(f"{value:.6g}") for value in pair] for pair in taken]
        for name, taken in pairs.items()
    }


def defects(options: argparse.Namespace, folder: Path) -> int:
    """Plants each defect, and tells whether it was found where it is."""
    started, here, missed = time.monotonic(), Checkout.running(), 0
    for index, defect in enumerate(DEFECTS):
        if options.names and defect.name not in options.names:
            continue
        if time.monotonic() - started > options.seconds:
            print(f"stopped before {defect.name}")
            break
        spoiled = spoil(copied(here.root, folder / f"new{index}"), defect)
        found = compared(spoiled, here, defect, gpu=not options.no_gpu, budget=options.budget)
        blamed = [row for row in found["rows"] if is_expected(row, defect)]
        others = [row for row in found["rows"] if row["verdict"] == "regression"]
        missed += not blamed
        print(f"{'found' if blamed else 'MISSED'}: {defect.name} ({found['seconds']:.0f} s)")
        for row in (blamed or others)[:3]:
            print("   ", describe(row))
        tiers = [sum(row["tier"] == tier for row in others) for tier in (1, 2, 3)]
        print(f"    {len(others)} regressions in all, by tier {tiers}", flush=True)
        timed = [row for row in found["rows"] if row["tier"] == 3]
        line = {"defect": defect.name, "found": bool(blamed), "seconds": found["seconds"]}
        keep(options.output, {**line, "rows": others, "timed": timed})
    return int(missed > 0)


def compared(spoiled: Checkout, here: Checkout, defect: Defect, gpu: bool, budget: float) -> dict:
    """The spoiled copy's own comparison with this checkout, as JSON."""
    words = ["regress", "compare", str(SUITE), "--old", str(here.root), "--only", defect.case]
    if gpu:
        words += ["--gpu", "--budget", str(budget)]
    done = run_in(spoiled, "__main__", [*words, "--json"])
    if done.returncode not in (0, 1):
        raise SystemExit(f"{defect.name}: {done.stderr[-1500:]}")
    return json.loads(done.stdout)


def is_expected(row: dict, defect: Defect) -> bool:
    """Whether a row blames the defect's own kernel or phase, in the tier that should."""
    return (
        row["verdict"] == "regression"
        and row["tier"] == defect.tier
        and row["subject"].split("#")[0].startswith(defect.subject)
        and row["series"].split(" (")[0] == defect.series
    )


def describe(row: dict) -> str:
    """One row in a line."""
    ratio = row.get("ratio")
    factor = f", ×{ratio['value']:.3f}" if ratio else ""
    return (
        f"tier {row['tier']}: {row['case']}.{row['target']} {row['subject']}/{row['series']} "
        f"{row['old']} -> {row['new']}{factor}. {row['note'][:120]}"
    )


def copied(root: Path, folder: Path) -> Path:
    """A copy of a checkout, without what is not of it."""
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    return folder


def spoil(folder: Path, defect: Defect) -> Checkout:
    """The copy with its line spoiled."""
    path = folder / defect.file
    text = path.read_text(encoding="utf-8")
    assert text.count(defect.before) == 1, f"{defect.file}: {text.count(defect.before)} places"
    path.write_text(text.replace(defect.before, defect.after), encoding="utf-8")
    return Checkout.at(folder)


def keep(output: Path, line: dict) -> None:
    """Appends a line."""
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
