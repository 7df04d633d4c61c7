"""scripts/sweep.py from its flags to its files: mostly with made-up losses in place of training, once for real."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from hf_so2.transfer import sweep as sweep_module
from hf_so2.transfer.recipe import read_recipe
from hf_so2.transfer.runner import HopelessPruner, TrialTask, _suggest, run_trial
from hf_so2.transfer.space import Space
from hf_so2.transfer.store import SweepStore, study_name

ROOT = Path(__file__).parents[2]
GRID = "--grid=learning_rate=0.03,0.06,0.12,0.24"
Loss = Callable[[int, Mapping[str, float], int], float]
connect = functools.cache(optuna.storages.get_storage)


def parabola(width: int, params: Mapping[str, float], seed: int) -> float:
    """Least at 0.1, lower for wider models, a little different for every seed and setting."""
    rate = params["learning_rate"]
    return 3.5 - 0.1 * math.log2(width) + 0.05 * math.log2(rate / 0.1) ** 2 + 0.001 * seed * math.sin(1e3 * rate)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loss], list[tuple[Any, ...]]]:
    """Puts a formula in the place of training; gives the list of the trials that were run."""

    def install(loss: Loss) -> list[tuple[Any, ...]]:
        ran: list[tuple[Any, ...]] = []

        def run(task: TrialTask) -> None:
            study = optuna.load_study(study_name=task.study, storage=connect(task.url))
            trial = study.ask()
            params, seed = _suggest(task.space, trial), trial.user_attrs["seed"]
            ran.append((task.study, *params.values(), seed))
            study.tell(trial, loss(int(task.study.rpartition("width")[2]), params, seed))

        monkeypatch.setattr(sweep_module, "run_trial", run)
        return ran

    return install


def trials_of(folder: Path) -> list[dict[str, Any]]:
    optimizers = json.loads((folder / "sweep.json").read_text())["optimizers"]
    return [trial for content in optimizers.values() for trial in content["trials"]]


def test_a_confirmed_transfer_leaves_a_recipe_and_a_report(
    made_up: Callable[..., Any], run_script: Callable[..., int], tiny: list[str], tmp_path: Path
) -> None:
    ran = made_up(parabola)
    argv = [*tiny, "--widths", "16", "32", GRID, f"--output_dir={tmp_path}"]
    assert run_script("sweep.py", [*argv, "--coordinate_check", "false"]) == 0
    assert Counter(seed for *_, seed in ran) == {0: 8, 1: 6, 2: 6}
    assert len(set(ran)) == len(ran) == len(trials_of(tmp_path))
    recipe = read_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.transfer["confirmed"]
    assert recipe.optimizer["learning_rate"] == 0.12
    assert recipe.base == {"mup_base_width": 16, "mup_base_depth": 1}
    assert recipe.training["max_steps"] == 4
    assert recipe.losses[16] > recipe.losses[32]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "It transfers" in html
    assert html.count("data:image/png;base64,") == 2
    assert "<link" not in html
    assert 'src="http' not in html
    for name in ("sweep.png", "widths.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    before = trials_of(tmp_path)
    ran.clear()
    assert run_script("sweep.py", [*argv, "--coordinate_check", "false"]) == 0
    assert not ran
    assert trials_of(tmp_path) == before
    # Other settings may not be mixed into the same folder.
    assert run_script("sweep.py", [*argv, "--max_steps=5"]) == 2


def test_an_optimum_on_the_edge_says_so_and_extend_goes_on(
    made_up: Callable[..., Any],
    run_script: Callable[..., int],
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = made_up(parabola)
    argv = [*tiny, "--widths", "16", "32", "--grid=learning_rate=0.01,0.02,0.04", "--seeds=1", "--no_coordinate_check"]
    argv.append(f"--output_dir={tmp_path}")
    assert run_script("sweep.py", argv) == 1
    assert "too few trials" in capsys.readouterr().out
    assert "NOT CONFIRMED" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    ran.clear()
    assert run_script("sweep.py", [*argv, "--extend"]) == 0
    assert sorted({rate for _, rate, _ in ran}) == [0.08, 0.16]
    assert "extended: learning_rate on its high edge" in capsys.readouterr().out
    ran.clear()
    assert run_script("sweep.py", argv) == 0  # what was added is part of the sweep from then on
    assert not ran


def test_optuna_samples_ranges_of_several_flags_and_sp_is_shown_beside(
    made_up: Callable[..., Any], run_script: Callable[..., int], tiny: list[str], tmp_path: Path
) -> None:
    ran = made_up(lambda width, params, seed: parabola(width, params, seed) + 0.01 * abs(math.log(params["damping"])))
    argv = ["--search", "learning_rate=0.02:0.5", "damping=1e-4:1e-2", "--trials=8", "--seeds=2", "--finalists=2"]
    argv += ["--widths", "16", "32", "--compare", f"--output_dir={tmp_path}", "--no_coordinate_check"]
    assert run_script("sweep.py", [*tiny, *argv]) in (0, 1)
    assert len(ran) == 2 * (8 + 2 * 2)
    first = [run for run in ran if run[-1] == 0]
    assert len(set(first)) == 16
    assert {run[0] for run in ran} == {f"{name}-width{width}" for name in ("kfac_mup", "kfac") for width in (16, 32)}
    assert all(0.02 <= rate <= 0.5 and 1e-4 <= damping <= 1e-2 for _, rate, damping, _ in ran)
    assert (tmp_path / "sweep_damping.png").is_file()
    assert read_recipe(str(tmp_path / "recipe.yaml")).optimizer["optim"] == "kfac_mup"


def test_the_minutes_end_a_sweep_and_the_same_command_goes_on(
    made_up: Callable[..., Any], run_script: Callable[..., int], tiny: list[str], tmp_path: Path
) -> None:
    ran = made_up(parabola)
    argv = [*tiny, "--widths", "16", "32", GRID, "--seeds=1", "--no_coordinate_check", f"--output_dir={tmp_path}"]
    assert run_script("sweep.py", [*argv, "--minutes=1e-9"]) == 1
    assert not ran
    assert run_script("sweep.py", argv) == 0
    assert len(ran) == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "widths=[]: must be given"),
        (["--widths", "16", "16"], "must be of different widths"),
        (["--widths", "16", "33"], "hidden size must be a multiple"),
        (["--widths", "16", "--width=16"], "width=16: must be left out"),
        (["--widths", "16", "--grid=learning_rate=-1"], "learning_rate=-1.0"),
        (["--widths", "16", "--grid=damping=0.1", "--optim=adamw_mup"], "has no effect on adamw"),
        (["--widths", "16", "--grid=damping=0.1", "--trials=3"], "trials=3: has no effect with grid"),
        (["--widths", "16", "--trials=0"], "trials=0: must be above 0"),
        (["--widths", "16", "32", "--trials=1"], "at least one for each of the 2 widths"),
        (["--widths", "16", "--optim=kfac", "--compare"], "needs an optimizer with _mup"),
        (["--widths", "16", "--optim_args=lr=0.1"], "must leave learning_rate to the search"),
        (["--widths", "16", "--search", "damping=1:2", "--extend"], "extend=True"),
    ],
)
def test_a_mistake_is_one_line_code_2_and_no_output_folder(
    argv: list[str],
    message: str,
    run_script: Callable[..., int],
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_script("sweep.py", [*tiny, *argv, f"--output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def states(folder: Path) -> dict[tuple[int, str], int]:
    """Trials by study and state, read beside Optuna."""
    with sqlite3.connect(f"file:{folder / 'sweep.db'}?mode=ro", uri=True, timeout=0.1) as database:
        return Counter(database.execute("select study_id, state from trials").fetchall())


def killed_in_mid_trial(command: list[str], folder: Path, finished: int) -> None:
    """Starts a sweep and kills it for good when so many trials are finished and another is running."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 280
    try:
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
            try:
                process.send_signal(signal.SIGSTOP)  # what is seen holds until it is killed
                seen: Counter[str] = Counter()
                for (_, state), count in states(folder).items():
                    seen[state] += count
                if seen["COMPLETE"] >= finished and seen["RUNNING"]:
                    return
            except sqlite3.OperationalError:
                pass  # no tables yet, or in the middle of writing
            process.send_signal(signal.SIGCONT)
        raise AssertionError(f"was never in the middle of a trial: {process.communicate()[0]!r}")
    finally:
        process.kill()
        process.communicate()


