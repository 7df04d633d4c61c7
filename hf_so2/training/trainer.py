"""`SecondOrderMixin` adds our optimizers and μP to any Trainer. `SecondOrderTrainer` adds them to transformers' own."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_so2.distributed import is_offloading
from hf_so2.engine.sharded import NO_ADAPTIVE_DAMPING
from hf_so2.errors import ConfigurationError
from hf_so2.methods.table import MUP_SUFFIX
from hf_so2.mup import apply_mup, read_mup, refuse_adapters
from hf_so2.optim import CoverageReport, SecondOrderOptimizer
from hf_so2.optim.build import build_from_settings, with_way_out
from hf_so2.training.arguments import SecondOrderArgumentsMixin, SecondOrderTrainingArguments
from hf_so2.training.callbacks import DiscardStaleCaptures, ObserveLoggedSteps, keep_curvature_off_the_console
from hf_so2.training.model_card import write_section
from hf_so2.training.resumable import ResumableMixin


class SecondOrderMixin(ResumableMixin):
    """Comes before a kind of `transformers.Trainer` in the bases of a class.

    Its `args.optim` may then be a name of `hf_so2.OPTIMIZERS`.

    Raises:
        ConfigurationError: see :class:`SecondOrderTrainer`.
    """

    args: SecondOrderArgumentsMixin

    def __init__(self, *positional: Any, **kwargs: Any) -> None:
        # Trainers differ in the order of their arguments. Some hide it behind *args.
        given = [*kwargs.values(), *positional]
        args = kwargs.get("args", next((value for value in given if isinstance(value, TrainingArguments)), None))
        expected = _expected_arguments(type(self))
        if not (isinstance(args, SecondOrderArgumentsMixin) and isinstance(args, expected)):
            made = expected is not TrainingArguments
            allowed = f"second_order_arguments({expected.__name__})" if made else SecondOrderTrainingArguments.__name__
            raise ConfigurationError("args", type(args).__name__, f"must be {allowed}")
        model = kwargs.get("model", positional[0] if positional else None)
        # Done before the Trainer makes its output folder, so that a refusal leaves nothing behind.
        if isinstance(model, nn.Module):
            _apply_mup(model, args)
        self._loss_divides: bool | None = None
        self.card_notes: dict[str, str] = {}
        """Rows for the table of the model card: `recipe` says where the settings come from."""
        super().__init__(*positional, **kwargs)
        if isinstance(model, str):  # the name of a checkpoint: TRL's trainers load it
            _apply_mup(self.model, args)
        self.add_callback(DiscardStaleCaptures())
        if args.curvature_log != "none":
            self.add_callback(ObserveLoggedSteps())
        keep_curvature_off_the_console(self.callback_handler.callbacks)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.is_ours(self.args.optim):
            _check_fsdp(self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None, self.args)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model = super().call_model_init(trial)
        _apply_mup(model, self.args)
        return model

    def coverage(self) -> CoverageReport | None:
        """The report of what the optimizer does with every parameter; None for an optimizer of transformers."""
        if not self.args.is_ours(self.args.optim):
            return None
        self.create_optimizer()
        optimizer = self._second_order_optimizer()
        return optimizer.coverage() if optimizer is not None else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None or not self.args.is_ours(self.args.optim):
            return super().create_optimizer(model)
        if self.args.n_gpu > 1:
            raise ConfigurationError(
                "n_gpu", self.args.n_gpu, "one process must drive one GPU: start with `accelerate launch`"
            )
        target = self.model if model is None else model
        optimizer = build_from_settings(
            str(self.args.optim.value),
            target,
            self.args.optimizer_settings(),
            decay_parameters=self.get_decay_parameter_names(target),
        )
        # The Trainer's own file casts the state to the parameters' dtype. The curvature goes to a separate file.
        optimizer.curvature_in_state_dict = False
        self.optimizer: torch.optim.Optimizer | None = optimizer
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        optimizer = self._second_order_optimizer()
        if optimizer is not None and optimizer.capturing and optimizer.settings.fisher == "empirical":
            self._announce(optimizer, inputs, num_items_in_batch)
        if optimizer is not None and optimizer.wants_loss:
            optimizer.reevaluate_with(partial(self._loss_again, dict(inputs), num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)

    def create_model_card(self, *positional: Any, **kwargs: Any) -> None:
        """As in the Trainer behind, with a section on the optimizer: its settings, μP base, recipe and versions."""
        super().create_model_card(*positional, **kwargs)
        if self.is_world_process_zero() and self.args.is_ours(self.args.optim):
            path, model = Path(self.args.output_dir, "README.md"), self.accelerator.unwrap_model(self.model)
            write_section(path, self.args, read_mup(model), self._second_order_optimizer(), self.card_notes)

    def _loss_again(
        self, inputs: dict[str, Any], num_items: Tensor | int | None, compute_loss: Callable[..., Any] | None = None
    ) -> Tensor:
        """The loss of a micro-batch as `training_step` differentiates it, without dropout and without a graph.

        Args:
            inputs: the micro-batch.
            num_items: the Trainer's count of items in the batch.
            compute_loss: used in place of the method. A subclass's method may write to a log.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                prepared = self._prepare_inputs(dict(inputs))
                compute = self.compute_loss if compute_loss is None else partial(compute_loss, self)
                loss: Tensor = compute(self.model, prepared, num_items_in_batch=num_items)
        finally:
            self.model.train(was_training)
        return loss if self._is_of_whole_step(num_items) else loss / self.current_gradient_accumulation_steps

    def _is_of_whole_step(self, num_items: Tensor | int | None) -> bool:
        """Whether the losses of micro-batches add up to the loss of the step without a division: the Trainer's rule."""
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # in newer versions
        if said is not None:
            return said
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        optimizer = self._second_order_optimizer()
        samples = optimizer is not None and optimizer.capturing and optimizer.settings.fisher == "mc"
        if not samples or not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        assert optimizer is not None
        labels = inputs.get("labels")  # a label smoother removes them
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor):
            raise ConfigurationError("fisher", "mc", f"needs a model that returns logits, not {type(outputs).__name__}")
        independent = False
        if isinstance(labels, Tensor) and labels.is_floating_point():
            independent = labels.shape == logits.shape and logits.ndim == 2
            if not independent:
                raise ConfigurationError("fisher", "mc", f"draws classes; this loss has labels of type {labels.dtype}")
        optimizer.sample_fisher(logits, loss=loss, independent=independent, seed=self.args.seed)
        return (loss, outputs) if return_outputs else loss

    def _announce(
        self, optimizer: SecondOrderOptimizer, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> None:
        """Tell the optimizer the factor that backward will put on the gradient of each row's own loss."""
        is_mean, scale = True, torch.ones((), dtype=torch.float64)
        takes_count = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        # A subclass that sets this attribute to False computes its own mean.
        if num_items is not None and takes_count and getattr(self, "loss_is_scaled_for_ga", None) is not False:
            if self.args.average_tokens_across_devices:
                scale = scale * self.accelerator.num_processes
            is_mean = not self._divides_by(num_items, inputs)
            scale = scale if is_mean else scale / torch.as_tensor(num_items).to(scale)
        if is_mean and not self._is_of_whole_step(num_items):
            scale = scale / self.current_gradient_accumulation_steps
        if self.accelerator.scaler is not None:
            scale = scale * self.accelerator.scaler.get_scale()
        optimizer.announce(None, scale, is_mean=is_mean)

    def _divides_by(self, num_items: Tensor | int, inputs: dict[str, Any]) -> bool:
        """Whether the model divides the loss by the count that the Trainer passes to it. This is tried once.

        Most models do. Models whose class computes its own loss (BERT's) take the count and ignore it.
        """
        if self._loss_divides is None:
            try:
                once, twice = (self._loss_again(inputs, n, Trainer.compute_loss) for n in (num_items, 2 * num_items))
                self._loss_divides = not torch.equal(once, twice)
            except (TypeError, ValueError, KeyError):  # inputs that only a subclass can process
                self._loss_divides = True
        return self._loss_divides

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers. The log of training steps also has `SecondOrderOptimizer.telemetry`."""
        optimizer = self._second_order_optimizer()
        if "loss" in logs and optimizer is not None and self.args.curvature_log != "none":
            logs |= optimizer.telemetry(self.args.curvature_log)
        super().log(logs, start_time)


class SecondOrderTrainer(SecondOrderMixin, Trainer):
    """A `transformers.Trainer` whose `args.optim` may be a name of `hf_so2.OPTIMIZERS`.

    For a `_mup` name, the Trainer applies μP to the model when it is built, and to every model of `model_init`, unless
    the model already has a μP record. A pretrained model is not re-initialised. Other optimizers behave as in
    transformers. For other kinds of Trainer see `hf_so2.second_order`.

    Raises:
        ConfigurationError: as `SecondOrderTrainingArguments` and `build_optimizer`.
    """


def _expected_arguments(trainer: type) -> type:
    """The class of arguments that a kind of Trainer names in its signature.

    TRL's Trainers convert all other arguments to their own class, which does not have our fields.
    """
    for kind in trainer.__mro__:
        if issubclass(kind, SecondOrderMixin) or "__init__" not in vars(kind):
            continue
        parameter = inspect.signature(kind.__init__).parameters.get("args")
        named = () if parameter is None else (parameter.annotation, *get_args(parameter.annotation))
        for name in named:
            if isinstance(name, type) and issubclass(name, TrainingArguments) and name is not TrainingArguments:
                return name
    return TrainingArguments


def _check_fsdp(plugin: Any, args: SecondOrderArgumentsMixin) -> None:
    """Raise if FSDP is set up in a way that the optimizers do not support, or was asked for but is not in use."""
    if plugin is None:
        if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ConfigurationError("fsdp", True, "is left out by accelerate on a machine without GPUs; use DDP there")
        return
    if plugin.fsdp_version != 2:
        raise ConfigurationError("fsdp_version", plugin.fsdp_version, "must be 2: parameters of FSDP1 have no shape")
    if is_offloading(plugin.cpu_offload):
        raise ConfigurationError("fsdp_config", "cpu_offload", "is not supported; keep parameters on the GPU")
    if args.optimizer_settings().adaptive_damping:
        raise ConfigurationError("adaptive_damping", True, NO_ADAPTIVE_DAMPING)


def _apply_mup(model: nn.Module, args: SecondOrderArgumentsMixin) -> None:
    """Apply μP to a model if the optimizer's name asks for it and the model has no μP record yet."""
    name = str(args.optim.value)
    if not (args.is_ours(name) and name.endswith(MUP_SUFFIX)):
        return
    if (record := read_mup(model)) is not None:
        record.warn_of_another_base(args.mup_base_width, args.mup_base_depth)
        return
    try:
        refuse_adapters(model)
    except ConfigurationError as error:
        raise with_way_out(error, name) from None
    if not hasattr(model, "config"):
        allowed = f"has no config, whose width optim={name} needs: call hf_so2.apply_mup(model, base_model) beforehand"
        raise ConfigurationError("model", type(model).__name__, allowed)
    base = args.base_config(model.config)
    if base is None:
        raise ConfigurationError("mup_base_width", None, f"optim={name} needs the width at which it was tuned")
    try:
        apply_mup(model, base)
    except ConfigurationError as error:
        if error.field != "base_config":
            raise with_way_out(error, name) from None
        field = "mup_base_width" if args.mup_base_width is not None else "mup_base_config"
        raise ConfigurationError(field, getattr(args, field), error.allowed) from None
