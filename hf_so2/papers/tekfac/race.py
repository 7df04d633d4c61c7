"""Losses of SGD, Adam, K-FAC, EKFAC, TKFAC and TEKFAC on an MLP and on a small ViT, all tuned alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_so2 import optim
from hf_so2.papers.data import digits
from hf_so2.papers.models import mlp, vit
from hf_so2.papers.races import Contest, Race
from hf_so2.papers.training import FALLBACK, INTERVALS, TRIALS, Ranges, Run, optimizer_step, train
from hf_so2.papers.verdict import Claim

RATES = {"learning_rate": (1e-3, 1.0)}
DAMPED: Ranges = {**RATES, "damping": (1e-5, 1.0)}
# Two hyperparameters each: the rate, and what smooths the method.
CONTESTANTS: Mapping[str, tuple[str, Ranges]] = {
    "SGD with momentum": ("sgd", {"learning_rate": (1e-2, 10.0), "momentum_left": (0.03, 0.5)}),
    "Adam": ("adamw", {"learning_rate": (1e-4, 0.1), "adam_epsilon": (1e-10, 1e-2)}),
    "K-FAC": ("kfac", DAMPED),
    "EKFAC": ("ekfac", DAMPED),
    "TKFAC": ("tkfac", DAMPED),
    "TEKFAC": ("tekfac", DAMPED),
}
FIRST_ORDER = ("SGD with momentum", "Adam")


@dataclass(frozen=True)
class Ground:
    """Where a race is held.

    Args:
        name: of the network in claims and figures.
        model: of a seed.
        described: its sizes.
        steps: of every method.
        batch: images in a step.
        longer: as many times the steps of a first-order method take about as long as TEKFAC's.
        in_time: first-order methods that are given so many, tuned once more.
        warmup: steps in which rates rise.
        seeds: how many fresh ones.
        tuning_seeds: of the trials.
    """

    name: str
    model: Callable[[int], nn.Module]
    described: str
    steps: int
    batch: int
    longer: int
    seeds: int
    tuning_seeds: tuple[int, ...] = (100, 101)
    in_time: tuple[str, ...] = FIRST_ORDER
    warmup: int = 0

    @property
    def run_text(self) -> str:
        """What was run, for the table."""
        warm = f" of which {self.warmup} warm up" if self.warmup else ""
        return (
            f"{self.described}, batch {self.batch}, {self.steps} steps{warm}, each method tuned by {TRIALS} trials of"
            f" two hyperparameters, Fisher of drawn labels; {self.seeds} fresh seeds"
        )

    @property
    def longer_names(self) -> dict[str, str]:
        """First-order methods with more steps, tuned once more: what they are called, and which they are."""
        return {f"{name}, {self.longer} x the steps": name for name in self.in_time}

    def contest(self) -> Contest:
        """Of all methods."""
        ranges = {
            name: CONTESTANTS[self.longer_names.get(name, name)][1] for name in (*CONTESTANTS, *self.longer_names)
        }
        return Contest(ranges, functools.partial(contestant, self), range(self.seeds), self.tuning_seeds)


GROUNDS = (
    Ground("MLP", lambda seed: mlp(64, 4, seed), "MLP 64-64-64-64-10", 80, 128, 6, seeds=10),
    Ground("ViT", lambda seed: vit(32, 2, seed), "ViT of width 32, 2 layers, 16 patches", 60, 64, 3, seeds=5,
           tuning_seeds=(100,), in_time=("Adam",), warmup=10),
)  # fmt: skip


def contestant(ground: Ground, name: str, values: Mapping[str, float], seed: int) -> Run:
    """One run of a method."""
    optimizer_name, _ = CONTESTANTS[ground.longer_names.get(name, name)]
    steps = ground.steps * (ground.longer if name in ground.longer_names else 1)
    model = ground.model(seed)
    settings: dict[str, Any] = dict(values)
    if "momentum_left" in settings:  # a logarithmic range of what momentum lacks to 1
        settings["momentum"] = 1 - settings.pop("momentum_left")
    if "damping" in settings:
        settings |= {"norm_control": "none", "fisher": "mc", **FALLBACK, **INTERVALS}
    step = optimizer_step(optim.build_optimizer(optimizer_name, model, **settings), ground.warmup)
    return train(model, step, digits(), steps=steps, batch=ground.batch, seed=seed, looks=range(0, steps, 10))


def claims_of(ground: Ground, race: Race) -> tuple[Claim, ...]:
    """What is said of training, on one network."""
    run, on = ground.run_text, f", {ground.name}"
    key, others = ground.name.lower(), " and ".join(ground.in_time)

    def in_time(name: str) -> Any:
        longer = next(entry for entry, value in ground.longer_names.items() if value == name)
        return race.loss_in_time("TEKFAC", longer, until="TEKFAC", named=name, below=0.0)

    return (
        Claim(f"ekfac-per-step-{key}", "1806.03884", "", f"EKFAC has a lower loss than K-FAC after the same number of"
              f" steps{on}", run, (race.loss_over("EKFAC", "K-FAC", below=0.0),)),
        Claim(f"tkfac-per-step-{key}", "2011.10741", "", f"TKFAC has a lower loss than K-FAC after the same number of"
              f" steps{on}", run, (race.loss_over("TKFAC", "K-FAC", below=0.0),)),
        Claim(f"tekfac-first-order-{key}", "2011.13609", "abstract", "TEKFAC has a lower loss than SGD with momentum"
              f" and Adam after the same number of steps{on}", run,
              tuple(race.loss_over("TEKFAC", name, below=0.0) for name in FIRST_ORDER)),
        Claim(f"tekfac-siblings-{key}", "2011.13609", "abstract", "TEKFAC has a lower loss than EKFAC and TKFAC after"
              f" the same number of steps{on}", run,
              tuple(race.loss_over("TEKFAC", name, below=0.0) for name in ("EKFAC", "TKFAC"))),
        Claim(f"tekfac-in-time-{key}", "2011.13609", "", f"TEKFAC has a lower loss than {others} after the same"
              f" time{on}", f"{run}; {others} tuned once more, for {ground.longer} times the steps",
              tuple(in_time(name) for name in ground.in_time)),
    )  # fmt: skip
