"""Telemetry through the Trainer's log: which steps, which keys, and that training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import arguments, assert_same_parameters, llama, optimizer_of, token_rows
from transformers import PrinterCallback, TrainerCallback

import hf_so2

LOGGED = {"logging_strategy": "steps", "logging_steps": 3, "logging_first_step": True, "max_steps": 7}


class Recording(TrainerCallback):
    """Keeps what a reporter such as TensorBoard's is handed, by step."""

    def __init__(self) -> None:
        self.logs: dict[int, dict[str, float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs[state.global_step] = dict(logs)
        else:
            assert not any(key.startswith("curvature/") for key in logs)


def run(folder: Path, **changes: Any) -> tuple[hf_so2.SecondOrderTrainer, dict[int, dict[str, float]]]:
    recording = Recording()
    trainer = hf_so2.SecondOrderTrainer(
        model=llama(),
        args=arguments(folder, **(LOGGED | changes)),
        train_dataset=token_rows(),
        eval_dataset=token_rows(8),
        callbacks=[recording],
    )
    trainer.train()
    return trainer, recording.logs


@pytest.mark.parametrize("optim", ["kfac", "ekfac"])
def test_every_level_trains_bit_for_bit_alike(optim: str, tmp_path: Path) -> None:
    """Logged after step 1 and every third, on those steps the sizes of updates too, and by default by role."""
    silent, logs = run(tmp_path, optim=optim, curvature_log="none")
    assert not any(key.startswith("curvature/") for log in logs.values() for key in log)
    sides = ("_A", "_B") if optim == "kfac" else ("",)
    quantities = {f"{name}{side}" for name in ("trace", "damping", "condition") for side in sides} | {"update_rms"}
    for level in ({}, {"curvature_log": "layer"}):
        trainer, logs = run(tmp_path, optim=optim, eval_strategy="steps", eval_steps=2, **level)
        assert_same_parameters(trainer.model, silent.model)
        assert list(logs) == [1, 3, 6]
        names = optimizer_of(trainer).curvature.layers if level else ("attention", "mlp")
        expected = {f"curvature/{name}/{quantity}" for name in names for quantity in quantities}
        counts = ("refresh_seconds", "failed_refreshes", "dropped_statistics", "overflowed_updates", "skipped_steps")
        expected |= {f"curvature/{name}" for name in counts}
        for log in logs.values():
            assert {key for key in log if key.startswith("curvature/")} == expected
            assert all(isinstance(log[key], int | float) for key in expected)


def test_kl_clip_factor_is_logged(tmp_path: Path) -> None:
    _, logs = run(tmp_path, norm_control="kl_clip", kl_clip=1e-9, learning_rate=0.1, max_steps=1)
    assert all(0 < log["curvature/kl_clip_factor"] < 1 for log in logs.values())


@pytest.mark.parametrize(
    ("changes", "observed"),
    [
        ({"logging_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}, [1, 3, 6]),
        ({"logging_strategy": "epoch", "logging_first_step": False, "max_steps": -1, "num_train_epochs": 2}, [4, 8]),
        ({"logging_strategy": "no", "logging_first_step": False}, []),
    ],
    ids=["steps", "epoch", "no"],
)
def test_only_logged_steps_are_observed(changes: dict[str, Any], observed: list[int], tmp_path: Path) -> None:
    trainer, logs = run(tmp_path, **changes)
    assert list(logs) == observed
    assert all("curvature/mlp/update_rms" in log for log in logs.values())
    assert optimizer_of(trainer)._record.step == (observed[-1] if observed else 0)


@pytest.mark.parametrize("optim", ["adamw", "adamw_torch"])
def test_first_order_and_foreign_optimizers_log_as_ever(optim: str, tmp_path: Path) -> None:
    _, logs = run(tmp_path, optim=optim, max_steps=1)
    assert logs
    for log in logs.values():
        assert not any(key.startswith("curvature/") for key in log)


def test_unknown_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^curvature_log='all': must be one of none, role, layer$"):
        arguments(tmp_path, curvature_log="all")


def test_tensorboard_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    run(tmp_path, report_to="tensorboard", max_steps=1)
    events = accumulator.EventAccumulator(str(tmp_path / "runs")).Reload()
    assert "train/curvature/attention/condition_A" in events.Tags()["scalars"]
    assert torch.isfinite(torch.tensor([e.value for e in events.Scalars("train/curvature/mlp/update_rms")])).all()


@pytest.mark.parametrize("bar", [True, False], ids=["bar", "printed"])
def test_console_shows_the_loss_and_not_the_curvature(
    bar: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What trackers and `trainer_state.json` are for would drown it."""
    trainer, logs = run(tmp_path, disable_tqdm=not bar, max_steps=1)
    written = "".join(capsys.readouterr())
    assert "'loss'" in written
    assert "'learning_rate'" in written
    assert "curvature/" not in written
    assert "curvature/mlp/update_rms" in logs[1]
    assert "curvature/mlp/update_rms" in trainer.state.log_history[0]


def test_a_callback_of_the_users_own_keeps_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Verbose(PrinterCallback):
        pass

    trainer = hf_so2.SecondOrderTrainer(
        model=llama(), args=arguments(tmp_path, **(LOGGED | {"max_steps": 1})), train_dataset=token_rows()
    )
    trainer.remove_callback(PrinterCallback)  # found by the name that the user knows
    trainer.add_callback(Verbose)
    trainer.train()
    written = capsys.readouterr().out
    assert written.count("'loss'") == 1
    assert "curvature/" in written
