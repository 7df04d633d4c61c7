"""Finished trials and plain statistics of them. Pure: no Optuna, no Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["complete", "hopeless", "diverged"]


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
    """

    optim: str
    width: int
    params: Mapping[str, float] = field(hash=False)
    seed: int
    loss: float
    outcome: Outcome = "complete"
    seconds: float = 0.0


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
    """Trials of one optimizer and width, put together by their params, in order of appearance."""
    losses: dict[tuple[tuple[str, float], ...], list[float]] = {}
    for trial in trials:
        losses.setdefault(tuple(sorted(trial.params.items())), []).append(trial.loss)
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


def seed_noise(trials: Iterable[Trial]) -> float | None:
    """Standard deviation of the loss between seeds, pooled over all repeated settings; None without repetitions."""
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.optim, trial.width), []).append(trial)
    squares, freedom = 0.0, 0
    for group in groups.values():
        for setting in settings_of(group):
            if math.isfinite(setting.mean):
                squares += sum((loss - setting.mean) ** 2 for loss in setting.losses)
                freedom += len(setting.losses) - 1
    return math.sqrt(squares / freedom) if freedom else None


def profile(trials: Iterable[Trial], name: str, *, per_octave: int | None = None) -> dict[float, float]:
    """Mean loss of the best setting at every value of one flag, whatever the others were; ascending values.

    Args:
        trials: of one optimizer and width.
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
