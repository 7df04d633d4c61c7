"""Trains models of several widths for a few steps and measures how much their layers' outputs change."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_so2.errors import ConfigurationError

from .coord_check import CoordinateCheck, Measurement
from .roles import infer_widths, pattern_of
from .rules import ParameterWidth, Role
from .widths import HeadGrowth, Path, rebuild, require_config, scale_width, text_width

BuildOptimizer: TypeAlias = Callable[[PreTrainedModel, PretrainedConfig], torch.optim.Optimizer]

_DISTINCT_TOKENS = 16


def run_coordinate_check(
    base_config: PretrainedConfig,
    optim: str,
    build_optimizer: BuildOptimizer,
    *,
    widths: Sequence[int],
    seeds: int = 3,
    steps: Sequence[int] = (1, 2, 4, 8),
    tolerance: float = 0.1,
    batch_size: int = 8,
    sequence_length: int = 64,
    head: HeadGrowth = "count",
    device: str | torch.device = "cpu",
) -> CoordinateCheck:
    """Trains models of several widths for a few steps and measures how much their layers' outputs change.

    Args:
        base_config: any width of the family; the narrowest of `widths` is the base of muP.
        optim: name for the report.
        build_optimizer: makes the optimizer of a fresh model, given the base's configuration; it puts the model in muP.
        widths: hidden sizes, at least two.
        seeds: runs per width; each has its own weights and data, the data are the same at every width.
        steps: after how many steps to measure.
        tolerance: how far an exponent may be from 0.
        batch_size: sequences per step.
        sequence_length: tokens per sequence.
        head: what grows with the width, the number of heads or their size.
        device: where to train.

    Raises:
        ConfigurationError: fewer than two widths, no seed, step, token or tolerance, or a width that the family cannot
            have.
    """
    require_config("base_config", base_config)
    try:
        widths = list(widths)
    except TypeError:
        allowed = "must be a list of at least two different hidden sizes"
        raise ConfigurationError("widths", widths, allowed) from None
    if len(set(widths)) < 2:
        raise ConfigurationError("widths", widths, "must be at least two different hidden sizes")
    for name, count in (("seeds", seeds), ("batch_size", batch_size), ("sequence_length", sequence_length)):
        if count < 1:
            raise ConfigurationError(name, count, "must be at least 1")
    if not tolerance > 0:
        raise ConfigurationError("tolerance", tolerance, "must be above 0")
    if not steps or min(steps) < 1:
        raise ConfigurationError("steps", list(steps), "must be positive numbers of optimizer steps")
    ordered, measured_steps = sorted(set(widths)), sorted(set(steps))
    quiet = _without_dropout(base_config)
    base = quiet if ordered[0] == text_width(quiet) else scale_width(quiet, width=ordered[0], head=head)
    measurements: list[Measurement] = []
    for width in ordered:
        config = scale_width(base, width=width, head=head)
        for seed in range(seeds):
            batches = synthetic_batches(config, max(measured_steps), batch_size, sequence_length, seed)
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).to(device).train()
            run = _Run(model, infer_widths(model, base), build_optimizer(model, base), batches)
            for step, changes in run.train(measured_steps):
                measurements += [Measurement(width, seed, step, *change) for change in changes]
    return CoordinateCheck(optim, tuple(ordered), seeds, tuple(measured_steps), tolerance, tuple(measurements))


# By name, what can be said of a check besides what is checked.
CHECK_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(run_coordinate_check).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


def synthetic_batches(
    config: PretrainedConfig, count: int, batch_size: int, sequence_length: int, seed: int
) -> list[Tensor]:
    """Token ids `(batch_size, sequence_length)` of text in which each token follows from the last, four times in five.

    It can be learned, so that gradients of successive steps agree as they do on real text. Of the vocabulary only a few
    tokens occur: representations of different tokens overlap by chance by `width^-1/2`, and the sum of many such
    overlaps would drown the level part of the head's update at small widths.
    """
    vocabulary = config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(vocabulary, generator=generator)[:_DISTINCT_TOKENS]
    successor = torch.randperm(len(tokens), generator=generator)
    frequency = 1 / torch.arange(1, len(tokens) + 1, dtype=torch.float64)
    batches = []
    for _ in range(count):
        text = torch.multinomial(frequency, batch_size * sequence_length, replacement=True, generator=generator)
        text = text.view(batch_size, sequence_length)
        follows = torch.rand(batch_size, sequence_length, generator=generator) < 0.8
        for position in range(1, sequence_length):
            text[:, position] = torch.where(follows[:, position], successor[text[:, position - 1]], text[:, position])
        batches.append(tokens[text])
    return batches


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    rates: dict[Path, float] = {
        (name,): 0.0
        for name, value in config.to_dict().items()
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")) and value > 0
    }
    return rebuild(config, rates)


Change: TypeAlias = tuple[str, Role, float, float | None]


class _Run:
    """One model in training, its layers' outputs compared with those at step 0 on the first batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        widths: Mapping[str, ParameterWidth],
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Tensor],
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._batches = [batch.to(model.device) for batch in batches]
        self._roles = dict(_layer_roles(model, widths))
        self._weights = {name: _weight(module).detach().clone() for name, module in self._layers()}
        self._outputs = {name: output for name, _, output in self._observe()}

    def train(self, measured_steps: Sequence[int]) -> Iterator[tuple[int, list[Change]]]:
        for step, batch in enumerate(self._batches, start=1):
            self._optimizer.zero_grad()
            self._model(input_ids=batch, labels=batch).loss.backward()
            self._optimizer.step()
            if step in measured_steps:
                yield step, self._changes()

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        for name in self._roles:
            yield name, self._model.get_submodule(name)

    def _changes(self) -> list[Change]:
        squares: dict[tuple[str, Role], list[tuple[float, float | None]]] = defaultdict(list)
        for name, inputs, output in self._observe():
            change = output - self._outputs[name]
            module = self._model.get_submodule(name)
            update = _apply_weight(module, _weight(module).detach() - self._weights[name], inputs)
            mean_square = None if update is None else float(update.square().mean())
            squares[pattern_of(name), self._roles[name]].append((float(change.square().mean()), mean_square))
        changes: list[Change] = []
        for (layer, role), values in squares.items():
            activation = math.sqrt(sum(value for value, _ in values) / len(values))
            updates = [update for _, update in values if update is not None]
            changes.append((layer, role, activation, math.sqrt(sum(updates) / len(updates)) if updates else None))
        return changes

    def _observe(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, input, output) of every layer on the first batch, in float64."""
        seen: list[tuple[str, Tensor, Tensor]] = []

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
            def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
                if isinstance(output, Tensor) and inputs:
                    value = inputs[0].detach()
                    seen.append(
                        (name, value if value.dtype == torch.long else value.double(), output.detach().double())
                    )

            return record

        handles = [module.register_forward_hook(hook(name)) for name, module in self._layers()]
        try:
            with _evaluating(self._model), torch.no_grad():
                self._model(input_ids=self._batches[0], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _layer_roles(model: nn.Module, widths: Mapping[str, ParameterWidth]) -> Iterator[tuple[str, Role]]:
    """Modules that hold a matrix, with the matrix's role; a tied matrix has the output role in its head."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1 and id(p) in names]
        for matrix in matrices[:1]:
            width = widths[names[id(matrix)]]
            if width.role in ("input", "hidden", "output"):
                yield name, "output" if width.tied and not isinstance(module, nn.Embedding) else width.role


def _weight(module: nn.Module) -> Tensor:
    return next(parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1)


def _apply_weight(module: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor | None:
    if type(module) is nn.Embedding:  # others scale, shift or do not take indices
        return nn.functional.embedding(inputs, weight.double())
    if isinstance(module, nn.Linear):
        return nn.functional.linear(inputs, weight.double())
    if isinstance(module, Conv1D):
        return inputs @ weight.double()
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
