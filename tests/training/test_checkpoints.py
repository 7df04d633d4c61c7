"""What is in a checkpoint, which ones are complete, and what a killed run leaves."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared.helpers import arguments, assert_same_parameters, llama, optimizer_of, token_rows, trained
from transformers import TrainerCallback, TrainerState
from transformers import trainer as transformers_trainer

import hf_so2
from hf_so2.training import checkpoints
from hf_so2.training.resumable import ResumableMixin

RUN = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
CURVATURE = "curvature-0-of-1.pt"
FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", CURVATURE, "rng_state.pth", "manifest.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> hf_so2.SecondOrderTrainer:
    """An uninterrupted run with checkpoints at steps 2, 4 and 6."""
    return trained(llama(), token_rows(24), tmp_path_factory.mktemp("whole"), **RUN)


@pytest.fixture
def output(whole: hf_so2.SecondOrderTrainer, tmp_path: Path) -> Path:
    """A copy of its folder to do harm to."""
    return shutil.copytree(whole.args.output_dir, tmp_path / "output")


def test_manifest_lists_every_file_but_the_last(output: Path) -> None:
    folder = output / "checkpoint-4"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["world_size"] == 1
    others = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(FILES) < set(others)
    del others["manifest.json"], others["trainer_state.json"]
    assert manifest["bytes"] == others


@pytest.mark.parametrize("cut", [False, True], ids=["missing", "cut short"])
@pytest.mark.parametrize("name", [*FILES, "trainer_state.json"])
def test_a_torn_checkpoint_is_refused_by_name_and_passed_over_otherwise(
    name: str, cut: bool, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torn = output / "checkpoint-6"
    assert checkpoints.to_resume(torn, output) == checkpoints.to_resume(True, output) == str(torn)
    assert not caplog.records
    if cut:
        os.truncate(torn / name, (torn / name).stat().st_size // 2)
    else:
        (torn / name).unlink()
    with pytest.raises(hf_so2.ConfigurationError, match=rf"resume_from_checkpoint=.*{name}"):
        checkpoints.to_resume(torn, output)
    assert checkpoints.to_resume("last", output) == str(output / "checkpoint-4")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"checkpoint-6: {name} " in record.getMessage()
    assert "\n" not in record.getMessage()


def test_no_complete_checkpoint_is_an_error(output: Path) -> None:
    for folder in output.iterdir():
        (folder / "optimizer.pt").unlink()
    (output / "checkpoint-best").mkdir()
    with pytest.raises(
        hf_so2.ConfigurationError, match=r"no complete checkpoint in .*checkpoint-6: optimizer.pt is missing"
    ):
        checkpoints.to_resume("true", output)
    with pytest.raises(hf_so2.ConfigurationError, match="no complete checkpoint"):
        checkpoints.to_resume(True, output / "elsewhere")
    assert checkpoints.to_resume(None, output) is checkpoints.to_resume(False, output) is None


def test_a_folder_without_the_files_of_other_ranks_is_not_sealed(output: Path) -> None:
    folder = output / "checkpoint-6"
    (folder / CURVATURE).rename(folder / "curvature-0-of-2.pt")
    with pytest.raises(hf_so2.ConfigurationError, match=r"output_dir=.*one folder for all 2 processes"):
        checkpoints.seal(folder, ranks=2, parts=2)


def test_the_trainer_itself_passes_over_and_refuses(whole: hf_so2.SecondOrderTrainer, output: Path) -> None:
    (output / "checkpoint-6" / CURVATURE).unlink()
    with pytest.raises(hf_so2.ConfigurationError, match=CURVATURE):
        trained(llama(), token_rows(24), output, resume=str(output / "checkpoint-6"), **RUN)
    resumed = trained(llama(), token_rows(24), output, resume=True, **RUN)
    assert optimizer_of(resumed).steps == 6
    assert_same_parameters(resumed.model, whole.model)
    assert checkpoints.fault_of(output / "checkpoint-6") is None


class KillFrom(TrainerCallback):
    """Puts SIGKILL in the place of a function once a step has been made."""

    def __init__(self, step: int, owner: Any, name: str) -> None:
        self.step, self.owner, self.name = step, owner, name

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(self.owner, self.name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))


# Where the process dies in the save of step 4, and the newest complete checkpoint that it leaves.
DEATHS: dict[str, tuple[Any, str, int]] = {
    "before the optimizer": (ResumableMixin, "_save_optimizer_and_scheduler", 2),
    "before the curvature has its name": (Path, "replace", 2),
    "before the manifest": (checkpoints, "seal", 2),
    "before the state": (TrainerState, "save_to_json", 2),
    "before older ones are removed": (transformers_trainer, "rotate_checkpoints", 4),
}


def train_and_die(output: Path, death: str) -> None:
    owner, name, _ = DEATHS[death]
    args = arguments(output, save_total_limit=1, **RUN)
    trainer = hf_so2.SecondOrderTrainer(
        model=llama(), args=args, train_dataset=token_rows(24), callbacks=[KillFrom(4, owner, name)]
    )
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-2"))


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_save_is_all_that_is_lost(death: str, whole: hf_so2.SecondOrderTrainer, output: Path) -> None:
    """The save writes over a complete checkpoint of the same step, so that files of two saves lie ready to be mixed."""
    shutil.rmtree(output / "checkpoint-6")
    # A server that has imported everything: each death takes a second, not ten.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_so2", "transformers.models.llama.modeling_llama"])
    process = context.Process(target=train_and_die, args=(output, death))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL

    left = DEATHS[death][2]
    assert checkpoints.to_resume(True, output) == str(output / f"checkpoint-{left}")
    resumed = trained(llama(), token_rows(24), output, resume=True, save_total_limit=1, **RUN)
    assert_same_parameters(resumed.model, whole.model)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-6"]
    assert [path.parent.name for path in output.rglob("curvature-*")] == ["checkpoint-6"]


def test_model_only_checkpoints_hold_no_curvature_and_say_what_resuming_means(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_only = RUN | {"save_only_model": True}
    trained(llama(), token_rows(24), tmp_path, **(model_only | {"max_steps": 2}))
    assert not list(tmp_path.rglob("curvature-*"))
    resumed = trained(llama(), token_rows(24), tmp_path, resume=True, **model_only)
    assert resumed.state.global_step == 6
    assert optimizer_of(resumed).steps == 4
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_so2")]
    assert "save_only_model" in message
    assert "start anew" in message


def test_best_model_is_loaded_and_its_checkpoint_kept(tmp_path: Path) -> None:
    """The largest loss is called the best, so that the best checkpoint is the first and not the last."""
    settings = RUN | {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "save_total_limit": 2,
        "learning_rate": 0.05,
    }
    rows = token_rows(24)
    trainer = hf_so2.SecondOrderTrainer(
        model=llama(), args=arguments(tmp_path, **settings), train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    best, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"
    assert trainer.state.best_model_checkpoint == str(best)
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())
    assert sorted(path.parent for path in tmp_path.rglob("curvature-*")) == [best, last]
    assert checkpoints.fault_of(best) is checkpoints.fault_of(last) is None
