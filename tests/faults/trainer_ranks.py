"""Two ranks under the Trainer, of which one goes wrong, and what both of them say of damaged checkpoints."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plain_loop import differing
from shared.helpers import token_rows
from torch import nn
from trainer_acts import FAULTS, Before
from trainer_run import AT, ROWS, STEPS, At, InOrder, Setup, trainer_of, values, what_became
from transformers import TrainerCallback
from two_ranks import LATE, LEAVES, LIMIT, PLACES, among_updates, start

from hf_so2 import SecondOrderTrainer

PATIENCE = 60.0  # seconds that a rank waits for the other where both go on


def on_two_ranks(name: str, chance: random.Random) -> Setup:
    setup = Setup.draw(name, chance)
    settings = {**dict(setup.settings), "ddp_backend": "gloo", "ddp_find_unused_parameters": True}
    if name.removesuffix("_mup") not in ("adamw", "sgd"):
        settings["gradient_worker_fraction"] = chance.choice([0.0, 1.0])
    return Setup(name, tuple(settings.items()))


def rows_of_both() -> list[dict[str, torch.Tensor]]:
    return token_rows(2 * ROWS * STEPS, padded=True)


# What one rank meets and both go on from; `late` changes nothing.
BOTH_GO_ON = [*(fault for fault, (_, expected) in FAULTS.items() if expected != "raised"), "late"]


def _late(chance: random.Random) -> Callable[[nn.Module], list[Any]]:
    place = chance.choice(PLACES)
    return lambda model: [place(model, lambda *_: time.sleep(LATE))]


def go_wrong(name: str, fault: str, seed: int) -> str:
    """Train with the fault on one rank at one step; what became of that step."""
    chance = random.Random(f"{name} {fault} {seed}")
    setup, bad = on_two_ranks(name, chance), chance.randrange(2)
    act = _late(chance) if fault == "late" else FAULTS[fault][0](chance)
    where, first_only = f"{setup} {fault} {seed} on {bad}", chance.random() < 0.5
    is_bad = dist.get_rank() == bad
    rows = rows_of_both()
    trainer = trainer_of(setup, Path("unused"), rows)
    parts = dict(setup.settings)["gradient_accumulation_steps"]
    if fault == "masked" and is_bad:
        trainer.collator.masked = {AT * parts + part for part in range(1 if first_only else parts)}
    callback = At(act if is_bad else lambda model: [], trainer, first_only=first_only)
    trainer.add_callback(callback)
    trainer.train()
    callback.remove()
    require_equal_ranks(trainer, where)
    if fault == "late":
        assert not (odd := differing(values(trainer), straight_values(setup))), f"{where}: {odd}"
        return "made"
    return what_became(trainer, callback, setup, fault, rows, where)


def require_equal_ranks(trainer: InOrder, where: str) -> None:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, values(trainer))
    assert not (odd := differing(*found)), f"{where}: ranks differ in {odd}"


@cache
def straight_values(setup: Setup) -> dict[str, Any]:
    trainer = trainer_of(setup, Path("unused"), rows_of_both())
    trainer.train()
    return values(trainer)


def many(rank: int, folder: Path, faults: list[tuple[str, str, int]]) -> None:
    """One rank of all of them; what became of them is left in a file."""
    start(rank, folder, PATIENCE)
    outcomes = [(fault, go_wrong(name, fault, seed)) for name, fault, seed in faults]
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


class Leaving(TrainerCallback):
    """One rank goes at one step, in a drawn place of it or of the save behind it."""

    def __init__(self, trainer: InOrder, act: Callable[..., None], chance: random.Random, *, first_order: bool) -> None:
        self.trainer, self.act = trainer, act
        places = [place for place in PLACES if not (first_order and place is among_updates)]
        self.place = chance.choice([*places, *SAVES])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == AT:
            self.place(self.trainer.model, self.act)


def _in_a_save(method: str) -> Callable[[nn.Module, Callable[..., None]], None]:
    def place(model: nn.Module, act: Callable[..., None]) -> None:
        setattr(SecondOrderTrainer, method, act)

    return place


# Before anything of a save is written, before this rank's share of it, and before the manifest.
SAVES = [
    _in_a_save("_save_checkpoint"),
    _in_a_save("_save_optimizer_and_scheduler"),
    _in_a_save("_save_rng_state"),
    lambda model, act: Before("hf_so2.training.checkpoints.write_part", act),
]


def left_alone(rank: int, folder: Path, output: Path, name: str, fault: str, seed: int) -> None:
    """One rank goes; what the other meets, if anything, is left in a file."""
    chance = random.Random(f"{name} {fault} {seed}")
    setup, bad = on_two_ranks(name, chance), chance.randrange(2)
    start(rank, folder, LIMIT)
    trainer = trainer_of(setup, output, rows_of_both(), **SAVING)
    first_order = name.removesuffix("_mup") in ("adamw", "sgd")
    if rank == bad:
        trainer.add_callback(Leaving(trainer, LEAVES[fault], chance, first_order=first_order))
    met: dict[str, Any] = {"message": ""}
    begun = time.monotonic()
    try:
        trainer.train()
    except Exception as error:
        if rank == bad:
            raise
        met = {"message": str(error), "notes": getattr(error, "__notes__", [])}
    met["seconds"] = time.monotonic() - begun
    (folder / f"{rank}.json").write_text(json.dumps(met))
    os._exit(0)  # nobody is there to say goodbye to


def go_on(rank: int, folder: Path, output: Path, name: str, fault: str, seed: int) -> None:
    """Both ranks are started anew: they end as if nothing had been."""
    chance = random.Random(f"{name} {fault} {seed}")
    setup = on_two_ranks(name, chance)
    start(rank, folder, PATIENCE)
    trainer = trainer_of(setup, output, rows_of_both(), **SAVING)
    trainer.train(resume_from_checkpoint=True)
    where = f"{setup} {fault} {seed}"
    require_equal_ranks(trainer, where)
    assert not (odd := differing(values(trainer), straight_values(setup))), f"{where}: {odd}"
    (folder / f"{rank}.json").write_text(json.dumps("gone on from"))
    while not (folder / f"{1 - rank}.json").is_file():
        time.sleep(0.02)
    os._exit(0)  # taking a process group down may wait for one that is gone
