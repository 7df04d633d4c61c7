"""What is measured: a model of its own with an optimizer, ours or a peer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_so2.benchmark.memory import tensor_bytes
from hf_so2.benchmark.peers import Gradients, Peer
from hf_so2.benchmark.phases import APPLY, FORWARD_BACKWARD, phases_timed
from hf_so2.benchmark.stopwatch import Stopwatch
from hf_so2.errors import ConfigurationError
from hf_so2.layers import select
from hf_so2.methods.table import METHODS, parse_name
from hf_so2.optim import SecondOrderOptimizer, build_optimizer

# The cost of a step does not depend on its size, and a small one keeps every method finite on random tokens.
LEARNING_RATE = 1e-4

BASELINE = "torch.AdamW"


def seeded_llama(seed: int, **sizes: int) -> LlamaForCausalLM:
    """A Llama with an untied head and as many key heads as query heads; equal seeds give equal weights.

    Args:
        seed: of the weights.
        sizes: fields of `LlamaConfig`.
    """
    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))


def plain_gradients(model: nn.Module, tokens: Tensor) -> Tensor:
    """Forward and backward pass; the loss."""
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """`torch.autocast` to this dtype, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@dataclass
class Contestant:
    """A model in training.

    Args:
        name: of the optimizer, for the table.
        model: a causal language model, in training mode.
        optimizers: all of them are stepped; between them they hold every parameter once.
        gradients: given the model and tokens, leaves gradients in the parameters and returns the loss.
        autocast: the dtype of products in forward and backward passes; None for that of the weights.
    """

    name: str
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    gradients: Gradients = plain_gradients
    autocast: torch.dtype | None = None

    def step(self, tokens: Tensor, stopwatch: Stopwatch) -> None:
        """One step of training on `tokens`, (batch, sequence), with its phases timed.

        Raises:
            FloatingPointError: the loss is not finite, so that skipped steps would be measured.
        """
        with self._phases(stopwatch):
            with stopwatch.span(FORWARD_BACKWARD), autocast(tokens.device, self.autocast):
                loss = self.gradients(self.model, tokens)
            with stopwatch.span(APPLY):
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"{self.name}: the loss became {loss.item()}")

    def _phases(self, stopwatch: Stopwatch) -> AbstractContextManager[None]:
        ours = self.optimizers[0]
        return phases_timed(ours, stopwatch) if isinstance(ours, SecondOrderOptimizer) else nullcontext()

    def state_bytes_per_parameter(self) -> float:
        """Bytes that a checkpoint of the optimizers needs for each parameter of the model."""
        state = tensor_bytes([optimizer.state_dict() for optimizer in self.optimizers])
        return state / sum(parameter.numel() for parameter in self.model.parameters())


def baseline(build_model: Callable[[], nn.Module]) -> Contestant:
    """torch's own AdamW on everything."""
    model = build_model()
    return Contestant(BASELINE, model, [torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)])


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """`"kfac:beta2=0.9,damping=0.01"` as an optimizer's name and what differs from its defaults.

    Raises:
        ConfigurationError: what is after the colon is not a list of settings.
    """
    name, _, rest = text.partition(":")
    settings = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise ConfigurationError("optim", text, "must be a name, or name:setting=value,setting=value,...")
        settings[key] = yaml.safe_load(value)
    return name, settings


def ours(variant: str, build_model: Callable[[], nn.Module], interval: int | None) -> Contestant:
    """One of `hf_so2.OPTIMIZERS`, with preconditioners rebuilt every `interval` steps.

    Args:
        variant: as for `parse_variant`; what it does not set has the method's default.
        build_model: makes the model.
        interval: steps between refreshes; None for the default.
    """
    name, given = parse_variant(variant)
    model = build_model()
    return Contestant(variant, model, [with_rates(name, model, LEARNING_RATE, interval, given)])


def with_rates(
    name: str, model: nn.Module, rate: float, interval: int | None, given: Mapping[str, Any] = MappingProxyType({})
) -> SecondOrderOptimizer:
    """One of `hf_so2.OPTIMIZERS` with one rate for everything, and `interval` steps between refreshes.

    Args:
        given: settings that replace these, or any other defaults.
    """
    settings: dict[str, Any] = {"lr": rate}
    method, _ = parse_name(name)
    if "curvature" in method.uses:
        settings["fallback_learning_rate"] = rate
    if "statistics" in method.uses and interval is not None:
        settings["preconditioner_update_steps"] = interval
    return build_optimizer(name, model, **{**settings, **given})


def theirs(peer: Peer, build_model: Callable[[], nn.Module], interval: int | None) -> Contestant:
    """A peer on the weights that ours precondition by default, with torch's AdamW on the rest, as in ours.

    Args:
        peer: which.
        build_model: makes the model.
        interval: steps between refreshes; None for the default of our method of that kind.
    """
    model = build_model()
    if interval is None:
        method = METHODS.get(peer.method)
        interval = method.settings({}).preconditioner_update_steps if method and "statistics" in method.uses else 1
    chosen = {name for name, treatment in select(model).items() if treatment.preconditioned}
    hidden = [parameter for name, parameter in model.named_parameters() if name in chosen]
    rest = [parameter for name, parameter in model.named_parameters() if name not in chosen]
    optimizers = [peer.build(hidden, LEARNING_RATE, interval), torch.optim.AdamW(rest, lr=LEARNING_RATE)]
    gradients = peer.gradients(model, chosen, interval) if peer.gradients else plain_gradients
    return Contestant(peer.name, model, optimizers, gradients)
