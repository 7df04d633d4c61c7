"""Settings files, flags and the one line that answers a mistake."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
from transformers import IntervalStrategy

from hf_so2 import cli
from hf_so2.errors import ConfigurationError, TrainingDivergedError


@dataclass
class Options:
    """One field of every kind that scripts have."""

    steps: int = 10
    learning_rate: float | None = None
    verbose: bool = False
    shuffle: bool = True
    strategy: IntervalStrategy = IntervalStrategy.STEPS
    overrides: dict | str | None = None
    widths: list[int] = field(default_factory=lambda: [64])

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError("steps is negative:\n  that makes no sense")
        if self.steps == 13:
            raise ConfigurationError("steps", self.steps, "must not be unlucky")


def parsed(*argv: str) -> Options:
    (options,) = cli.parse((Options,), argv)
    return options


def settings(tmp_path: Path, text: str, name: str = "settings.yaml") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    text = "steps: 3\nlearning_rate: 1e-3\nshuffle: false\nstrategy: no\nwidths: [1, 2]\noverrides: {a: 1}\n"
    options = parsed(settings(tmp_path, text), "--steps", "4", "--verbose")
    assert options == Options(4, 0.001, True, False, IntervalStrategy.NO, '{"a": 1}', [1, 2])


def test_json_settings_and_nulls(tmp_path: Path) -> None:
    text = json.dumps({"steps": 5, "learning_rate": None, "verbose": True})
    assert parsed(settings(tmp_path, text, "settings.json")) == Options(steps=5, verbose=True)
    assert parsed(settings(tmp_path, "widths: []\nlearning_rate:\nsteps: 5")) == Options(steps=5)


def test_no_file_is_needed() -> None:
    assert parsed("--widths", "8", "16", "--learning-rate=-2e-3") == Options(learning_rate=-2e-3, widths=[8, 16])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "3"], "unknown argument '--step' (did you mean 'steps'?)"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--steps"], "expected one argument"),
        (["--steps=-1"], "steps is negative: that makes no sense"),
        (["stray"], "unknown argument 'stray'"),
        (["--steps=3", "late.yaml"], "unknown argument 'late.yaml'; a settings file must be the first one"),
    ],
)
def test_a_usage_error_is_one_line_and_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"setting='stepz': must be a known setting \(did you mean 'steps'\?\)"),
        ("- steps", "must hold a mapping"),
        ("a: b: c", "cannot be read"),
        ("strategy: stepz", r"strategy='stepz': must be one of no, steps, epoch \(did you mean 'steps'\?\)"),
        ("steps: 13", "steps=13: must not be unlucky"),
        ("steps: [3, 4]", r"steps=\[3, 4\]: must be one value, not a list"),
    ],
)
def test_a_bad_settings_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parsed(settings(tmp_path, text))


def test_a_missing_settings_file_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"settings file='missing\.yaml': must be an existing"):
        parsed("missing.yaml")


def test_help_says_what_the_script_does_and_what_holds_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class More:
        _argument_group_name = "more of them"
        name: str = field(default="x", metadata={"help": "what it is called"})

    described = mock.patch.object(sys.modules["__main__"], "__doc__", "Does it.\n\n    python it.py\n")
    with described, pytest.raises(SystemExit) as stop:
        cli.parse((Options, More), ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ")
    assert "[SETTINGS.yaml] [--flag value ...]\n\nDoes it.\n\n    python it.py\n" in shown
    assert shown.index("--widths") < shown.index("more of them:") < shown.index("what it is called (default: x)")


def test_main_turns_mistakes_into_a_line_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> None:
        raise ConfigurationError("width", 130, "must be\na multiple of 4")

    def diverging() -> None:
        raise TrainingDivergedError("too many bad steps")

    assert cli.main(mistaken) == 2
    assert capsys.readouterr().err == "error: width=130: must be a multiple of 4\n"
    assert cli.main(diverging) == 3
    assert capsys.readouterr().err == "error: too many bad steps\n"
    assert cli.main(lambda: 1) == 1
    assert cli.main(lambda: None) == 0


def test_only_the_main_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> None:
        raise ConfigurationError("width", 130, "must be even")

    monkeypatch.setenv("RANK", "1")
    assert cli.main(mistaken) == 2
    assert capsys.readouterr().err == ""


def test_a_defect_keeps_its_traceback() -> None:
    def broken() -> None:
        raise KeyError("defect")

    with pytest.raises(KeyError):
        cli.main(broken)
