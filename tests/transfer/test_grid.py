"""Grids: every combination once, nothing lost, honest tables; and the real command with a stand-in for training."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_so2.errors import ConfigurationError
from hf_so2.transfer.grid import GridStore, combinations, markdown_table, mean_losses, optima, parse_axis, run_grid
from hf_so2.transfer.reporting.plots import plot_losses

ROOT = Path(__file__).parents[2]

# Writes a loss that depends on its flags, as scripts/train.py would, and a line per call.
STAND_IN = """
import json, pathlib, sys
flags = dict(part.lstrip("-").split("=", 1) for part in sys.argv[2:])
with open(sys.argv[1], "a") as calls:
    calls.write(json.dumps(flags) + "\\n")
if flags["x"] == "wrong":
    print("error: x='wrong': must be a number", file=sys.stderr)
    sys.exit(2)
if flags["x"] == "9":
    sys.exit(3)
output = pathlib.Path(flags["output_dir"])
output.mkdir()
(output / "all_results.json").write_text(json.dumps({"eval_loss": (float(flags["x"]) - 2) ** 2 + float(flags["y"])}))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(STAND_IN)
    return path


@given(st.dictionaries(st.text(min_size=1), st.lists(st.text(), min_size=1, max_size=4, unique=True), max_size=4))
def test_combinations_are_the_product(axes: dict[str, list[str]]) -> None:
    found = combinations(axes)
    assert len(found) == math.prod(len(values) for values in axes.values())
    assert len({tuple(flags.items()) for flags in found}) == len(found)
    assert all(flags[name] in axes[name] for flags in found for name in axes)


@pytest.mark.parametrize("text", ["x", "=1", "x=", "x=1,,2"])
def test_an_axis_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="name=value"):
        parse_axis(text)


def test_finished_runs_are_kept_and_not_repeated(script: Path, tmp_path: Path) -> None:
    calls, output = tmp_path / "calls", tmp_path / "results" / "runs.jsonl"
    first = combinations({"x": ["1", "2"], "y": ["0"]})
    assert len(list(run_grid([str(script)], str(calls), first, GridStore(output), jobs=2))) == 2
    every = combinations({"x": ["1", "2", "3"], "y": ["0", "5"]})
    runs = list(run_grid([str(script)], str(calls), every, GridStore(output), jobs=2))
    assert [run["flags"] for run in runs] == every
    assert len(calls.read_text().splitlines()) == len(output.read_text().splitlines()) == 6
    losses = mean_losses(runs, "x", "y")
    assert losses == {(x, y): (float(x) - 2) ** 2 + float(y) for x in "123" for y in "05"}
    assert optima(losses) == {"0": "2", "5": "2"}


def test_a_diverged_run_is_a_result_and_a_refused_one_an_error(script: Path, tmp_path: Path) -> None:
    calls, store = str(tmp_path / "calls"), GridStore(tmp_path / "runs.jsonl")
    (diverged,) = run_grid([str(script)], calls, [{"x": "9", "y": "0"}], store, jobs=1)
    assert diverged["metrics"] == {"eval_loss": None}
    with pytest.raises(ConfigurationError, match="x='wrong': must be a number"):
        list(run_grid([str(script)], calls, [{"x": "wrong", "y": "0"}], store, jobs=1))
    assert len(store.runs) == 1


@pytest.mark.parametrize("line", ['{"settings": "a", "fla', '{"loss": 1}', "[1]"])
def test_a_file_of_something_else_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"settings": "a", "flags": {}, "metrics": {}}) + "\n\n" + line)
    with pytest.raises(ConfigurationError, match=r"^output=.*which line 3 is not"):
        GridStore(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid=x=1", "--jobs=0"], "jobs=0: must be at least 1"),
        (["--grid=x=1", "--output={folder}/file/runs.jsonl"], "output='{folder}/file': must be a folder"),
        (["--grid=x=1", "--optimizer=kfac"], "unrecognized arguments: --optimizer=kfac"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(flags: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "settings.yaml").write_text("model_type: llama\n")
    command = [sys.executable, str(ROOT / "scripts" / "grid.py"), str(tmp_path / "settings.yaml"), "--optim=kfac"]
    command += [f"--output={tmp_path}/runs.jsonl", *(flag.format(folder=tmp_path) for flag in flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message.format(folder=tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "settings.yaml"}


def test_tables_average_seeds_and_mark_the_best_of_each_column() -> None:
    def run(x: str, y: str, seed: str, loss: float | None) -> dict[str, object]:
        return {"flags": {"x": x, "y": y, "seed": seed}, "metrics": {"eval_loss": loss}}

    runs = [run("1", "a", "0", 2.0), run("1", "a", "1", 4.0), run("2", "a", "0", 2.5), run("2", "b", "0", None)]
    losses = mean_losses(runs, "x", "y")
    assert losses == {("1", "a"): 3.0, ("2", "a"): 2.5, ("2", "b"): math.inf}
    assert markdown_table(losses, "x", "y").splitlines() == [
        "| x \\ y | a | b |",
        "|---|---|---|",
        "| 1 | 3.000 |  |",
        "| 2 | **2.500** | diverged |",
    ]


def test_a_figure_leaves_diverged_runs_out(tmp_path: Path) -> None:
    losses = {("0.1", "64"): 2.0, ("0.2", "64"): 1.5, ("0.1", "128"): 1.9, ("0.2", "128"): math.inf}
    plot_losses({"kfac_mup": losses}, tmp_path / "figure.png", "learning_rate", "width")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_table_of_a_finished_grid(tmp_path: Path) -> None:
    settings = str(ROOT / "configs" / "quickstart.yaml")
    runs = [
        {"settings": settings, "flags": {"optim": "kfac_mup", "x": x}, "metrics": {"eval_loss": float(x)}} for x in "12"
    ]
    output = tmp_path / "runs.jsonl"
    output.write_text("".join(json.dumps(run) + "\n" for run in runs))
    command = [sys.executable, str(ROOT / "scripts" / "grid.py"), settings, "--optim", "kfac_mup", "--grid", "x=1,2"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=True)
    assert "best x: 1" in done.stdout
    missing = subprocess.run([*command[:2], "no.yaml", *command[3:], "--output", str(output)], capture_output=True)
    assert missing.returncode == 2
    assert missing.stderr.decode().strip() == "error: settings='no.yaml': must be an existing YAML or JSON file"
