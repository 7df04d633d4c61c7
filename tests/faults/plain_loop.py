"""Faults in a plain loop, drawn from seeds: a fault at one step, and what has to be true after it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_so2

STEPS, AT = 6, 3
BATCH = 12
HUGE = (3e19, 1e25, 1e36, float("nan"), float("inf"), -float("inf"))
CONTROLS = ("none", "kl_clip", "graft_adam", "graft_sgd", "spectral")

# Every routine of LAPACK's that the package calls.
ROUTINES = [
    *((torch.linalg, name) for name in ("eigh", "eigvalsh", "qr", "cholesky_ex", "solve_triangular")),
    *((torch.linalg, "householder_product"), (torch, "geqrf"), (torch, "cholesky_inverse")),
]


class Gated(nn.Module):
    """An embedding, two branches of which one can idle, a norm and a head: a parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.head = nn.Linear(8, 11)
        self.idle = False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        out = torch.tanh(self.left(hidden))
        return self.head(out if self.idle else out + self.right(hidden))


class Loop:
    """A model with its optimizer, and the same batch for the same step."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.model = Gated()
        base = {"base_config": None} if name.endswith("_mup") else {}
        self.optimizer = hf_so2.build_optimizer(name, self.model, **settings, **base)

    def loss(self, step: int) -> Tensor:
        tokens = torch.randint(0, 11, (BATCH,), generator=torch.Generator().manual_seed(step))
        return nn.functional.cross_entropy(self.model(tokens), tokens.roll(1))

    def backward(self, step: int, scale: float = 1.0) -> None:
        self.optimizer.zero_grad()
        (self.loss(step) * scale).backward()

    def step(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()

    def values(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        tree = {key: state[key] for key in ("state", "curvature")}
        return copy.deepcopy({"model": dict(self.model.state_dict()), **tree})


def flat(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Numbers and tensors by path, without the counts of what was skipped."""
    if isinstance(tree, dict):
        items = [(key, value) for key, value in tree.items() if key not in ("skipped_steps", "in_a_row")]
        return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}
    return {} if tree is None else {path: torch.as_tensor(tree)}


def differing(first: Any, second: Any) -> list[str]:
    a, b = flat(first), flat(second)
    return [f"only in one: {key}" for key in a.keys() ^ b.keys()] + [
        key for key in a.keys() & b.keys() if not torch.equal(a[key], b[key])
    ]


def not_finite(loop: Loop) -> list[str]:
    return [key for key, value in flat(loop.values()).items() if not torch.isfinite(value).all()]


class Fault(Exception):  # noqa: N818  # what a user's own code raises
    pass


