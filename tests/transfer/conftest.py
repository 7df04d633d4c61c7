"""The command-line scripts in this process, on a file of short documents."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from hf_so2 import cli

SCRIPTS = Path(__file__).parents[2] / "scripts"
RunScript = Callable[[str, Iterable[str]], int]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    rows = (json.dumps({"text": f"def f{index}(x):\n    return x + {index}\n"}) for index in range(200))
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(workspace: Path) -> list[str]:
    """Flags of a model and data that train in a moment."""
    config = "hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=4,num_key_value_heads=2"
    flags = {
        "model_type": "llama",
        "config_overrides": config,
        "train_file": workspace / "train.jsonl",
        "cache_dir": workspace / "cache",
        "vocab_size": 300,
        "max_seq_length": 16,
        "max_eval_samples": 8,
        "optim": "kfac_mup",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "use_cpu": True,
        "seed": 0,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> RunScript:
    """The exit code of a script with some arguments."""

    def call(name: str, argv: Iterable[str]) -> int:
        path = SCRIPTS / name
        spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
        assert spec is not None
        assert spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        monkeypatch.setattr(sys, "argv", [name, *argv])
        try:
            return cli.main(script.main)
        except SystemExit as stop:
            return int(stop.code or 0)

    return call
