"""Every file of `configs/accelerate/` starts a training on this machine, with fewer processes and without GPUs."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shared.launching import ACCELERATE, ROOT, launch

from hf_so2.training import checkpoints

CONFIGS = ROOT / "configs" / "accelerate"
SCRIPT = ROOT / "scripts" / "train.py"
RANKS = 2

pytestmark = pytest.mark.slow


def launcher(config: str, *options: str) -> list[str]:
    return [ACCELERATE[0], f"--config_file={CONFIGS / config}", *options]


def flags(folder: Path) -> list[str]:
    """Three steps of a tiny model, saved after the second, whole layers on their owners alone."""
    rows = (json.dumps({"text": f"def f{index}(x):\n    return x + {index}\n"}) for index in range(200))
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    given = {
        "model_type": "llama",
        "config_overrides": "hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=4",
        "train_file": folder / "train.jsonl",
        "cache_dir": folder / "cache",
        "vocab_size": 300,
        "max_seq_length": 16,
        "max_eval_samples": 8,
        "optim": "kfac",
        "gradient_worker_fraction": 0,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "save_steps": 2,
        "use_cpu": True,
        "output_dir": folder / "out",
    }
    return [f"--{name}={value}" for name, value in given.items()]


def check(folder: Path, *, sharded: bool) -> None:
    """All ranks took part in the checkpoint, and the run came to its end."""
    checkpoint = folder / "out" / "checkpoint-2"
    assert checkpoints.world_size_of(checkpoint) == RANKS
    assert len(list(checkpoint.glob("curvature-*"))) == RANKS
    assert checkpoints.is_sharded(checkpoint) == sharded
    assert json.loads((folder / "out" / "all_results.json").read_text())["train_loss"] > 0
    assert (folder / "out" / "model.safetensors").is_file()


def test_one_machine(tmp_path: Path) -> None:
    code, log = launch(launcher("one_machine.yaml", "--main_process_port=0"), RANKS, SCRIPT, *flags(tmp_path))
    assert code == 0, log[-3000:]
    check(tmp_path, sharded=False)


def test_several_machines(tmp_path: Path) -> None:
    """Two launchers of one process each, that find each other by address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = ("--main_process_ip=127.0.0.1", f"--main_process_port={probe.getsockname()[1]}")
    given = flags(tmp_path)

    def start(machine: int) -> tuple[int, str]:
        return launch(launcher("several_machines.yaml", f"--machine_rank={machine}", *address), RANKS, SCRIPT, *given)

    with ThreadPoolExecutor(RANKS) as machines:
        for code, log in machines.map(start, range(RANKS)):
            assert code == 0, log[-3000:]
    check(tmp_path, sharded=False)


def test_fsdp(tmp_path: Path) -> None:
    """Without GPUs accelerate drops FSDP, which is refused; kept by hand, it trains as the file says."""
    settings = launcher("fsdp.yaml", "--main_process_port=0")
    code, log = launch(settings, RANKS, SCRIPT, *flags(tmp_path))
    assert code != 0
    assert "fsdp=True: is left out by accelerate on a machine without GPUs" in log
    assert not (tmp_path / "out").exists()
    code, log = launch(settings, RANKS, Path(__file__).with_name("fsdp_program.py"), *flags(tmp_path))
    assert code == 0, log[-3000:]
    check(tmp_path, sharded=True)
