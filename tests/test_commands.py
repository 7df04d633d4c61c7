"""The console's `hf-so2`: help, mistakes, and the same program behind it as behind scripts/."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_so2 import commands


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 2, "usage: hf-so2 COMMAND"),
        (["--help"], 0, "usage: hf-so2 COMMAND"),
        (["trian"], 2, "error: command='trian': must be one of train (did you mean 'train'?)"),
        (["train", "--optim", "kfca"], 2, "error: optim='kfca': must be one of"),
        (["train", "--nonsense", "1"], 2, "error: unknown argument '--nonsense'"),
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


def test_help_of_a_command_is_the_scripts() -> None:
    command = [sys.executable, "-m", "hf_so2.commands", "train", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Trains a causal language model" in shown
    assert "--mup_base_width" in shown
