"""What becomes of every causal-LM family that the tests know.

    python benchmarks/survey_architectures.py [NAME …] [--backend triton --tokens 2]

Each tiny random model is compiled, generates greedily from three prompts in one call, and is held
against Hugging Face's tokens for each prompt alone. A family is "equal", "refused" (with the
reason), or "WRONG", which must not be. Without a GPU the Triton backend runs in its interpreter,
where a few tokens take long enough.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # looked at where there is no GPU alone

import torch

import tilewright as tw
from tilewright.errors import TilewrightError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tiny_models import FAMILIES, PROMPTS, greedy, tiny_model  # noqa: E402  (needs the path above)


@dataclass(frozen=True, slots=True)
class Row:
    """One family's outcome."""

    name: str
    outcome: str  # equal, refused, WRONG, failed
    route: str = ""
    calls: str = ""
    error: float | None = None  # largest deviation of the logits
    aten: str = ""
    note: str = ""
    seconds: float = 0.0


def survey(name: str, backend: str, verify: str, tokens: int) -> Row:
    """Compiles the family's tiny model and compares it with Hugging Face."""
    started = time.perf_counter()
    model = tiny_model(name)
    try:
        target = "auto" if torch.cuda.is_available() else "cpu"
        engine = tw.compile(model, backend=backend, verify=verify, target=target)
        params = tw.SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        found = [c.token_ids for c in engine.generate(PROMPTS, params)]
        ids = torch.tensor([PROMPTS[-1]])
        logits = engine(ids)
    except TilewrightError as error:
        return Row(name, "refused", note=_brief(error), seconds=time.perf_counter() - started)
    except Exception as error:  # what a survey is for
        return Row(name, "failed", note=_brief(error), seconds=time.perf_counter() - started)
    with torch.no_grad():
        deviation = (logits - model(ids, use_cache=False).logits).abs().max().item()
    equal = found == [greedy(model, prompt, tokens) for prompt in PROMPTS]
    report = engine.report()
    return Row(
        name,
        "equal" if equal and deviation < 1e-4 else "WRONG",
        str(report["capture"]["route"]),
        " ".join(f"{loader} {count}" for loader, count in report["calls"].items()),
        deviation,
        " ".join(report["aten"]),
        "; ".join(sorted(set(report["fallbacks"])))[:200],
        time.perf_counter() - started,
    )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> int:
    """Prints the table; exit code 1 if any family is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--verify", default="structure")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows = []
    for name in options.names:
        row = survey(name, options.backend, options.verify, options.tokens)
        rows.append(row)
        error = "" if row.error is None else f"{row.error:.0e}"
        print(
            f"{row.name:20} {row.outcome:8} {row.route:6} {error:6} {row.seconds:5.1f} s  "
            f"{row.calls}  {row.aten}  {row.note}",
            flush=True,
        )
    counts = {o: sum(r.outcome == o for r in rows) for o in ("equal", "refused", "WRONG", "failed")}
    print(f"{len(rows)} families:", ", ".join(f"{n} {o}" for o, n in counts.items()))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(counts["WRONG"] + counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
