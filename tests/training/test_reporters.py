"""W&B (offline), trackio (local) and TensorBoard get every number of the curvature; the console shows loss and rate."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from shared.helpers import arguments, llama, token_rows

import hf_so2

ROOT = Path(__file__).parents[2]
STEPS = 3


def train(folder: Path, reporter: str) -> tuple[list[dict[str, float]], hf_so2.SecondOrderTrainer]:
    """The logs of training steps, under the names that transformers gives them in trackers."""
    settings = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": STEPS, "run_name": "run"}
    args = arguments(folder / "out", report_to=reporter, **settings)
    trainer = hf_so2.SecondOrderTrainer(model=llama(), args=args, train_dataset=token_rows())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    named = [{f"train/{name}": value for name, value in entry.items() if name != "step"} for entry in logs]
    assert all(sum(name.startswith("train/curvature/") for name in entry) >= 19 for entry in named)
    return named, trainer


def installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")


def assert_readable(written: str) -> None:
    assert written.count("'loss'") == STEPS
    assert "'learning_rate'" in written
    assert "curvature/" not in written


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    logs, _ = train(tmp_path, "tensorboard")
    assert_readable("".join(capsys.readouterr()))
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    for name in logs[0].keys() - {"train/epoch"}:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(step + 1, pytest.approx(entry[name], rel=1e-6)) for step, entry in enumerate(logs)]
        assert shown == expected, name


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    installed("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    import wandb

    try:
        logs, _ = train(tmp_path, "wandb")
        assert_readable("".join(capsys.readouterr()))
        assert wandb.run is not None
        summary, config = dict(wandb.run.summary), dict(wandb.run.config)
    finally:
        wandb.finish()
    for name, value in logs[-1].items():
        assert summary[name] == pytest.approx(value), name
    assert (config["optim"], config["curvature_log"]) == ("kfac", "role")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(100):  # a process of its own writes it
        if b"train/curvature/mlp/damping_A" in file.read_bytes():
            break
        time.sleep(0.2)
    assert b"train/curvature/mlp/damping_A" in file.read_bytes()


def test_trackio(tmp_path: Path) -> None:
    """In a process of its own: trackio reads where its folder is when it is imported."""
    installed("trackio")
    code = f"""
import json
from pathlib import Path
from training.test_reporters import train
logs, _ = train(Path({str(tmp_path)!r}), "trackio")
Path({str(tmp_path)!r}, "logs.json").write_text(json.dumps(logs))
"""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "tracked"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_readable(done.stdout + done.stderr)
    logs = json.loads((tmp_path / "logs.json").read_text("utf-8"))
    (file,) = (tmp_path / "tracked").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT metrics FROM metrics WHERE run_name = 'run' ORDER BY step").fetchall()
    shown: list[dict[str, Any]] = [json.loads(text) for (text,) in rows]
    for expected, entry in zip(logs, (entry for entry in shown if "train/loss" in entry), strict=True):
        assert {name: entry[name] for name in expected} == pytest.approx(expected)
