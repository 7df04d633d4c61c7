"""What an experiment leaves: claims with their verdicts, tables, and where they are written."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_so2.papers.verdict import Claim, Comparison


@dataclass(frozen=True)
class Findings:
    """What came of one experiment.

    Args:
        claims: each with its measurements.
        tables: everything else that was measured, by name; made of what JSON knows.
        draw: draws the figure into a PNG.
    """

    claims: tuple[Claim, ...]
    tables: Mapping[str, Any]
    draw: Callable[[Path], None]


Experiment = Callable[[int], Findings]
"""Of the number of processes that it may use."""


def carry_out(name: str, experiment: Experiment, folder: Path, workers: int) -> tuple[Claim, ...]:
    """Run an experiment, print a sentence for each of its claims, and leave `<name>.json`, `.md` and `.png`."""
    start = time.perf_counter()
    findings = experiment(workers)
    seconds = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "experiment": name,
        "seconds": round(seconds, 1),
        "workers": workers,
        "claims": [as_json(claim) for claim in findings.claims],
        "tables": findings.tables,
    }
    text = json.dumps(_plain(record), indent=1, allow_nan=False, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(findings.claims), encoding="utf-8")
    findings.draw(folder / f"{name}.png")
    for claim in findings.claims:
        print(f"{claim.key}: {claim.sentence}", flush=True)
    print(f"{name}: {len(findings.claims)} claims in {seconds:.0f} s, see {folder / name}.json and .png", flush=True)
    return findings.claims


def as_json(claim: Claim) -> dict[str, Any]:
    """A claim with its outcome, samples and intervals."""
    return {
        "key": claim.key,
        "paper": claim.paper,
        "section": claim.section,
        "claim": claim.text,
        "run": claim.run,
        "can_fail": claim.can_fail,
        "outcome": claim.outcome.value,
        "comparisons": [_comparison(comparison) for comparison in claim.comparisons],
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "quantity": comparison.quantity,
        "mean": comparison.mean,
        "interval": list(comparison.interval),
        "claimed": f"{comparison.sense} {comparison.bound:g}",
        "outcome": comparison.outcome.value,
        "samples": list(comparison.samples),
    }


def markdown(claims: Sequence[Claim]) -> str:
    """A table of claims, paper, section, what was run and the outcome; runs are listed once, below it."""
    runs = list(dict.fromkeys(claim.run for claim in claims))
    lines = ["| claim | paper | run | outcome | mean, 95 % interval |", "|---|---|---|---|---|"]
    for claim in claims:
        place = f"[{claim.paper}](https://arxiv.org/abs/{claim.paper})" + (
            f", {claim.section}" if claim.section else ""
        )
        text = claim.text if claim.can_fail else f"{claim.text} *(an identity)*"
        outcome = f"**{claim.outcome.value}**"
        measured = "<br>".join(str(comparison).replace("|", "\\|") for comparison in claim.comparisons)
        lines.append(
            f"| {text[0].upper()}{text[1:]} | {place} | {runs.index(claim.run) + 1} | {outcome} | {measured} |"
        )
    listed = [f"{number}. {run[0].upper()}{run[1:]}." for number, run in enumerate(runs, 1)]
    return "\n".join([*lines, "", "Runs:", "", *listed, ""])


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become strings; six digits are enough of the rest."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
