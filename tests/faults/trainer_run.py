"""Faults in runs of the Trainer, drawn from seeds: a fault at one step, and what has to be true after it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from plain_loop import CONTROLS, SIZES, Fault, differing, flat
from shared.helpers import arguments, llama, optimizer_of, token_rows
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from trainer_acts import FAULTS, OUT_OF_MEMORY
from transformers import TrainerCallback

import hf_so2

STEPS, AT = 5, 2
ROWS = 4  # of a step


@dataclass(frozen=True)
class Setup:
    """What is drawn beside the fault itself.

    Args:
        name: the optimizer's.
        settings: of `arguments`.
    """

    name: str
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def draw(cls, name: str, chance: random.Random) -> Setup:
        parts = chance.choice([1, 2])
        settings: dict[str, Any] = {
            "learning_rate": 1e-3,
            "max_grad_norm": chance.choice([0.0, 1.0]),
            "gradient_accumulation_steps": parts,
            "per_device_train_batch_size": ROWS // parts,
        }
        short = name.removesuffix("_mup")
        if short != name:
            settings["mup_base_width"] = 16
        if short not in ("adamw", "sgd"):
            settings["norm_control"] = chance.choice(("spectral", "none") if short == "muon" else CONTROLS)
        return cls(name, tuple(settings.items()))

    def rows(self) -> list[dict[str, Tensor]]:
        return token_rows(ROWS * STEPS, padded=True)


class InOrder(hf_so2.SecondOrderTrainer):
    """Every step has its rows, however many steps were left out before it."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trainer_of(setup: Setup, output: Path, rows: list[dict[str, Tensor]], **changes: Any) -> InOrder:
    """Of a tiny Llama; its collator counts the micro-batches that it has made in `made`."""
    collator = Collator()
    given = {"max_steps": STEPS, **dict(setup.settings), **changes}
    trainer = InOrder(
        model=llama(32, num_hidden_layers=1),
        args=arguments(output, optim=setup.name, **given),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.collator = collator
    return trainer


@dataclass
class Collator:
    """Micro-batches, of which those in `masked` have no label that counts."""

    masked: set[int] = field(default_factory=set)
    made: int = 0

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        if self.made in self.masked:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        self.made += 1
        return batch


def values(trainer: InOrder) -> dict[str, Any]:
    state = optimizer_of(trainer).state_dict()
    tree = {key: state[key] for key in ("state", "curvature") if key in state}
    return copy.deepcopy({"model": dict(trainer.model.state_dict()), **tree, **curvature_of(trainer)})


def curvature_of(trainer: InOrder) -> dict[str, Any]:
    return {"curvature": optimizer_of(trainer).curvature_state_dict()}


class At(TrainerCallback):
    """Acts from the beginning of one step to its end, or of its first micro-batch's; keeps what there was before."""

    def __init__(self, act: Callable[[nn.Module], list[Any]], trainer: InOrder, *, first_only: bool) -> None:
        self.act, self.trainer, self.first_only = act, trainer, first_only
        self.handles: list[Any] = []
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self.acted = self.was_made = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == AT and not self.acted:
            self.acted = True
            self.before = values(self.trainer)
            self.handles = self.act(self.trainer.model)

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        if self.first_only:
            self.remove()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()
        if state.global_step == AT + 1 and not self.after:
            self.after = values(self.trainer)
            self.was_made = optimizer_of(self.trainer).steps == AT + 1

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def run(name: str, fault: str, seed: int, output: Path) -> str:
    """Train with the fault at one step; what became of it. Raises AssertionError where a promise is broken."""
    chance = random.Random(f"{name} {fault} {seed}")
    setup = Setup.draw(name, chance)
    where = f"{setup} {fault} {seed}"
    draw, expected = FAULTS[fault]
    rows, parts = setup.rows(), dict(setup.settings)["gradient_accumulation_steps"]
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1} if expected == "raised" else {}
    trainer = trainer_of(setup, output, rows, **saves)
    first_only = chance.random() < 0.5
    if fault == "masked":
        trainer.collator.masked = {AT * parts + part for part in range(1 if first_only else parts)}
    callback = At(draw(chance), trainer, first_only=first_only)
    trainer.add_callback(callback)
    if expected == "raised":
        return _go_on(trainer, callback, setup, output, chance, where)
    trainer.train()
    return what_became(trainer, callback, setup, fault, rows, where)


