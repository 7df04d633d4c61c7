"""One trial: training a proxy through the Trainer's own `hyperparameter_search`, in this process or a worker."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import optuna
from optuna.trial import FrozenTrial, TrialState
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_so2 import cli
from hf_so2.data import Corpus, DataArguments, load_corpus
from hf_so2.errors import TrainingDivergedError
from hf_so2.models import ModelArguments, build_model_and_config
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.training.trainer import SecondOrderTrainer
from hf_so2.transfer.space import Params, Space
from hf_so2.transfer.store import DIVERGED, PARAMS, SEED

TYPES = (ModelArguments, DataArguments, SecondOrderTrainingArguments)
"""The flags of a training run."""
STARTUP_TRIALS = 5  # drawn at random before Optuna's sampler models the loss
# What a trial is made to do whatever the flags say: judged at half time and at the end, nothing kept but its loss.
TRIAL_FLAGS: Mapping[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 0.5,
    "eval_delay": 0,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
    "prediction_loss_only": True,
    "dataloader_pin_memory": False,
}


@dataclass(frozen=True)
class TrialTask:
    """The next queued trial of one study.

    Args:
        flags: of the training run, by name; values of the right types.
        study: its name.
        url: of the Optuna storage.
        space: what is searched.
        sampler_seed: differs between the trials of a sweep.
    """

    flags: Mapping[str, Any]
    study: str
    url: str
    space: Space
    sampler_seed: int


def run_trial(task: TrialTask) -> None:
    """Runs the trial that is queued first; what came of it is in the study.

    Raises:
        ConfigurationError: the flags make no training run.
    """
    quieten()
    model_args, data_args, args = cli.build(TYPES, {**task.flags, **TRIAL_FLAGS})
    corpus = _corpus(json.dumps(vars(data_args)), model_args.model_name_or_path)

    def fresh_model() -> PreTrainedModel:
        model, _ = build_model_and_config(model_args, corpus.tokenizer, seed=args.seed, cache_dir=data_args.cache_dir)
        set_seed(args.seed)  # where a Trainer that was handed its model starts from
        return model

    trainer = _TrialTrainer(
        args=args,
        model_init=fresh_model,
        callbacks=[_StopOnNaN()],
        **corpus.for_trainer(),
    )
    trainer.remove_callback(PrinterCallback)
    storage = _storage(task.url)
    sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=task.sampler_seed)
    try:
        trainer.hyperparameter_search(
            hp_space=functools.partial(_suggest, task.space),
            compute_objective=_finite_loss,
            n_trials=1,
            direction="minimize",
            backend="optuna",
            study_name=task.study,
            storage=storage,
            load_if_exists=True,
            sampler=sampler,
            pruner=HopelessPruner(),
        )
    except ValueError:
        # The search ends by asking for the best trial, and there is none while all were stopped early.
        states = {trial.state for trial in optuna.load_study(study_name=task.study, storage=storage).trials}
        if TrialState.PRUNED not in states or TrialState.COMPLETE in states:
            raise


def quieten() -> None:
    """Leaves the terminal to the sweep's own lines; a worker process starts with the libraries' defaults."""
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class HopelessPruner(optuna.pruners.BasePruner):
    """Stops a trial at half time that could not catch up with the best one.

    It is hopeless when even twice what the best trial gained in its second half would leave it behind the best one's
    end. Rates that are higher than the best gain more in the second half, while the schedule decays: hence twice.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        if len(trial.intermediate_values) != 1:
            return False
        halves = []
        for other in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            reports = other.intermediate_values
            halves.append((reports[max(reports)], reports[min(reports)]))
        if not halves:
            return False
        end, half = min(halves)
        return next(iter(trial.intermediate_values.values())) - 2 * (half - end) > end


class _TrialTrainer(SecondOrderTrainer):
    """Gives each trial its seed and ends a diverged one as pruned."""

    def train(self, *args: Any, trial: optuna.Trial | None = None, **kwargs: Any) -> Any:
        assert trial is not None
        self.args.seed = trial.user_attrs[SEED]  # as a searched argument it would come after the model was made
        try:
            return super().train(*args, trial=trial, **kwargs)
        except TrainingDivergedError as error:
            trial.set_user_attr(DIVERGED, True)
            raise optuna.TrialPruned(str(error)) from None


class _StopOnNaN(TrainerCallback):
    """Ends a run whose training loss is no number: no later step would mend it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _require_finite((logs or {}).get("loss", 0.0))


def _finite_loss(metrics: Mapping[str, float]) -> float:
    return _require_finite(metrics["eval_loss"])


def _require_finite(loss: float) -> float:
    if not math.isfinite(float(loss)):
        raise TrainingDivergedError(f"the loss became {loss}")
    return loss


def _suggest(space: Space, trial: optuna.Trial) -> dict[str, Any]:
    """The values of the searched flags in a trial."""
    params: Params | None = trial.user_attrs[PARAMS]
    chosen: dict[str, Any] = {}
    for name in space.names:
        if params is not None and name not in space.ranges:
            chosen[name] = trial.suggest_float(name, params[name], params[name])
        else:
            chosen[name] = trial.suggest_float(name, *space.ranges[name], log=True)
    return chosen


_storage = functools.cache(optuna.storages.get_storage)  # connecting checks the tables' version every time


@functools.lru_cache(maxsize=4)
def _corpus(data: str, model_name_or_path: str | None) -> Corpus:
    """The corpus, loaded once per process."""
    return load_corpus(DataArguments(**json.loads(data)), model_name_or_path)
