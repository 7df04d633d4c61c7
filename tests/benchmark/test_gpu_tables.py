"""The tables of a GPU are made by programs that also run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_so2.benchmark.device_check import Setting
from hf_so2.commands import device_check

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_script_runs_in_miniature_on_a_cpu(tmp_path: Path) -> None:
    subprocess.run(
        [ROOT / "scripts" / "gpu_tables.sh", tmp_path, "miniature"],
        check=True,
        env=os.environ | {"PYTHON": sys.executable},
        timeout=300,
    )
    errors = json.loads((tmp_path / "check" / "device_check.json").read_text("utf-8"))["errors"]
    assert 0 < errors["kfac"]["float32"] < 1e-4
    for name in ("float32", "bf16"):
        table = (tmp_path / f"{name}.log").read_text("utf-8")
        assert "torch.AdamW" in table
        assert "kfac" in table


def test_an_error_on_the_device_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def off_by_a_tenth(name: str, setting: Setting, device: torch.device) -> dict[str, torch.Tensor]:
        return {"weight": torch.ones(3, dtype=torch.float64) * (1.1 if device.type == "meta" else 1.0)}

    monkeypatch.setattr(device_check, "learned", off_by_a_tenth)
    monkeypatch.setattr(device_check, "waits_of", lambda name, device: {"backward": {}})
    settings = ["--optim", "sgd", "--settings", "float32", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["device_check", *settings, "--device", "meta"])
    assert device_check.main() == 1
    monkeypatch.setattr(sys, "argv", ["device_check", *settings, "--device", "cpu"])
    assert device_check.main() == 0
