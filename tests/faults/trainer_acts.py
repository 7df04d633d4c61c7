"""What goes wrong in a run of the Trainer, drawn from seeds: hooks on its model, and routines that fail."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_loop import HUGE, Fault, failing_routines
from torch import Tensor, nn

Act = Callable[[nn.Module], list[Any]]


def _gradient(chance: random.Random) -> Act:
    place, bad = chance.random(), chance.choice(HUGE)

    def change(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1)[0] = bad
        return changed

    def act(model: nn.Module) -> list[Any]:
        parameters = list(model.parameters())
        return [parameters[int(place * len(parameters))].register_hook(change)]

    return act


def module_of(model: nn.Module, place: float) -> nn.Module:
    layer = model.model.layers[0]
    found = [
        layer.mlp.down_proj,
        layer.self_attn.q_proj,
        layer.input_layernorm,
        model.lm_head,
        model.model.embed_tokens,
    ]
    return found[int(place * len(found))]


def _activation(chance: random.Random) -> Act:
    place, bad = chance.random(), chance.choice(HUGE)
    return lambda model: [module_of(model, place).register_forward_hook(lambda _, __, output: output * bad)]


def _loss(chance: random.Random) -> Act:
    bad = chance.choice([*HUGE, 0.0, 1e-30, 1e15])

    def scale(module: nn.Module, inputs: Any, output: Any) -> Any:
        output["loss"] = output["loss"] * bad
        return output

    return lambda model: [model.register_forward_hook(scale)]


def _idle(chance: random.Random) -> Act:
    return lambda model: [
        model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    ]


class _Routines:
    """All of LAPACK fails as drawn until it is removed."""

    def __init__(self, chance: random.Random, error: type[BaseException]) -> None:
        self.patch = pytest.MonkeyPatch()
        failing_routines(self.patch, chance, error)

    def remove(self) -> None:
        self.patch.undo()


def _lapack(chance: random.Random) -> Act:
    return lambda model: [_Routines(chance, torch.linalg.LinAlgError)]


def _raised(error: type[BaseException]) -> Callable[[random.Random], Act]:
    def draw(chance: random.Random) -> Act:
        """In forward, in backward, or in the middle of a step, where weights may have moved."""
        place = chance.random()
        way = chance.choice(
            ["register_forward_hook", "register_full_backward_hook", "register_forward_pre_hook", "step", "late"]
        )

        def fail(*_: Any, **__: Any) -> None:
            raise error("made to fail")

        class InStep:
            def __init__(self) -> None:
                self.patch = pytest.MonkeyPatch()
                target = "hf_so2.engine.fallback.adamw" if way == "late" else "hf_so2.optim.optimizer.are_in_range"
                self.patch.setattr(target, fail)

            def remove(self) -> None:
                self.patch.undo()

        def act(model: nn.Module) -> list[Any]:
            if way in ("step", "late"):
                return [InStep()]
            return [getattr(module_of(model, place), way)(fail)]

        return act

    return draw


# As in `plain_loop.FAULTS`; after what is `raised`, training goes on from the last checkpoint, as if nothing had been.
FAULTS: dict[str, tuple[Callable[[random.Random], Act], str]] = {
    "gradient": (_gradient, "either"),
    "activation": (_activation, "either"),
    "loss": (_loss, "either"),
    "idle": (_idle, "made"),
    "masked": (lambda chance: lambda model: [], "either"),
    "lapack": (_lapack, "made"),
    "raised": (_raised(Fault), "raised"),
    "interrupted": (_raised(KeyboardInterrupt), "raised"),
}


class _Once:
    """A hook, or a routine of the step, that raises once as torch does where memory runs out."""

    def __init__(self, add: Callable[[Callable[..., Any]], Any]) -> None:
        self.raised = False
        self.handle = add(self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        if not self.raised:
            self.raised = True
            raise torch.OutOfMemoryError("CUDA out of memory. Made to fail.")

    def remove(self) -> None:
        self.handle.remove()


class Before:
    """Calls `act` before a function of the package."""

    def __init__(self, target: str, act: Callable[[], None]) -> None:
        self.patch = pytest.MonkeyPatch()
        module, _, name = target.rpartition(".")
        function = getattr(sys.modules[module], name)

        def both(*args: Any, **kwargs: Any) -> Any:
            act()
            return function(*args, **kwargs)

        self.patch.setattr(target, both)

    def remove(self) -> None:
        self.patch.undo()


# In forward, in backward, before a step, and in the middle of one: what is left then nobody may go on from.
OUT_OF_MEMORY: list[Callable[[nn.Module], Any]] = [
    lambda model: _Once(model.model.layers[0].mlp.register_forward_hook),
    lambda model: _Once(model.model.layers[0].register_full_backward_hook),
    lambda model: _Once(lambda fail: Before("hf_so2.optim.optimizer.are_in_range", fail)),
    lambda model: _Once(lambda fail: Before("hf_so2.optim.optimizer.first_order_step", fail)),
]
