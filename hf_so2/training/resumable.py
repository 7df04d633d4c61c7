"""`ResumableMixin` for any Trainer: checkpoints include the curvature, and incomplete checkpoints are refused."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_model
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_so2.errors import ConfigurationError
from hf_so2.optim import SecondOrderOptimizer
from hf_so2.parallel.sharded_state import is_of_parts, load_state, share_of_state
from hf_so2.training import checkpoints
from hf_so2.training.callbacks import second_order_optimizer
from hf_so2.training.manifest import write_state

logger = logging.getLogger(__name__)

SCHEDULER = "scheduler.pt"  # as transformers' Trainer names it


# The type checker does not read transformers, so any base will do for it. At run time the base differs by class.
_Trainer: Any = Trainer if TYPE_CHECKING else object


class ResumableMixin(_Trainer):
    """Comes before a kind of `transformers.Trainer` in the bases of a class.

    Its checkpoints are sealed with a manifest and have everything that a resumed run needs. Besides transformers' files
    they have the curvature, in one file per process with this process's share of the layers. Any number of processes
    can resume from them.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers, but it resumes only from a complete checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True (also "true" or "last") for the newest complete one
                in `output_dir`.

        Raises:
            ConfigurationError: the checkpoint is torn, or there is none, or only one of the two runs uses FSDP: the
                saved one or the resumed one.
        """
        checkpoint = checkpoints.to_resume(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None and checkpoints.is_sharded(Path(checkpoint)) != self.is_fsdp_enabled:
            how = "without" if self.is_fsdp_enabled else "with"
            raise ConfigurationError("resume_from_checkpoint", checkpoint, f"was saved {how} FSDP; go on {how} it")
        return super().train(checkpoint, *positional, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            checkpoints.clear(folder)
        self.accelerator.wait_for_everyone()
        state = self.state
        # The only moment at which the content of the Trainer's last file is final and the file does not exist yet.
        state.save_to_json = lambda path: write_state(Path(path), partial(type(state).save_to_json, state))
        try:
            with checkpoints.writable(folder):
                super()._save_checkpoint(model, trial)
        finally:
            del state.save_to_json

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self._second_order_optimizer()
        if optimizer is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder, (part, parts) = Path(output_dir), self._share()
        # On every process, even if it does not write: all ranks gather the sharded state together.
        if is_of_parts(optimizer):
            self._save_sharded(optimizer, folder)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        state = optimizer.curvature_state_dict()
        if part < parts:
            checkpoints.write_curvature(folder, state, part, parts)

    def _save_sharded(self, optimizer: SecondOrderOptimizer, folder: Path) -> None:
        """Save what transformers' Trainer saves under FSDP2, and the optimizer in another way.

        transformers' own way could not load this optimizer again.
        """
        part, parts = self._share()
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, self.accelerator, self.model, str(folder), adapter_only=True)
        share = share_of_state(optimizer, part, parts)
        if part < parts:
            checkpoints.write_part(folder, checkpoints.OPTIMIZER_FILES, share, part, parts)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Once every process is here, all files except trainer_state.json are there.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            parts = self._share()[1] if self._second_order_optimizer() is not None else 0
            checkpoints.seal(Path(output_dir), self.args.world_size, parts)

    def _share(self) -> tuple[int, int]:
        """Index of the part of the curvature that this process writes, and number of parts.

        With `save_on_each_node`, one process of each node writes everything to the node's own disk.
        """
        if self.args.save_on_each_node:
            return int(not self.args.should_save), 1
        return self.args.process_index, self.args.world_size

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with checkpoints.readable(Path(resume_from_checkpoint)):
            self._load_model(resume_from_checkpoint, model)

    def _load_model(self, checkpoint: str, model: nn.Module | None) -> None:
        try:
            super()._load_from_checkpoint(checkpoint, model=model)
        except RuntimeError as error:
            if "size mismatch" not in str(error) and "key(s) in state_dict" not in str(error):
                raise
            reason = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
            allowed = f"is of another model: {reason}"
            raise ConfigurationError("resume_from_checkpoint", checkpoint, allowed) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.readable(Path(checkpoint or "")):
            try:
                self._load_states(checkpoint)
            except ConfigurationError:
                raise
            except ValueError as error:  # raised for the state of another optimizer
                name = getattr(self.args.optim, "value", self.args.optim)
                allowed = f"is of another optimizer or model than optim={name}: {error}"
                raise ConfigurationError("resume_from_checkpoint", checkpoint, allowed) from None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.readable(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

    def _load_states(self, checkpoint: str | None) -> None:
        optimizer = self._second_order_optimizer()
        if checkpoint is None or optimizer is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder, ranks = Path(checkpoint), self.args.world_size
        if not any(folder.glob("optimizer*")):
            self._warn(
                f"{folder} holds the model alone (save_only_model): steps are counted on from there, but the optimizer,"
                " its curvature and the learning rate schedule start anew"
            )
            return
        curvature = checkpoints.read_curvature(folder)
        if curvature is None:
            raise ConfigurationError(
                "resume_from_checkpoint", checkpoint, "holds an optimizer but no curvature beside it"
            )
        saved_parts = checkpoints.read_sharded_optimizer(folder)
        if saved_parts is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            load_state(optimizer, saved_parts)
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
        optimizer.load_curvature_state_dict(curvature)
        saved = checkpoints.world_size_of(folder)
        if saved not in (None, ranks):
            self._warn(
                f"{folder} was saved by {saved} process(es) and {ranks} go on: random numbers (dropout, sampled labels)"
                " are other ones than without the interruption"
            )

    def _warn(self, message: str) -> None:
        if self.is_world_process_zero():
            logger.warning(message)

    def _second_order_optimizer(self) -> SecondOrderOptimizer | None:
        return second_order_optimizer(self.optimizer)
