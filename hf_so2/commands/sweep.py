"""Tunes on small proxies and says whether the result holds for a wide model.

    hf-so2 sweep quickstart --optim kfac_mup --widths 64 128 --trials 12 --output_dir out/sweep

--depths 2 4 8 makes a proxy of every width with every number of layers.
Searches learning_rate, damping, fallback_learning_rate and weight_decay, or any of them (--grid or --search; by default
learning rates a factor 2 apart). Trials are kept in --output_dir/sweep.db: the same command again goes on where it was
stopped. Leaves sweep.json, sweep.png, report.html and recipe.yaml there, for
`hf-so2 train --recipe out/sweep/recipe.yaml --width 512`.

Exit code 0 when the trials confirm that the setting transfers, 1 when they do not (the recipe says so), 2 for a user's
mistake (one line, no traceback), 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from hf_so2 import cli
from hf_so2.errors import ConfigurationError
from hf_so2.folders import require_folder
from hf_so2.methods.table import MUP_SUFFIX
from hf_so2.mup import scale_depth, scale_width
from hf_so2.mup.coord_check import CoordinateCheck
from hf_so2.transfer.coordinates import coordinate_check
from hf_so2.transfer.proxies import Proxy, make_recipe, proxies_of, standard_parametrization
from hf_so2.transfer.recipe import Recipe, write_recipe
from hf_so2.transfer.reporting.coordinate_plot import plot_coordinate_check
from hf_so2.transfer.reporting.report import SweepResult, versions, write_report
from hf_so2.transfer.reporting.verdict import Verdict
from hf_so2.transfer.runner import TYPES, quieten
from hf_so2.transfer.store import SweepStore
from hf_so2.transfer.sweep import Sweep, SweepArguments, shown

INTERRUPTED = 130


def main() -> int:
    """Trials, verdict, recipe and report; 0 when the transfer is confirmed."""
    flags = cli.read_flags((SweepArguments, *TYPES))
    (arguments,) = cli.build((SweepArguments,), flags)
    own = {entry.name for entry in fields(SweepArguments)}
    proxies = prepare({name: value for name, value in flags.items() if name not in own}, arguments)
    _, _, training = proxies[0].arguments()
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    folder = Path(training.output_dir)
    require_folder("output_dir", folder)
    sweeps = [Sweep(arguments, proxies)]
    if arguments.compare:
        sweeps.append(Sweep(arguments, standard_parametrization(proxies, sweeps[0].optim)))
    store = SweepStore(folder, arguments.storage)
    try:
        for sweep in sweeps:
            sweep.open(store, deadline)
            sweep.run()
            if sweep.unfinished():
                print(f"the minutes are over: {sweep.unfinished()} trials are left for another run of this command")
        return report(sweeps, proxies[-1], arguments, folder)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on, finished trials are kept in {store.url}", file=sys.stderr)
        return INTERRUPTED
    finally:
        store.close()


def prepare(flags: Mapping[str, Any], arguments: SweepArguments) -> list[Proxy]:
    """The proxies; every mistake in the flags is found here, before anything is trained."""
    others = {"width": "widths", "depth": "depths", "model_name_or_path": "checkpoints"}
    for name, instead in others.items():
        if name in flags:
            raise ConfigurationError(name, flags[name], f"must be left out: --{instead} says which")
    quieten()
    proxies = proxies_of(flags, arguments.widths, arguments.checkpoints, arguments.depths)
    for proxy in proxies:
        proxy.arguments()
    if arguments.compare and not proxies[0].optim.endswith(MUP_SUFFIX):
        raise ConfigurationError("compare", True, f"needs an optimizer with {MUP_SUFFIX}, not {proxies[0].optim}")
    return proxies


def report(sweeps: Sequence[Sweep], widest: Proxy, arguments: SweepArguments, folder: Path) -> int:
    """Says and writes what was found; 0 when the first sweep's setting transfers."""
    ranges = bool(sweeps[0].space.ranges)
    results = {sweep.optim: SweepResult(sweep.trials(), sweep.verdict(), ranges) for sweep in sweeps}
    if not any(result.trials for result in results.values()):
        print("nothing was tried yet")
        return 1
    verdict = results[sweeps[0].optim].verdict
    source = {
        "command": cli.command_line(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
    }
    text, check = "", None
    if verdict.best is not None:
        recipe = make_recipe(widest, dict(verdict.best.params), transfer_section(verdict), source)
        write_recipe(recipe, folder / "recipe.yaml")
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
        if arguments.coordinate_check:
            check = check_coordinates(recipe, widest)
        if check is not None:
            plot_coordinate_check(check, folder / "coord_check.png")
    write_report(results, folder, source=source, recipe=text, check=check)
    for optim, result in results.items():
        print("\n".join([f"\n{optim}: {result.verdict.sentence}", *result.verdict.answers, result.verdict.advice]))
    if verdict.best is not None:
        print(f"\nbest at {widest}: {verdict.best.mean:.4f} at {shown(verdict.best.params)}")
    if check is not None:
        print(f"coordinate check: {'passed' if check.passed else 'failed'}")
    print(
        f"{folder / 'report.html'} shows it all" + (f", {folder / 'recipe.yaml'} is for the wide run" if text else "")
    )
    return 0 if verdict.transfers else 1


def transfer_section(verdict: Verdict) -> dict[str, Any]:
    """What the recipe says of the proxies."""
    section = {"confirmed": verdict.transfers, "verdict": verdict.sentence, "losses": dict(verdict.losses)}
    if verdict.depth is not None:
        section["depth_losses"] = dict(verdict.depth.losses)
    if verdict.exponents:
        section["exponents"] = {
            exponent.axis: [
                None if value is None else round(value, 3) for value in (exponent.value, exponent.low, exponent.high)
            ]
            for exponent in verdict.exponents
        }
    return section


def check_coordinates(recipe: Recipe, proxy: Proxy) -> CoordinateCheck | None:
    """The coordinate check at the recipe's setting, from the base width to four times it; None outside μP, and for
    fine-tuning, since it trains models from scratch.
    """
    optim, base = str(recipe.optimizer["optim"]), recipe.base.get("mup_base_width")
    if not optim.endswith(MUP_SUFFIX) or base is None or "config_overrides" not in recipe.model:
        return None
    print("coordinate check", flush=True)
    settings = {name: value for name, value in recipe.optimizer.items() if name != "optim"}
    model, _, training = proxy.arguments()
    config = scale_width(proxy.config, width=base, head=model.head)
    depth = recipe.base.get("mup_base_depth")
    if proxy.depth is not None and depth is not None:
        config = scale_depth(config, depth)
    return coordinate_check(
        config, optim, widths=[base, 2 * base, 4 * base], seeds=2, head=model.head, device=training.device, **settings
    )
