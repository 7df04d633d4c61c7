"""The trials on disk: one Optuna study per optimizer and proxy, safe against being killed at any moment.

Every trial is queued before it runs, with all that defines it. Starting again compares what is wanted with what is
there and queues the difference, so no finished trial is repeated and a half-done one runs again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from hf_so2.errors import ConfigurationError
from hf_so2.transfer.space import Params
from hf_so2.transfer.trials import Outcome, Size, Trial

# Keys of a trial's and of a study's attributes.
PARAMS, SEED, DIVERGED, SETTINGS = "params", "seed", "diverged", "settings"

# What Optuna and SQLAlchemy answer to a data base that others have written to.
DAMAGE = (
    SQLAlchemyError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

Wanted = tuple[Params | None, int]
"""Params (None: to be sampled) and seed of a trial to run."""


class SweepStore:
    """The studies of one sweep, locked against a second sweep in the same folder.

    Args:
        folder: of the sweep; made when missing.
        url: of the Optuna storage; SQLite in the folder by default.

    Raises:
        ConfigurationError: another sweep is running there, or the storage cannot be opened.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.url = url or f"sqlite:///{(folder / 'sweep.db').resolve()}"
        storage = _opened(url) if url is not None else None  # a wrong address is refused before anything is made
        folder.mkdir(parents=True, exist_ok=True)
        # The system gives the lock back when its process dies, however it dies.
        self._lock = FileLock(folder / "sweep.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigurationError("output_dir", str(folder), "is in use by another sweep that is running") from None
        try:
            self._storage = storage or _opened(self.url)
        except ConfigurationError:
            self.close()
            raise
        self.studies: dict[tuple[str, Size], optuna.Study] = {}

    def open(self, optim: str, size: Size, settings: Mapping[str, Any]) -> None:
        """Opens or makes the study of an optimizer and size; trials that a killed sweep left running are given up.

        Args:
            optim: the optimizer's name.
            size: of the proxy.
            settings: what all its trials share, as JSON can hold it.

        Raises:
            ConfigurationError: the study was made with other settings.
        """
        with _sound(self.url):
            self.studies[optim, size] = self._open(study_name(optim, size), settings)

    def _open(self, name: str, settings: Mapping[str, Any]) -> optuna.Study:
        study = optuna.create_study(study_name=name, storage=self._storage, direction="minimize", load_if_exists=True)
        settings = json.loads(json.dumps(settings))
        known = study.user_attrs.get(SETTINGS)
        if known is None:
            study.set_user_attr(SETTINGS, settings)
        elif known != settings:
            name = next(key for key in sorted({**known, **settings}) if known.get(key) != settings.get(key))
            raise ConfigurationError(
                name,
                settings.get(name),
                f"differs from the {known.get(name)!r} of the sweep begun there; use another output_dir",
            )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        return study

    def queue(self, optim: str, size: Size, wanted: Iterable[Wanted]) -> None:
        """Queues those of the wanted trials that are neither finished nor queued; of given-up ones a new run."""
        with _sound(self.url):
            self._queue(self.studies[optim, size], wanted)

    def _queue(self, study: optuna.Study, wanted: Iterable[Wanted]) -> None:
        trials = study.get_trials(deepcopy=False)
        alive = [trial for trial in trials if trial.state != TrialState.FAIL]
        # A sampled trial that was given up runs again with the values that it had.
        again = [t.params for t in trials if t.state == TrialState.FAIL and t.user_attrs[PARAMS] is None and t.params]
        again = [params for params in again if params not in [_values(trial) for trial in alive]]
        for params, seed in missing(wanted, [(t.user_attrs[PARAMS], t.user_attrs[SEED]) for t in alive]):
            fixed = params if params is not None else again.pop(0) if again else {}
            study.enqueue_trial(fixed, user_attrs={PARAMS: params, SEED: seed})

    def waiting(self, optim: str, size: Size) -> int:
        """How many trials are queued."""
        with _sound(self.url):
            return len(self.studies[optim, size].get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def trials(self, optim: str, size: Size) -> list[Trial]:
        """The finished trials, in the order in which they were queued."""
        states = TrialState.COMPLETE, TrialState.PRUNED
        with _sound(self.url):
            finished = self.studies[optim, size].get_trials(deepcopy=False, states=states)
            return [_as_trial(optim, size, trial) for trial in finished]

    def close(self) -> None:
        """Lets another sweep in."""
        self._lock.release()


def _opened(url: str) -> optuna.storages.BaseStorage:
    try:
        return optuna.storages.get_storage(url)
    except (*DAMAGE, ImportError) as error:
        raise ConfigurationError("storage", url, f"cannot be opened as an Optuna storage: {_reason(error)}") from None


@contextmanager
def _sound(url: str) -> Iterator[None]:
    """Reading inside ends in one line where the data base holds what no sweep has written.

    Raises:
        ConfigurationError: it does.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except DAMAGE as error:
        allowed = f"holds a damaged sweep ({_reason(error)}); use another output_dir"
        raise ConfigurationError("storage", url, allowed) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def study_name(optim: str, size: Size) -> str:
    """The name of a study in the storage; without a depth as before there were any, so that those go on."""
    width, *depth = size if isinstance(size, tuple) else (size,)
    return "-".join([optim, f"width{width}", *(f"depth{layers}" for layers in depth)])


def missing(wanted: Iterable[Wanted], present: Iterable[Wanted]) -> list[Wanted]:
    """What of `wanted` is not in `present`, where both may hold the same entry several times."""
    spare = list(present)
    left: list[Wanted] = []
    for entry in wanted:
        if entry in spare:
            spare.remove(entry)
        else:
            left.append(entry)
    return left


def _values(trial: FrozenTrial) -> Params:
    """The searched flags' values of a trial, also of one that is only queued."""
    return trial.params or trial.system_attrs.get("fixed_params", {})


def _as_trial(optim: str, size: Size, trial: FrozenTrial) -> Trial:
    outcome: Outcome = "complete"
    if trial.state == TrialState.PRUNED:
        outcome = "diverged" if trial.user_attrs.get(DIVERGED) else "hopeless"
    loss = trial.value if outcome == "complete" and trial.value is not None else math.inf
    seconds = trial.duration.total_seconds() if trial.duration is not None else 0.0
    ended = trial.datetime_complete.timestamp() if trial.datetime_complete is not None else 0.0
    width, depth = size if isinstance(size, tuple) else (size, None)
    return Trial(optim, width, dict(trial.params), trial.user_attrs[SEED], loss, outcome, seconds, ended, depth)
