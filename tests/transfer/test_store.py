"""The trials on disk: nothing lost, nothing repeated, one sweep at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from hf_so2.errors import ConfigurationError
from hf_so2.transfer.store import DIVERGED, SweepStore, Wanted, missing

GRID: list[Wanted] = [({"learning_rate": value}, 0) for value in (0.1, 0.2, 0.4)]


@pytest.fixture
def store(tmp_path: Path) -> SweepStore:
    store = SweepStore(tmp_path)
    store.open("kfac", 64, {"max_steps": 3})
    return store


def start(store: SweepStore) -> optuna.Trial:
    """What a worker does first."""
    trial = store.studies["kfac", 64].ask()
    params = trial.user_attrs["params"]
    value = params["learning_rate"] if params else 0.3
    trial.suggest_float("learning_rate", *((value, value) if params else (0.1, 1.0)))
    return trial


def reopened(store: SweepStore, folder: Path) -> SweepStore:
    store.close()
    store = SweepStore(folder)
    store.open("kfac", 64, {"max_steps": 3})
    return store


def test_only_what_is_missing_is_queued_again(store: SweepStore, tmp_path: Path) -> None:
    store.queue("kfac", 64, GRID)
    store.queue("kfac", 64, GRID)
    assert store.waiting("kfac", 64) == 3
    store.studies["kfac", 64].tell(start(store), 3.0)
    killed = start(store)
    store = reopened(store, tmp_path)
    assert store.studies["kfac", 64].trials[killed.number].state == TrialState.FAIL
    store.queue("kfac", 64, GRID)
    assert store.waiting("kfac", 64) == 2
    while store.waiting("kfac", 64):
        store.studies["kfac", 64].tell(start(store), 4.0)
    finished = [trial.params["learning_rate"] for trial in store.trials("kfac", 64)]
    assert sorted(finished) == [0.1, 0.2, 0.4]
    assert store.trials("kfac", 64)[0].loss == 3.0


def test_a_sampled_trial_that_was_killed_runs_again_with_its_values(store: SweepStore, tmp_path: Path) -> None:
    wanted: list[Wanted] = [(None, 0)] * 3
    store.queue("kfac", 64, wanted)
    killed = start(store).params
    store = reopened(store, tmp_path)
    store.queue("kfac", 64, wanted)
    assert store.waiting("kfac", 64) == 3
    again = []
    while store.waiting("kfac", 64):
        trial = start(store)
        again.append(trial.params)
        store.studies["kfac", 64].tell(trial, 1.0)
    assert killed in again
    store = reopened(store, tmp_path)
    store.queue("kfac", 64, wanted)
    assert store.waiting("kfac", 64) == 0


def test_stopped_trials_are_told_apart(store: SweepStore) -> None:
    store.queue("kfac", 64, GRID)
    for diverged in (True, False):
        trial = start(store)
        trial.set_user_attr(DIVERGED, diverged)
        store.studies["kfac", 64].tell(trial, state=TrialState.PRUNED)
    assert [trial.outcome for trial in store.trials("kfac", 64)] == ["diverged", "hopeless"]
    assert {trial.loss for trial in store.trials("kfac", 64)} == {float("inf")}


def test_other_settings_and_a_second_sweep_are_refused(store: SweepStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_steps=4: differs from the 3"):
        store.open("kfac", 64, {"max_steps": 4})
    with pytest.raises(ConfigurationError, match="is in use by another sweep"):
        SweepStore(tmp_path)


entries = st.lists(st.tuples(st.one_of(st.none(), st.just({"a": 1.0}), st.just({"a": 2.0})), st.integers(0, 1)))


@given(entries, entries)
def test_missing_is_the_difference_of_multisets(wanted: list[Wanted], present: list[Wanted]) -> None:
    def counted(items: list[Wanted]) -> Counter[str]:
        return Counter(map(str, items))

    assert counted(missing(wanted, present)) == counted(wanted) - counted(present)


def test_a_storage_that_cannot_be_opened_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^storage='nonsense': cannot be opened"):
        SweepStore(tmp_path / "sweep", "nonsense")
    assert not list(tmp_path.iterdir())
    (tmp_path / "sweep.db").write_text("no database" * 100)
    with pytest.raises(ConfigurationError, match=r"^storage='sqlite:.*not a database"):
        SweepStore(tmp_path)
