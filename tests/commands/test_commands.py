"""The console's `hf-so2`: help, mistakes, what comes with it, and the same program behind it as behind scripts/."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from hf_so2 import cli, commands

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 2, "usage: hf-so2 COMMAND"),
        (["--help"], 0, "usage: hf-so2 COMMAND"),
        (["trian"], 2, "error: command='trian': must be one of train, sweep, coord-check"),
        (["train", "--optim", "kfca"], 2, "error: optim='kfca': must be one of"),
        (["train", "--nonsense", "1"], 2, "error: unknown argument '--nonsense'"),
        (["train", "quikstart"], 2, "error: unknown argument 'quikstart' (did you mean 'quickstart'?)"),
        (["train", "--max_steps=1", "quickstart"], 2, "'quickstart'; a settings file must be the first one"),
        (["train", "quickstart", "--damping=-1"], 2, "error: damping=-1.0: must be"),
        (["sweep", "quickstart", "--widths", "64", "--width=64"], 2, "error: width=64: must be left out"),
        (["coord-check", "quickstart", "--widths", "64", "65"], 2, "width=65"),
        (["grid", "nothing.yaml", "--optim=kfac", "--output=x.jsonl"], 2, "error: settings='nothing.yaml': must be an"),
        (["benchmark", "--rounds=0"], 2, "error: rounds=0: must be at least 1"),
        (["scaling", "--ranks=8"], 2, "error: unrecognized arguments: --ranks=8"),
        (["mup-coverage", "llamma"], 2, "error: types=['llamma']: must be causal language models"),
        (["papers", "kfac"], 2, "error: argument name: invalid choice: 'kfac'"),
        (["config", "quikstart"], 2, "error: name='quikstart': must be one of quickstart, transfer, accelerate/fsdp"),
    ],
)
def test_help_and_mistakes(
    argv: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-so2", *argv])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == code
    written = "".join(capsys.readouterr())
    assert said in written
    assert written.count("\n") == 1 or "usage" in written


@pytest.mark.parametrize("module", ["hf_so2", "hf_so2.commands"])
def test_the_package_can_be_run_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "train", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Trains a causal language model" in shown
    assert "--mup_base_width" in shown


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_help_and_a_door_in_the_clone(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-so2", name, "--help"])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert not ended.value.code
    module = import_module(f"hf_so2.commands.{name.replace('-', '_')}")
    assert (module.__doc__ or "nothing").partition("\n")[0] in capsys.readouterr().out
    assert name == "config" or f"hf_so2.commands.{name.replace('-', '_')} import main" in (
        SCRIPTS / f"{name.replace('-', '_')}.py"
    ).read_text("utf-8")


def test_settings_that_come_with_the_package_are_listed_and_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = cli.packaged_settings()
    assert {"quickstart", "transfer", "accelerate/fsdp"} <= set(known)
    for arguments in ([], ["quickstart"]):
        monkeypatch.setattr(sys, "argv", ["hf-so2", "config", *arguments])
        with pytest.raises(SystemExit):
            commands.main()
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{shown}" for name in known)
    assert known["quickstart"].read_text("utf-8") in shown
    assert yaml.safe_load(known["quickstart"].read_text("utf-8"))["optim"] == "kfac_mup"


def test_what_was_typed_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-so2 sweep", "quickstart", "--train_file", "my *.txt"])
    assert cli.command_line() == "hf-so2 sweep quickstart --train_file 'my *.txt'"
    monkeypatch.setattr(sys, "argv", ["scripts/sweep.py", "--optim=kfac"])
    assert cli.command_line() == "python scripts/sweep.py --optim=kfac"
