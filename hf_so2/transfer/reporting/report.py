"""`sweep.json`, the figures and one HTML file that opens anywhere."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_so2.mup.coord_check import CoordinateCheck
from hf_so2.transfer.reporting.exponent import Axis
from hf_so2.transfer.reporting.plots import plot_losses, plot_sizes
from hf_so2.transfer.reporting.verdict import BINS_PER_OCTAVE, RATE, Verdict, predicted_loss, predicted_rate
from hf_so2.transfer.trials import Trial, profile, without_seed_effects


@dataclass(frozen=True)
class SweepResult:
    """What one optimizer's sweep came to."""

    trials: Sequence[Trial]
    verdict: Verdict
    sampled: bool


def write_report(
    results: Mapping[str, SweepResult],
    folder: Path,
    *,
    source: Mapping[str, Any],
    recipe: str,
    check: CoordinateCheck | None,
) -> None:
    """Writes `sweep.json`, `sweep.png`, a figure for each other hyperparameter, `widths.png` and `report.html`; with
    depths also `sweep_depth.png` and `depths.png`.

    Args:
        results: by the optimizer's name, the one that was asked for first.
        folder: where to.
        source: `command`, `date` and `versions`.
        recipe: text of `recipe.yaml`, empty when there is none.
        check: the coordinate check at the setting found.
    """
    figures = _draw(results, folder)
    first = next(iter(results))
    context = {
        "title": f"Sweep of {first}: does it transfer?",
        "summary": _summary(results),
        "panels": [_panel(optim, result) for optim, result in results.items()],
        "figures": figures,
        "coordinates": None if check is None else {"sentence": _check_sentence(check), "table": str(check)},
        "trials": [_trial_row(trial) for result in results.values() for trial in result.trials],
        "recipe": recipe,
        "command": source["command"],
        "versions": ", ".join([source["date"], *(f"{name} {number}" for name, number in source["versions"].items())]),
    }
    template = Environment(
        loader=PackageLoader("hf_so2.transfer"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("report.html.j2")
    (folder / "report.html").write_text(template.render(context), encoding="utf-8")
    content = {
        "source": dict(source),
        "optimizers": {optim: _as_json(result) for optim, result in results.items()},
        "coordinate_check": None if check is None else check.to_dict(),
    }
    (folder / "sweep.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    found = {"python": python_version()}
    for name in ("hf_so2", "torch", "transformers", "optuna"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    return found


def _draw(results: Mapping[str, SweepResult], folder: Path) -> list[dict[str, str]]:
    names = sorted({name for result in results.values() for trial in result.trials for name in trial.params})
    names.sort(key=lambda name: name != RATE)
    figures = []
    deep = {optim: result.verdict.depth for optim, result in results.items() if result.verdict.depth is not None}
    drawn: list[tuple[str, Axis]] = [(name, "width") for name in names]
    if deep and RATE in names:
        drawn.insert(1, (RATE, "depth"))
    for name, axis in drawn:
        panels, optima = {}, {}
        for optim, result in results.items():
            verdict = result.verdict if axis == "width" else deep[optim]
            panels[optim] = _points(result, name, axis)
            optima[optim] = {str(size): optimum for size, optimum in verdict.optima.get(name, {}).items()}
        file = "sweep_depth.png" if axis == "depth" else "sweep.png" if name == RATE else f"sweep_{name}.png"
        plot_losses(panels, folder / file, name, axis, optima)
        note = (
            "Points: the best setting with that value, at the level of the first seed. Star: the best. Line: quadratic"
            " fit in the logarithm around it, with its least (dotted) and that one's 90 % interval (shaded). Crosses at"
            " the top: runs that diverged or were stopped as hopeless."
        )
        held = "" if not deep else f", {_held(next(iter(results.values())), axis)}"
        figures.append(_figure(f"Loss against {name.replace('_', ' ')}{held}", folder / file, note))
    note = (
        "Shaded: between no further gain, or drift, and the last one per doubling of the width kept up. That is a"
        " range, not a forecast: two or three proxies do not fix a scaling law."
    )
    plot_sizes({optim: result.verdict for optim, result in results.items()}, folder / "widths.png")
    figures.append(_figure("Loss and optimum against the width", folder / "widths.png", note))
    if deep:
        plot_sizes(deep, folder / "depths.png")
        figures.append(_figure("Loss and optimum against the depth", folder / "depths.png", note))
    return figures


def _points(result: SweepResult, name: str, axis: Axis = "width") -> dict[tuple[str, str], float]:
    """Losses by value of a hyperparameter and width, or depth, at the level of the first seed as the fits are; of the
    deepest proxies, or the widest.
    """
    step = BINS_PER_OCTAVE if result.sampled else None
    points = {}
    other, held = _largest(result, axis)
    line = [trial for trial in result.trials if getattr(trial, other) == held]
    for size in sorted({getattr(trial, axis) for trial in line}):
        trials = without_seed_effects(trial for trial in line if getattr(trial, axis) == size)
        for value, loss in profile(trials, name, per_octave=step).items():
            points[f"{value:g}", str(size)] = loss
    return points


def _largest(result: SweepResult, axis: Axis) -> tuple[Axis, int | None]:
    """The other axis and its largest value: what is held while `axis` changes."""
    other: Axis = "depth" if axis == "width" else "width"
    return other, max((getattr(trial, other) for trial in result.trials), key=lambda size: size or 0, default=None)


def _held(result: SweepResult, axis: Axis) -> str:
    other, size = _largest(result, axis)
    return f"{other} {size}"


def _figure(title: str, path: Path, note: str) -> dict[str, str]:
    return {"title": title, "data": base64.b64encode(path.read_bytes()).decode(), "note": note}


def _summary(results: Mapping[str, SweepResult]) -> str:
    trials = [trial for result in results.values() for trial in result.trials]
    stopped = sum(trial.outcome != "complete" for trial in trials)
    widths = ", ".join(str(width) for width in sorted({trial.width for trial in trials}))
    depths = ", ".join(str(depth) for depth in sorted({trial.depth for trial in trials if trial.depth is not None}))
    sizes = f"widths {widths}" + (f" and depths {depths}" if depths else "")
    minutes = sum(trial.seconds for trial in trials) / 60
    return f"{len(trials)} trials at {sizes}, {stopped} of them stopped early, {minutes:.1f} minutes of training."


def _panel(optim: str, result: SweepResult) -> dict[str, Any]:
    verdict = result.verdict
    rows = [
        {
            "name": name,
            "size": size,
            "tested": f"{optimum.tested:.4g}",
            "edge": f" ({optimum.edge}est tried)" if optimum.edge else "",
            "value": f"{optimum.value:.4g}" if optimum.coefficients else "no fit",
            "interval": f"{optimum.low:.3g} to {optimum.high:.3g}" if optimum.coefficients else "",
            "loss": f"{optimum.loss:.4f}",
            "points": optimum.points,
        }
        for name, by_size in (verdict.grid or verdict.optima).items()
        for size, optimum in by_size.items()
    ]
    rates = verdict.optima.get(RATE, {})
    losses = [
        {"width": width, "loss": f"{loss:.4f}", "rate": f"{rates[width].value:.3g}" if width in rates else ""}
        for width, loss in sorted(verdict.losses.items())
    ]
    for factor in (2, 4, 8):
        width = factor * max(verdict.losses, default=0)
        bounds, between = predicted_loss(verdict.losses, width), predicted_rate(rates, width)
        if bounds is not None:
            rate = "" if between is None else f"predicted {min(between):.2g} to {max(between):.2g}"
            losses.append({"width": width, "loss": f"predicted {bounds[0]:.3f} to {bounds[1]:.3f}", "rate": rate})
    setting = "" if verdict.best is None else ", ".join(f"{k} {v:.4g}" for k, v in verdict.best.params.items())
    noise = (
        "No two settings were repeated, so the noise is not known."
        if verdict.noise is None
        else f"Repeated with another seed, losses differ by {verdict.noise:.4f} beyond what the seed does to all (std)."
    )
    return {
        "optim": optim,
        "transfers": verdict.transfers,
        "sentence": verdict.sentence,
        "advice": verdict.advice,
        "answers": verdict.answers,
        "kind": "width × depth" if verdict.grid else "width",
        "optima": rows,
        "setting": setting,
        "noise": noise,
        "losses": losses,
    }


def _check_sentence(check: CoordinateCheck) -> str:
    widths = ", ".join(str(width) for width in check.widths)
    if check.passed:
        return f"Passed at the setting found: layers change alike over widths {widths}, within ±{check.tolerance:g}."
    return (
        f"Failed at the setting found: over widths {widths} an exponent leaves ±{check.tolerance:g}. The wider the"
        " model, the less the verdict above is worth."
    )


def _trial_row(trial: Trial) -> dict[str, str]:
    return {
        "optim": trial.optim,
        "size": str(trial.width) if trial.depth is None else f"{trial.width}×{trial.depth}",
        "setting": ", ".join(f"{name} {value:.4g}" for name, value in trial.params.items()),
        "seed": str(trial.seed),
        "loss": f"{trial.loss:.4f}" if trial.outcome == "complete" else trial.outcome,
        "seconds": f"{trial.seconds:.0f}",
    }


def _as_json(result: SweepResult) -> dict[str, Any]:
    content = asdict(result.verdict) | {"trials": [asdict(trial) for trial in result.trials]}
    for trial in content["trials"]:
        trial["loss"] = trial["loss"] if math.isfinite(trial["loss"]) else None
    return content
