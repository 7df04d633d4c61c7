"""scripts/papers.py: exit codes, refusals in one line, and the real experiments as slow tests."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hf_so2 import cli
from hf_so2.commands import papers
from hf_so2.papers import data, experiments, report
from hf_so2.papers.verdict import Claim, compare

SCRIPT = Path(__file__).parents[2] / "scripts" / "papers.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("papers_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["papers.py", *arguments])
    try:
        return cli.main(script.main)
    except SystemExit as error:
        return int(error.code or 0)


def findings(outcome: str) -> report.Findings:
    samples = {"holds": [0.0] * 3, "fails": [2.0] * 3, "undecided": [0.0]}[outcome]
    claim = Claim(outcome, "0000.00000", "", "it is so", "nothing", (compare("x", samples, below=1.0),))
    return report.Findings((claim,), {}, lambda path: path.write_bytes(b""))


@pytest.mark.parametrize(("outcome", "code"), [("holds", 0), ("fails", 1), ("undecided", 4)])
def test_the_exit_code_is_the_verdict(
    outcome: str, code: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hf_so2.papers.experiments", lambda: {"foof": lambda workers: findings(outcome)})
    assert call(script, monkeypatch, "foof", "--output_dir", str(tmp_path)) == code
    assert (tmp_path / "foof.json").is_file()


def test_all_is_every_experiment(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert set(papers.NAMES) == set(experiments())
    outcomes = dict(zip(papers.NAMES, ("holds", "fails", "undecided"), strict=True))
    made_up = {name: lambda workers, outcome=outcome: findings(outcome) for name, outcome in outcomes.items()}
    monkeypatch.setattr("hf_so2.papers.experiments", lambda: made_up)
    assert call(script, monkeypatch, "all", "--output_dir", str(tmp_path)) == 1
    assert len(list(tmp_path.glob("*.json"))) == 3


@pytest.mark.parametrize(
    "arguments",
    [("kfac",), (), ("foof", "--output_dir", str(SCRIPT)), ("foof", "--seeds", "3"), ("foof", "--workers", "0")],
)
def test_mistakes_end_in_one_line(
    arguments: tuple[str, ...], script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(script, monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_scikit_learn_a_line_says_what_to_install(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert call(script, monkeypatch, "foof", "--output_dir", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "pip install" in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tekfac", "foof", "mup-transfer"])
def test_the_experiments_run(name: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert call(script, monkeypatch, name, "--output_dir", str(tmp_path)) in (0, 1, 4)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    record = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    assert record["seconds"] < 15 * 60
    assert all(len(part["samples"]) >= 3 for claim in record["claims"] for part in claim["comparisons"])
