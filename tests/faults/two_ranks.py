"""Two ranks in a plain loop, of which one goes wrong; each of them looks at what is left."""

from __future__ import annotations

import datetime
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_loop import AT, HUGE, STEPS, Fault, Loop, differing, failing_routines, not_finite, settings_of
from shared.helpers import VOCABULARY, llama
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from trainer_acts import Before, module_of

import hf_so2

LIMIT = 5.0  # seconds that a rank waits for the other one
LATE = 0.3


class SharedLoop(Loop):
    """Either rank has rows of its own."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.model = llama(32, num_hidden_layers=1)
        base = {"base_config": llama(16, num_hidden_layers=1).config} if name.endswith("_mup") else {}
        self.optimizer = hf_so2.build_optimizer(name, self.model, **settings, **base)
        self.wrapped = DistributedDataParallel(self.model, find_unused_parameters=True)
        self.masked = False

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        tokens = torch.randint(1, VOCABULARY, (4, 10), generator=generator)
        labels = torch.full_like(tokens, -100) if self.masked else tokens.roll(1)
        logits = self.wrapped(tokens).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def settings_on_ranks(name: str, chance: random.Random) -> dict[str, Any]:
    settings = settings_of(name, chance)
    if name.removesuffix("_mup") not in ("adamw", "sgd"):
        settings["gradient_worker_fraction"] = chance.choice([0.0, 1.0])
    return settings


def _gradient(loop: SharedLoop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    """Before it is averaged over ranks."""
    bad = chance.choice(HUGE)

    def change(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1)[0] = bad
        return changed

    handle = chance.choice(list(loop.model.parameters())).register_hook(change)
    loop.step(AT)
    handle.remove()


def _activation(loop: SharedLoop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    module, bad = module_of(loop.model, chance.random()), chance.choice(HUGE)
    handle = module.register_forward_hook(lambda _, __, output: output * bad)
    loop.step(AT)
    handle.remove()


def _loss(loop: SharedLoop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    loop.backward(AT, chance.choice([*HUGE, 0.0, 1e-38, 1e-30, 1e15, 1e30]))
    loop.optimizer.step()


def _idle(loop: SharedLoop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    mlp = loop.model.model.layers[0].mlp
    forward, mlp.forward = mlp.forward, torch.zeros_like
    loop.step(AT)
    mlp.forward = forward


def _masked(loop: SharedLoop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    loop.masked = True
    loop.step(AT)
    loop.masked = False


def _lapack(loop: SharedLoop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    failing_routines(patch, chance, torch.linalg.LinAlgError)
    loop.step(AT)
    patch.undo()


def _late(loop: SharedLoop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    fault = chance.choice(PLACES)(loop.model, lambda *_: time.sleep(LATE))
    loop.step(AT)
    fault.remove()


Add = Callable[[nn.Module, Callable[..., None]], Any]


def among_updates(model: nn.Module, act: Callable[..., None]) -> Before:
    return Before("hf_so2.optim.optimizer.second_order_updates", act)


# In forward, in backward, and in three places of a step: before it, when statistics are there, among its updates.
PLACES: list[Add] = [
    lambda model, act: model.model.layers[0].mlp.register_forward_hook(act),
    lambda model, act: model.model.layers[0].mlp.register_full_backward_hook(act),
    lambda model, act: Before("hf_so2.optim.optimizer.are_in_range", act),
    among_updates,
    lambda model, act: Before("hf_so2.optim.optimizer.first_order_step", act),
]

# As in `plain_loop`; `same` is the run without the fault, whole.
FAULTS: dict[str, tuple[Callable[[SharedLoop, random.Random, pytest.MonkeyPatch], None], str]] = {
    "gradient": (_gradient, "either"),
    "activation": (_activation, "either"),
    "loss": (_loss, "either"),
    "idle": (_idle, "made"),
    "masked": (_masked, "either"),
    "lapack": (_lapack, "made"),
    "late": (_late, "same"),
}


def go_wrong(name: str, fault: str, seed: int) -> str:
    """Train with the fault on one rank at one step; what became of that step."""
    chance = random.Random(f"{name} {fault} {seed}")
    settings, rank = settings_on_ranks(name, chance), chance.randrange(2)
    act, expected = FAULTS[fault]
    loop, where = SharedLoop(name, settings), f"{name} {settings} {fault} {seed} on {rank}"
    for step in range(AT):
        loop.step(step)
    before = loop.values()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            act(loop, chance, patch)
        else:
            loop.step(AT)
    was_made = loop.optimizer.steps == AT + 1
    if not was_made:
        assert expected == "either", where
        assert not (odd := differing(loop.values(), before)), f"{where}: {odd}"
    for step in range(AT + 1, STEPS):
        loop.step(step)
    assert not (odd := not_finite(loop)), f"{where}: {odd}"
    require_equal_ranks(loop, where)
    if not was_made or expected == "same":
        straight = straight_to(name, settings, STEPS, without=None if was_made else AT)
        assert not (odd := differing(loop.values(), straight.values())), f"{where}: {odd}"
    return "made" if was_made else "left out"


def straight_to(name: str, settings: dict[str, Any], steps: int, *, without: int | None) -> SharedLoop:
    straight = SharedLoop(name, settings)
    for step in (step for step in range(steps) if step != without):
        straight.step(step)
    return straight


def require_equal_ranks(loop: SharedLoop, where: str) -> None:
    state = loop.optimizer.state_dict()["state"]
    found: list[Any] = [None, None]
    dist.all_gather_object(found, {"model": dict(loop.model.state_dict()), "state": state})
    assert not (odd := differing(*found)), f"{where}: ranks differ in {odd}"


def start(rank: int, folder: Path, limit: float) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=limit))


def many(rank: int, folder: Path, faults: list[tuple[str, str, int]]) -> None:
    """One rank of all of them; what became of them is left in a file."""
    start(rank, folder, 120.0)
    outcomes = [(fault, go_wrong(name, fault, seed)) for name, fault, seed in faults]
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


def raises(*_: Any) -> None:
    raise Fault("made to fail")


def dies(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stalls(*_: Any) -> None:
    time.sleep(600.0)


LEAVES = {"raises": raises, "dies": dies, "stalls": stalls}


def left_alone(rank: int, folder: Path, name: str, fault: str, seed: int) -> None:
    """The other rank goes at one step; what this one meets is left in a file."""
    chance = random.Random(f"{name} {fault} {seed}")
    settings, bad = settings_on_ranks(name, chance), chance.randrange(2)
    is_first_order = name.removesuffix("_mup") in ("adamw", "sgd")
    place = chance.choice([place for place in PLACES if not (is_first_order and place is among_updates)])
    start(rank, folder, LIMIT)
    loop = SharedLoop(name, settings)
    after = [loop.values()["model"]]  # by the number of steps that were made
    reference = SharedLoop(name, settings)
    for step in range(STEPS):
        reference.step(step)
        after.append(reference.values()["model"])
    if rank == bad:
        for step in range(AT):
            loop.step(step)
        place(loop.model, LEAVES[fault])
    met: dict[str, Any] = {}
    begun = time.monotonic()
    try:
        for step in range(loop.optimizer.steps, STEPS):
            begun = time.monotonic()
            loop.step(step)
    except Exception as error:
        if rank == bad:
            raise
        notes = getattr(error, "__notes__", [])
        met = {"kind": type(error).__name__, "message": str(error), "notes": notes}
    met |= {"seconds": time.monotonic() - begun, "steps": loop.optimizer.steps}
    # A state is put together by all ranks, which are not there any more.
    met["refuses"] = loop.optimizer._whole.broken_at is not None
    met["differ"] = differing(dict(loop.model.state_dict()), after[loop.optimizer.steps])
    (folder / f"{rank}.json").write_text(json.dumps(met))
    os._exit(0)  # nobody is there to say goodbye to