def test_after_sigkill_nothing_is_lost_or_repeated_and_the_recipe_trains_the_same(
    run_script: Callable[..., int], tiny: list[str], tmp_path: Path
) -> None:
    argv = [*tiny, "--widths", "16", "32", "--grid=learning_rate=0.05,0.2", "--seeds=1", "--no_coordinate_check"]
    argv.append(f"--output_dir={tmp_path}")
    killed_in_mid_trial([sys.executable, str(ROOT / "scripts/sweep.py"), *argv], tmp_path, finished=1)
    url = f"sqlite:///{tmp_path / 'sweep.db'}"

    def finished() -> dict[tuple[str, int], float | None]:
        names = [study_name("kfac_mup", width) for width in (16, 32)]
        studies = [(name, optuna.load_study(study_name=name, storage=connect(url))) for name in names]
        return {(n, t.number): t.value for n, study in studies for t in study.trials if t.state == TrialState.COMPLETE}

    before = finished()
    assert before
    assert run_script("sweep.py", argv) == 1  # two values are too few
    after = finished()
    assert before.items() <= after.items()
    runs = [(trial["width"], trial["params"]["learning_rate"]) for trial in trials_of(tmp_path)]
    assert sorted(runs) == [(16, 0.05), (16, 0.2), (32, 0.05), (32, 0.2)]
    assert sum(count for (_, state), count in states(tmp_path).items() if state == "FAIL") == 1
    assert not any(state in ("RUNNING", "WAITING") for _, state in states(tmp_path))

    rate = read_recipe(str(tmp_path / "recipe.yaml")).optimizer["learning_rate"]
    wide = ["--recipe", str(tmp_path / "recipe.yaml"), "--width=32", "--use_cpu", "--report_to=none"]
    wide += [next(flag for flag in tiny if "cache_dir" in flag), f"--output_dir={tmp_path / 'wide'}"]
    assert run_script("train.py", wide) == 0
    (expected,) = [t["loss"] for t in trials_of(tmp_path) if (t["width"], t["params"]["learning_rate"]) == (32, rate)]
    assert json.loads((tmp_path / "wide" / "all_results.json").read_text())["eval_loss"] == expected