def what_became(
    trainer: InOrder, callback: At, setup: Setup, fault: str, rows: list[dict[str, Tensor]], where: str
) -> str:
    """Of the step with the fault in a run that has gone on to its end; `rows` are those of all its steps."""
    callback.remove()
    _require_finite(values(trainer), where)
    if optimizer_of(trainer).steps == STEPS:
        return "made"
    if callback.was_made:
        # Steps as long as their gradients have taken weights out of sight: later ones have no finite gradient there.
        control = dict(setup.settings).get("norm_control")
        assert control not in ("spectral", "graft_adam"), where
        assert not setup.name.startswith("adamw"), where
        assert fault in SIZES, where
        return "made, later ones left out"
    assert FAULTS[fault][1] != "made", where
    assert optimizer_of(trainer).skipped_steps == 1, where
    assert not (odd := differing(callback.after, callback.before)), f"{where}: {odd}"
    of_a_step = len(rows) // STEPS
    without = rows[: AT * of_a_step] + rows[(AT + 1) * of_a_step :]
    straight = trainer_of(setup, Path("unused"), without, max_steps=STEPS - 1)
    straight.train()
    assert not (odd := differing(values(trainer), values(straight))), f"{where}: {odd}"
    return "left out"


def _go_on(trainer: InOrder, callback: At, setup: Setup, output: Path, chance: random.Random, where: str) -> str:
    met = ""
    try:
        trainer.train()
    except (Fault, KeyboardInterrupt) as error:
        met = str(error)
    assert met in ("", "made to fail"), where
    if not met:  # the optimizer has no such place, as SGD has none for AdamW
        callback.remove()
        assert not (odd := differing(values(trainer), straight_values(setup))), f"{where}: {odd}"
        return "never reached"
    callback.remove()
    if chance.random() < 0.5:  # in a new process there would be another one
        trainer = trainer_of(setup, output, setup.rows(), save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert not (odd := differing(values(trainer), straight_values(setup))), f"{where}: {odd}"
    return "gone on from"


@cache
def straight_values(setup: Setup) -> dict[str, Any]:
    trainer = trainer_of(setup, Path("unused"), setup.rows())
    trainer.train()
    return values(trainer)


def _require_finite(tree: dict[str, Any], where: str) -> None:
    odd = [key for key, value in flat(tree).items() if not torch.isfinite(value).all()]
    assert not odd, f"{where}: {odd}"


def run_out_of_memory(name: str, seed: int, output: Path) -> str:
    """Memory runs out once in the first step, and the Trainer starts anew with smaller batches by itself."""
    chance = random.Random(f"{name} memory {seed}")
    setup = Setup.draw(name, chance)
    setup = Setup(name, tuple((dict(setup.settings) | {"gradient_accumulation_steps": 1}).items()))
    rows, where = setup.rows(), f"{setup} memory {seed}"
    way = chance.choice(OUT_OF_MEMORY)
    trainer = trainer_of(setup, output, rows, auto_find_batch_size=True)
    fault = way(trainer.model)
    refused = ""
    try:
        trainer.train()
    except hf_so2.BrokenStepError as error:
        refused = str(error)
    fault.remove()
    assert bool(refused) == (way is OUT_OF_MEMORY[-1]), where
    if refused:
        assert "load a checkpoint" in refused, where
        return "refused"
    smaller = trainer._train_batch_size
    assert smaller < dict(setup.settings)["per_device_train_batch_size"], where
    straight = trainer_of(setup, output, rows, per_device_train_batch_size=smaller)
    straight.train()
    assert not (odd := differing(values(trainer), values(straight))), f"{where}: {odd}"
    return "made with smaller batches"