def _gradient(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    """One entry of one gradient is no number, or finite and huge."""
    loop.backward(AT)
    parameters = [p for p in loop.model.parameters() if p.grad is not None]
    chance.choice(parameters).grad.view(-1)[0] = chance.choice(HUGE)
    loop.optimizer.step()


def _activation(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    module, bad = chance.choice([loop.model.left, loop.model.embedding, loop.model.head]), chance.choice(HUGE)
    handle = module.register_forward_hook(lambda _, __, output: output * bad)
    loop.step(AT)
    handle.remove()


def _loss(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    loop.backward(AT, chance.choice(HUGE))
    loop.optimizer.step()


def _scale(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    loop.backward(AT, 10.0 ** chance.choice([-45, -38, -30, -20, 10, 15, 18, 20, 30, 38]))
    loop.optimizer.step()


def _zero(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    loop.backward(AT, 0.0)
    loop.optimizer.step()


def _rank_one(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    loop.backward(AT)
    for parameter in loop.model.parameters():
        if parameter.ndim == 2:
            parameter.grad.copy_(torch.outer(parameter.grad[:, 0], parameter.grad[0]))
    loop.optimizer.step()


def _idle(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    loop.model.idle = True
    loop.step(AT)
    loop.model.idle = False


def _masked(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    """A mean over no labels at all is not a number; its gradient can be zero."""
    loop.optimizer.zero_grad()
    logits = loop.model(torch.arange(BATCH) % 11)
    nn.functional.cross_entropy(logits, torch.full((BATCH,), -100)).backward()
    loop.optimizer.step()


def failing_routines(patch: pytest.MonkeyPatch, chance: random.Random, error: type[BaseException]) -> None:
    """From a random call on every routine of LAPACK's fails, once or until `patch` is undone."""
    calls, first, for_long = [0], chance.randrange(12), chance.random() < 0.5

    def failing(routine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] - 1 == first or (for_long and calls[0] > first):
                raise error("made to fail")
            return routine(*args, **kwargs)

        return call

    for owner, name in ROUTINES:
        patch.setattr(owner, name, failing(getattr(owner, name)))


def _lapack(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    failing_routines(patch, chance, torch.linalg.LinAlgError)
    loop.step(AT)
    patch.undo()


def _raised(error: type[BaseException]) -> Callable[[Loop, random.Random, pytest.MonkeyPatch], None]:
    def fault(loop: Loop, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
        """In forward, in backward or in a hook; the micro-batch is then discarded, as the documentation asks."""

        def fail(*_: Any) -> None:
            raise error("made to fail")

        module = chance.choice([loop.model.left, loop.model.right, loop.model.head, loop.model.norm])
        way = chance.choice(["register_forward_hook", "register_full_backward_hook", "register_forward_pre_hook"])
        handle = getattr(module, way)(fail)
        with pytest.raises(error, match="made to fail"):
            loop.backward(AT)
        handle.remove()
        loop.optimizer.zero_grad()
        loop.optimizer.discard_captures()

    return fault


Act = Callable[[Loop, random.Random, pytest.MonkeyPatch], None]

# What is to be true afterwards: the step was `left` out and all is as it was; or it was `made`, and all is finite; or
# either of both, as the numbers have it; or a `whole` step was made or none.
FAULTS: dict[str, tuple[Act, str]] = {
    "gradient": (_gradient, "either"),
    "activation": (_activation, "either"),
    "loss": (_loss, "either"),
    "scale": (_scale, "either"),
    "zero": (_zero, "made"),
    "rank one": (_rank_one, "made"),
    "idle": (_idle, "made"),
    "masked": (_masked, "either"),
    "lapack": (_lapack, "made"),
    "raised": (_raised(Fault), "left"),
    "interrupted": (_raised(KeyboardInterrupt), "left"),
}


# Faults that make a gradient of any size.
SIZES = ("gradient", "activation", "loss", "scale")


def settings_of(name: str, chance: random.Random) -> dict[str, Any]:
    if name.removesuffix("_mup") in ("adamw", "sgd"):
        return {"lr": 1e-3}
    return {
        "lr": 1e-3,
        "fallback_learning_rate": 1e-3,
        "norm_control": chance.choice(CONTROLS if not name.startswith("muon") else ("spectral", "none")),
    }


def run(name: str, fault: str, seed: int) -> str:
    """Train with the fault at one step; what became of that step. Raises AssertionError where a promise is broken."""
    chance = random.Random(f"{name} {fault} {seed}")
    settings = settings_of(name, chance)
    act, expected = FAULTS[fault]
    loop = Loop(name, settings)
    for step in range(AT):
        loop.step(step)
    before = loop.values()
    with pytest.MonkeyPatch.context() as patch:
        act(loop, chance, patch)
    was_made = loop.optimizer.steps == AT + 1
    where = f"{name} {settings} {fault} {seed}"
    if not was_made:
        assert expected != "made", where
        assert not (odd := differing(loop.values(), before)), f"{where}: {odd}"
    else:
        assert expected != "left", where
    assert not (odd := not_finite(loop)), f"{where}: {odd}"
    for step in range(AT + 1, STEPS):
        loop.step(step)
    assert not (odd := not_finite(loop)), f"{where}: {odd}"
    if not was_made:
        straight = Loop(name, settings)
        for step in (step for step in range(STEPS) if step != AT):
            straight.step(step)
        assert not (odd := differing(loop.values(), straight.values())), f"{where}: {odd}"
    # A step as long as its gradient, which plain SGD's is by definition, can take finite weights out of sight.
    follows = settings.get("norm_control") not in ("spectral", "graft_adam") and not name.startswith("adamw")
    if not (follows and fault in SIZES):
        assert math.isfinite(float(loop.loss(0).detach())), where
    return "made" if was_made else "left out"