def test_a_diverged_run_is_a_stopped_trial(tiny: list[str], tmp_path: Path) -> None:
    store = SweepStore(tmp_path)
    store.open("sgd", 16, {})
    store.queue("sgd", 16, [({"learning_rate": 1e20}, 0)])
    flags: dict[str, Any] = dict(flag.removeprefix("--").split("=", 1) for flag in tiny)
    numbers = ("vocab_size", "max_seq_length", "max_eval_samples", "per_device_train_batch_size", "max_steps", "seed")
    flags |= {name: int(flags[name]) for name in numbers}
    flags |= {"optim": "sgd", "width": 16, "use_cpu": True, "output_dir": str(tmp_path), "max_grad_norm": 0.0}
    space = Space(grid={"learning_rate": (1e20,)})
    run_trial(TrialTask(flags, study_name("sgd", 16), store.url, space, sampler_seed=0))
    (trial,) = store.trials("sgd", 16)
    assert trial.outcome == "diverged"


@pytest.mark.parametrize(("half", "pruned"), [(3.9, False), (4.1, True)])
def test_a_trial_that_cannot_catch_up_is_stopped_at_half_time(half: float, pruned: bool) -> None:
    """The best gained 0.5 in its second half and ended at 3: twice that does not bring 4.1 to 3."""
    study = optuna.create_study(direction="minimize")
    study.add_trial(create_trial(value=3.0, intermediate_values={2: 3.5, 4: 3.0}))
    study.add_trial(create_trial(value=5.0, intermediate_values={2: 9.0, 4: 5.0}))
    running = create_trial(state=TrialState.RUNNING, intermediate_values={2: half})
    assert HopelessPruner().prune(study, running) is pruned
    at_the_end = create_trial(state=TrialState.RUNNING, intermediate_values={2: 9.0, 4: 9.0})
    assert not HopelessPruner().prune(study, at_the_end)


@pytest.mark.slow
def test_two_jobs_run_every_trial_once(run_script: Callable[..., int], tiny: list[str], tmp_path: Path) -> None:
    argv = [*tiny, "--widths", "16", "32", "--grid=learning_rate=0.05,0.2", "--seeds=1", "--no_coordinate_check"]
    command = [sys.executable, str(ROOT / "scripts/sweep.py"), *argv, f"--output_dir={tmp_path}", "--jobs=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 1, done.stderr
    runs = [(trial["width"], trial["params"]["learning_rate"]) for trial in trials_of(tmp_path)]
    assert sorted(runs) == [(16, 0.05), (16, 0.2), (32, 0.05), (32, 0.2)]
