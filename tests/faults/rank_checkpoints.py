"""Checkpoints of two ranks, damaged: both ranks refuse them by the same words, and go on from the one before."""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from damage import OF_SEVERAL_RANKS, contents, damage, is_of_a_rank, twin
from plain_loop import flat
from shared.helpers import llama, optimizer_of, token_rows, trained
from two_ranks import start

import hf_so2
from hf_so2.training import checkpoints

PATIENCE = 60.0  # seconds that a rank waits for the other
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
GONE = "gone"  # all of it, on the disk of one rank


def train(output: Path, *, other: bool = False, resume: Any = None) -> hf_so2.SecondOrderTrainer:
    """Either rank writes its share of the curvature, and its random state."""
    given = {"per_device_train_batch_size": 4, "gradient_worker_fraction": 0.0, "ddp_backend": "gloo"}
    rows = token_rows(32, seed=int(other))
    rate = 0.02 if other else 0.01
    return trained(llama(num_hidden_layers=1), rows, output, resume=resume, learning_rate=rate, **given, **RUN)


def train_sharded(output: Path, *, other: bool = False, resume: Any = None) -> hf_so2.SecondOrderTrainer:
    """Under FSDP2 either rank writes its part of the model and of the optimizer, too."""
    from shared import sharded_trainer  # which changes how accelerate sees its processes

    given = {"optim": "kfac", "state_dict_type": "SHARDED_STATE_DICT", "gradient_worker_fraction": 0.0}
    rate = 0.03 if other else 0.02
    return sharded_trainer.train(output, 2, resume=resume, learning_rate=rate, **given, **RUN)


Train = Callable[..., hf_so2.SecondOrderTrainer]
WAYS: dict[str, Train] = {"DDP": train, "FSDP2": train_sharded}


def ends(trainer: hf_so2.SecondOrderTrainer) -> dict[str, Any]:
    wholes = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in trainer.model.named_parameters()}
    return flat({"model": wholes, **optimizer_of(trainer).curvature_state_dict()})


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^resume_from_checkpoint=") as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def harm(folder: Path, kind: str, chance: random.Random, other: Path) -> str:
    if kind == GONE:
        shutil.rmtree(folder)
        return "trainer_state.json"
    return damage(folder, kind, chance, other, is_of_a_rank)


def from_first(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def refuse_and_pass_over(whole: Path, other: Path, folder: Path, seed: int) -> tuple[str, Path]:
    """One damage: both ranks refuse it and name it, and `last` passes over it; what was done, and where."""
    rank, chance = dist.get_rank(), random.Random(seed)
    own_disks = chance.random() < 0.3  # every machine has a copy of its own, and one of them is damaged
    kind = chance.choice([*OF_SEVERAL_RANKS, *([GONE] if own_disks else [])])
    bad = chance.randrange(2) if own_disks else 0
    output = folder / (f"{seed}-{rank}" if own_disks else f"{seed}")
    name = ""
    if own_disks or rank == 0:
        shutil.copytree(whole, output)
    if rank == bad:
        name = harm(output / "checkpoint-4", kind, chance, other)
    names: list[str] = ["", ""]
    dist.all_gather_object(names, name)
    name = "".join(names)
    with pytest.MonkeyPatch.context() as patch:
        if own_disks:
            patch.setitem(os.environ, "LOCAL_RANK", "0")
            patch.setitem(os.environ, "LOCAL_WORLD_SIZE", "1")
        message = refusal(lambda: checkpoints.to_resume(output / "checkpoint-4", output))
        newest = checkpoints.to_resume("last", output)
    where = (seed, kind, name, message)
    assert name in message or (kind == "exchanged" and twin(name) in message), where
    assert newest == str(output / "checkpoint-2"), where
    said: list[str] = ["", ""]
    dist.all_gather_object(said, message.replace(str(output), ""))
    assert said[0] == said[1], where
    return (f"{kind}, on one of two disks" if own_disks else kind), output


def resume(way: Train, output: Path, end: dict[str, Any]) -> None:
    """In the damaged folder: refused with nothing changed, and then as the run that was never stopped."""
    before = {path: path.read_bytes() for path in contents(output)}
    dist.barrier()
    refusal(lambda: way(output, resume=str(output / "checkpoint-4")))
    dist.barrier()
    assert {path: path.read_bytes() for path in contents(output)} == before
    dist.barrier()
    resumed = ends(way(output, resume="last"))
    assert resumed.keys() == end.keys()
    odd = [key for key in end if not torch.equal(resumed[key], end[key])]
    assert not odd, (output, odd)


def damaged(rank: int, folder: Path, kind: str, count: int, resumed: int) -> None:
    """One rank of all damages, of which some are trained on from; what was done is left in a file."""
    start(rank, folder, PATIENCE)
    way = WAYS[kind]
    end = ends(way(folder / "whole"))
    way(folder / "other", other=True)
    outcomes: collections.Counter[str] = collections.Counter()
    trained_on = 0
    for seed in range(count):
        what, output = refuse_and_pass_over(folder / "whole", folder / "other" / "checkpoint-4", folder, seed)
        outcomes[what] += 1
        if trained_on < resumed and not what.endswith("disks"):
            trained_on += 1
            resume(way, output, end)
        dist.barrier()
        shutil.rmtree(output, ignore_errors=True)
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps([outcomes, trained_on]))
    dist.destroy_process_group()
