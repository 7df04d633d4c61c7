"""Finished trials and plain statistics of them. Pure: no Optuna, no Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Outcome = Literal["complete", "hopeless", "diverged"]
Size = int | tuple[int, int]
"""Of a proxy: its width, or width and depth."""


@dataclass(frozen=True)
class Trial:
    """One finished training run.

    Args:
        optim: the optimizer's name.
        width: hidden size.
        params: the searched flags' values.
        seed: of the run.
        loss: validation loss at the end, nats per token; infinite where the run was stopped early.
        outcome: how it ended.
        seconds: how long it took.
        ended: when, in seconds of the epoch.
        depth: number of layers; None where depths were not asked for.
    """

    optim: str
    width: int
    params: Mapping[str, float] = field(hash=False)
    seed: int
    loss: float
    outcome: Outcome = "complete"
    seconds: float = 0.0
    ended: float = 0.0
    depth: int | None = None


@dataclass(frozen=True)
class Setting:
    """Values of the searched flags with the losses of their runs, one per seed."""

    params: Mapping[str, float]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean loss over the seeds; infinite where one of them did not finish."""
        return sum(self.losses) / len(self.losses)


def settings_of(trials: Iterable[Trial]) -> list[Setting]:
    """Trials of one optimizer and proxy, put together by their params, in order of appearance."""
    losses: dict[tuple[tuple[str, float], ...], list[float]] = {}
    for trial in trials:
        losses.setdefault(_key(trial), []).append(trial.loss)
    return [Setting(dict(key), tuple(values)) for key, values in losses.items()]


def finalists(trials: Iterable[Trial], count: int) -> list[Setting]:
    """The `count` settings of least loss in the first seed's runs, which every setting has."""
    trials = list(trials)
    first = trials[0].seed if trials else 0
    finished = [setting for setting in settings_of(t for t in trials if t.seed == first) if math.isfinite(setting.mean)]
    return sorted(finished, key=lambda setting: setting.mean)[:count]


def best_setting(trials: Iterable[Trial]) -> Setting | None:
    """The setting of least mean loss among those with the most seeds; None when nothing finished.

    A setting with one seed must not win by luck over finalists that were repeated.
    """
    settings = [setting for setting in settings_of(trials) if math.isfinite(setting.mean)]
    most = max((len(setting.losses) for setting in settings), default=0)
    return min((s for s in settings if len(s.losses) == most), key=lambda s: s.mean, default=None)


def without_seed_effects(trials: Iterable[Trial]) -> list[Trial]:
    """Trials of one optimizer and proxy with later seeds' losses moved to the level of the first seed.

    A seed makes the loss of every setting better or worse alike, and only the best settings have several: means over
    unequal numbers of seeds would bend the curve. The shift is the mean difference over the settings that have both.
    """
    trials = list(trials)
    first = {_key(trial): trial.loss for trial in reversed(trials) if trials and trial.seed == trials[0].seed}
    differences: dict[int, list[float]] = {}
    for trial in trials:
        difference = trial.loss - first.get(_key(trial), math.inf)
        if math.isfinite(difference):
            differences.setdefault(trial.seed, []).append(difference)
    shifts = {seed: sum(values) / len(values) for seed, values in differences.items()}
    return [replace(trial, loss=trial.loss - shifts.get(trial.seed, 0.0)) for trial in trials]


def seed_noise(trials: Iterable[Trial]) -> float | None:
    """Standard deviation of a loss that a seed's common effect does not explain, pooled over proxies.

    None without repetitions of at least two settings.
    """
    squares, freedom = seed_squares(trials)
    return math.sqrt(squares / freedom) if freedom else None


def seed_squares(trials: Iterable[Trial]) -> tuple[float, int]:
    """Sum of squares behind :func:`seed_noise` and its degrees of freedom."""
    groups: dict[tuple[str, int, int | None], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.optim, trial.width, trial.depth), []).append(trial)
    squares, freedom = 0.0, 0
    for group in groups.values():
        level = [setting for setting in settings_of(without_seed_effects(group)) if math.isfinite(setting.mean)]
        most = max((len(setting.losses) for setting in level), default=0)
        repeated = [setting for setting in level if len(setting.losses) == most]
        squares += sum((loss - setting.mean) ** 2 for setting in repeated for loss in setting.losses)
        freedom += (len(repeated) - 1) * (most - 1) if repeated else 0
    return squares, freedom


def _key(trial: Trial) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(trial.params.items()))


def profile(trials: Iterable[Trial], name: str, *, per_octave: int | None = None) -> dict[float, float]:
    """Mean loss of the best setting at every value of one flag, whatever the others were; ascending values.

    Args:
        trials: of one optimizer and proxy.
        name: the flag.
        per_octave: for sampled values: keep the best of each such part of an octave.
    """
    best: dict[float, tuple[float, float]] = {}
    for setting in settings_of(trials):
        value = setting.params[name]
        key = round(math.log2(value) * per_octave) if per_octave and value > 0 else value
        if key not in best or setting.mean < best[key][1]:
            best[key] = value, setting.mean
    return dict(sorted(best.values()))
