"""Equal time: how many steps fit into some seconds, and the command from timing to table."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_so2 import commands
from hf_so2.benchmark.rounds import Pace
from hf_so2.commands import equal_time

FALLBACK = "fallback_learning_rate"

SECONDS = st.lists(st.floats(1e-3, 10), min_size=2, max_size=30)


@given(taken=SECONDS, steps=st.integers(1, 200))
def test_the_steps_that_fit_into_the_time_of_some_steps_are_those_steps(taken: list[float], steps: int) -> None:
    pace = Pace(taken)
    assert pace.steps_in(pace.time_of(steps) * (1 + 1e-12)) == steps
    assert pace.steps_in(pace.time_of(steps) * (1 - 1e-6)) == max(steps - 1, 1)


@given(taken=SECONDS, steps=st.integers(1, 200))
def test_later_steps_cost_the_mean_of_the_second_half(taken: list[float], steps: int) -> None:
    half = taken[len(taken) // 2 :]
    endless = itertools.chain(taken, itertools.repeat(sum(half) / len(half)))
    assert Pace(taken).time_of(steps) == pytest.approx(sum(itertools.islice(endless, steps)))


def test_a_slower_optimizer_gets_fewer_steps() -> None:
    fast, slow = Pace([1.0] * 10), Pace([4.0] * 2 + [2.0] * 8)
    assert fast.steps_in(fast.time_of(100)) == 100
    assert slow.steps_in(fast.time_of(100)) == 2 + (100 - 8) // 2


def test_the_command_times_and_trains(tmp_path: Path) -> None:
    flags = {
        "config_overrides": "hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2",
        "mup_base_width": 16,
        "max_seq_length": 16,
        "vocab_size": 300,
        "max_eval_samples": 4,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
    }
    program = [sys.executable, "-m", "hf_so2", "equal-time", "transfer", f"--output_dir={tmp_path}"]
    program += ["--optim=kfac_mup:preconditioner_update_steps=3", "--steps=4", "--timing_steps=2"]
    program += [f"--set={name}={value}" for name, value in flags.items()]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "equal_time.json").read_text("utf-8"))
    baseline, kfac = report["optimizers"]
    assert (baseline["name"], baseline["pace"], baseline["steps"]) == ("adamw_mup", 1.0, {"1": 4})
    assert kfac["name"] == "kfac_mup:preconditioner_update_steps=3"
    assert kfac["steps"]["1"] >= 1
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()]
    for entry in (baseline, kfac):
        for share, steps in entry["steps"].items():
            flags = {"optim": entry["name"].partition(":")[0], "max_steps": str(steps)}
            found = [run for run in runs if flags.items() <= run["flags"].items()]
            assert [run["metrics"]["eval_loss"] for run in found] == entry["losses"][share]
    assert all(
        run["flags"]["preconditioner_update_steps"] == "3" for run in runs if run["flags"]["optim"] == "kfac_mup"
    )
    assert done.stdout.count("\n| `") == 2
    assert (tmp_path / "equal_time.png").stat().st_size > 0


def test_both_rates_are_tuned_at_the_longest_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up loss, lowest at four times the one default and half the other."""
    trained = []

    def run_grid(program: object, settings: str, grid: Sequence[Mapping[str, str]], *_: object) -> Iterator[Any]:
        for flags in grid:
            trained.append(flags)
            apart = [math.log2(float(flags[name]) / best) for name, best in (("learning_rate", 0.24), (FALLBACK, 0.04))]
            yield {"flags": flags, "metrics": {"eval_loss": 3 + sum(x * x for x in apart)}}

    monkeypatch.setattr(equal_time, "run_grid", run_grid)
    monkeypatch.setattr(equal_time, "_paces", lambda names, *_: {name: Pace([1.0, 1.0]) for name in names})
    command = "equal-time quickstart --optim kfac --baseline muon --steps 10 --tune 2 --shares 0.5 1 --seeds 0 1"
    monkeypatch.setattr(sys, "argv", ["hf-so2", *command.split(), f"--output_dir={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 0
    report = json.loads((tmp_path / "equal_time.json").read_text("utf-8"))
    for entry in report["optimizers"]:
        assert {name: float(rate) for name, rate in entry["rates"].items()} == {"learning_rate": 0.24, FALLBACK: 0.04}
        assert (entry["steps"], entry["losses"]) == ({"0.5": 5, "1": 10}, {"0.5": [3, 3], "1": [3, 3]})
    assert {(flags["max_steps"], flags["seed"]) for flags in trained if flags["learning_rate"] != "0.24"} == {
        ("10", "0")
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("quickstart", "--optim", "kfca"), "optim='kfca': must be one of"),
        (("quickstart", "--optim", "kfac", "--shares", "0"), "shares=[0.0]: must be numbers above 0"),
        (("quickstart", "--optim", "kfac", "--tune", "1"), "tune=1.0: must be above 1"),
        (("quickstart", "--optim", "kfac", "--set", "damping=-1"), "damping=-1.0: must be"),
        (("nothing.yaml", "--optim", "kfac"), "settings='nothing.yaml': must be an existing"),
        (
            ("quickstart", "--optim", "kfac", "--set", "model_name_or_path=out/quickstart"),
            "model_name_or_path='out/quickstart': must be left out",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-so2", "equal-time", *arguments])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert line in said.err
    assert said.err.count("\n") == 1
