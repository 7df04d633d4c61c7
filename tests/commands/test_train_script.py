"""scripts/train.py as a user runs it: through the launcher, resumed, and with every mistake of theirs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_so2 import cli

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train.py"
STEPS, HALF = 6, 3
TINY = "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2"


def flags(workspace: Path, **changes: object) -> list[str]:
    """A tiny run on a file of 200 short documents."""
    given: dict[str, object] = {
        "model_type": "llama",
        "config_overrides": TINY,
        "train_file": workspace / "train.jsonl",
        "cache_dir": workspace / "cache",
        "vocab_size": 300,
        "max_seq_length": 16,
        "max_eval_samples": 8,
        "optim": "kfac_mup",
        "mup_base_width": 32,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": HALF,
        "logging_steps": 1,
        "use_cpu": True,
        "output_dir": workspace / "out",
    }
    return [f"--{name}={value}" for name, value in (given | changes).items() if value is not None]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    rows = (json.dumps({"text": f"def f{index}(x):\n    return x + {index}\n"}) for index in range(200))
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(workspace: Path) -> subprocess.CompletedProcess[str]:
    return launch("-m", "accelerate.commands.launch", str(SCRIPT), *flags(workspace))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """The script's body in this process: the exit code for a command line."""
    spec = importlib.util.spec_from_file_location("train_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(argv: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv])
        try:
            return cli.main(script.main)
        except SystemExit as stop:
            return int(stop.code or 0)

    return call


def test_the_launched_command_trains_and_leaves_every_report(
    trained: subprocess.CompletedProcess[str], workspace: Path
) -> None:
    assert trained.returncode == 0, trained.stderr
    output = workspace / "out"
    results = json.loads((output / "all_results.json").read_text())
    assert results["perplexity"] == pytest.approx(math.exp(results["eval_loss"]), rel=1e-4)
    assert 0 <= results["token_accuracy"] <= 1
    assert {"train_loss", "train_runtime", "eval_runtime"} <= set(results)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, STEPS + 1))
    for name in ("loss_curve.png", "curvature.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "| optimizer | `kfac_mup` |" in card
    assert "| muP base | width 32; this model has width 32, trained from scratch |" in card
    report = (output / "mup_report.txt").read_text(encoding="utf-8")
    assert report in trained.stdout
    for pattern in ("model.embed_tokens.weight", "model.layers.*.self_attn.q_proj.weight", "lm_head.weight"):
        assert pattern in report
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"]) == "def f(x):"


@pytest.mark.usefixtures("trained")
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(run: Callable[[list[str]], int], workspace: Path) -> None:
    checkpoint = workspace / "out" / f"checkpoint-{HALF}"
    resumed = workspace / "resumed"
    assert run(flags(workspace, output_dir=resumed, resume_from_checkpoint=checkpoint)) == 0
    expected, actual = (load_file(folder / "model.safetensors") for folder in (workspace / "out", resumed))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    (steps,) = {
        json.loads((folder / "trainer_state.json").read_text())["global_step"]
        for folder in (workspace / "out", resumed)
    }
    assert steps == STEPS


@pytest.mark.usefixtures("trained")
def test_a_torn_checkpoint_is_refused_or_passed_over(
    run: Callable[[list[str]], int], workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(workspace / "out", tmp_path / "out")
    torn = output / f"checkpoint-{STEPS}"
    (torn / "optimizer.pt").unlink()
    assert run(flags(workspace, output_dir=output, resume_from_checkpoint=torn)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: resume_from_checkpoint=")
    assert "optimizer.pt is missing" in error
    assert error.count("\n") == 1
    assert run(flags(workspace, output_dir=output, resume_from_checkpoint="true")) == 0
    assert (torn / "optimizer.pt").is_file()


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd_mup"])
def test_gpt2_and_other_optimizers_train_too(
    optim: str, run: Callable[[list[str]], int], workspace: Path, tmp_path: Path
) -> None:
    overrides = "n_embd=32,n_layer=2,n_head=4"
    base = 32 if optim.endswith("_mup") else None
    argv = flags(
        workspace,
        model_type="gpt2",
        config_overrides=overrides,
        optim=optim,
        mup_base_width=base,
        max_steps=2,
        output_dir=tmp_path / "out",
    )
    assert run(argv) == 0
    assert "perplexity" in json.loads((tmp_path / "out" / "all_results.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "kfacc"}, "kfacc"),
        ({"damping_rule": "tracee"}, "damping_rule='tracee'"),
        ({"damping": -1}, "damping=-1"),
        ({"train_file": "missing.txt"}, "train_file='missing.txt'"),
        ({"train_file": "EMPTY"}, "must not be empty"),
        ({"model_type": "llamma"}, "did you mean 'llama'"),
        ({"config_overrides": "hiden_size=32"}, "did you mean 'hidden_size'"),
        ({"width": 65}, "width=65"),
        ({"mup_base_width": 33}, "33"),
        ({"mup_base_width": None}, "mup_base_width=None"),
        ({"max_seq_length": 4096}, "max_seq_length=4096"),
        ({"resume_from_checkpoint": "missing"}, "resume_from_checkpoint='missing'"),
        ({"resume_from_checkpoint": "last"}, "resume_from_checkpoint='last'"),
        ({"model_name_or_path": "missing"}, "model_name_or_path='missing'"),
        ({"max_stepz": 3}, "did you mean 'max_steps'"),
    ],
)
def test_a_mistake_is_one_line_code_2_and_no_output_folder(
    changes: dict[str, object],
    message: str,
    run: Callable[[list[str]], int],
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if changes.get("train_file") == "EMPTY":
        (tmp_path / "empty.jsonl").touch()
        changes = {"train_file": tmp_path / "empty.jsonl"}
    assert run(flags(workspace, output_dir=tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_process_exits_with_code_2() -> None:
    finished = launch(str(SCRIPT), str(ROOT / "configs" / "quickstart.yaml"), "--optim", "kfacc")
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "did you mean 'kfac'?" in finished.stderr
    assert finished.stdout == ""
