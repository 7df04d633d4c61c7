"""`sweep --depths`: a proxy for every width and depth, studies that stay apart and go on, recipes for deep models."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from hf_so2 import cli
from hf_so2.transfer import sweep as sweep_module
from hf_so2.transfer.proxies import proxies_of
from hf_so2.transfer.recipe import read_recipe
from hf_so2.transfer.runner import TYPES, TrialTask, _suggest
from hf_so2.transfer.store import study_name

GRID = "--grid=learning_rate=0.03,0.06,0.12,0.24"
RunScript = Callable[..., int]
connect = functools.cache(optuna.storages.get_storage)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """Puts a formula in the place of training: least at 0.1 for every size. The study, rate and seed of every trial."""
    ran: list[tuple[str, float, int]] = []

    def run(task: TrialTask) -> None:
        study = optuna.load_study(study_name=task.study, storage=connect(task.url))
        trial = study.ask()
        rate, seed = _suggest(task.space, trial)["learning_rate"], trial.user_attrs["seed"]
        ran.append((task.study, rate, seed))
        width, depth = (int(n or 1) for n in re.findall(r"width(\d+)(?:-depth(\d+))?$", task.study)[0])
        loss = 3.5 - 0.1 * math.log2(width) - 0.02 * math.log2(depth) + 0.05 * math.log2(rate / 0.1) ** 2
        study.tell(trial, loss + 0.001 * seed * math.sin(1e3 * rate))

    monkeypatch.setattr(sweep_module, "run_trial", run)
    return ran


def trials_of(folder: Path) -> list[dict[str, Any]]:
    (content,) = json.loads((folder / "sweep.json").read_text("utf-8"))["optimizers"].values()
    return list(content["trials"])


def test_a_sweep_over_widths_goes_on_over_depths_and_keeps_its_trials(
    made_up: list[Any], run_script: RunScript, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        *tiny,
        "--widths",
        "16",
        "32",
        GRID,
        "--seeds=1",
        "--no_coordinate_check",
        f"--output_dir={tmp_path}",
    ]
    assert run_script("sweep.py", argv) == 0
    assert {study for study, *_ in made_up} == {"kfac_mup-width16", "kfac_mup-width32"}
    before = len(made_up)
    made_up.clear()
    capsys.readouterr()
    # The config has one layer, and so has the base: those proxies are what was tried.
    assert run_script("sweep.py", [*argv, "--depths", "4", "1"]) == 0
    assert {study for study, *_ in made_up} == {f"kfac_mup-width{width}-depth4" for width in (16, 32)}
    assert len(made_up) == before
    output = capsys.readouterr().out
    assert "kfac_mup width 32 depth 4 learning_rate=0.24 seed 0" in output
    assert "Not decided over width 16 to 32: exponent" in output
    assert "Not decided over depth 1 to 4: exponent" in output
    assert "best at width 32 depth 4: " in output
    sizes = {(trial["width"], trial["depth"]) for trial in trials_of(tmp_path)}
    assert sizes == {(width, depth) for width in (16, 32) for depth in (1, 4)}
    recipe = read_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.base == {"mup_base_width": 16, "mup_base_depth": 1}
    assert recipe.tuned_at == "width 16 and 32, depth 1 and 4"
    for axis in ("width", "depth"):
        value, low, high = recipe.transfer["exponents"][axis]
        assert value == pytest.approx(0, abs=1e-3)
        assert low is high is None  # nothing was repeated
    assert recipe.transfer["depth_losses"][1] > recipe.transfer["depth_losses"][4]


@pytest.mark.parametrize(
    ("given", "depths", "base", "sizes"),
    [
        ([], [4, 2], 2, [(16, 2), (16, 4)]),
        ([], [1, 2], 1, [16, (16, 2)]),  # as deep as the config and the base: as without depths
        (["--mup_base_width=16", "--mup_base_depth=1"], [2, 4], 1, [(16, 2), (16, 4)]),
        (["--mup_base_width=16", "--mup_base_depth=8"], [2, 4], 2, [(16, 2), (16, 4)]),
        (["--optim=kfac"], [1, 2], None, [16, (16, 2)]),
    ],
)
def test_the_base_is_as_deep_as_the_shallowest_or_as_was_given(
    given: list[str], depths: list[int], base: int | None, sizes: list[Any], tiny: list[str]
) -> None:
    proxies = proxies_of(cli.read_flags(TYPES, [*tiny, *given, "--output_dir=out"]), [16], [], depths)
    assert [proxy.size for proxy in proxies] == sizes
    assert [proxy.depth for proxy in proxies] == sorted(depths)
    for proxy in proxies:
        model, _, training = proxy.arguments()
        assert proxy.config.num_hidden_layers == proxy.depth
        assert (model.depth or 1) == proxy.depth
        layers = training.mup_base_depth or (proxy.depth if training.mup_base_width else None)
        assert layers == base


def test_a_base_depth_counts_without_depths_and_without_a_base_width(tiny: list[str]) -> None:
    deep = [*tiny, "--depth=3", "--mup_base_depth=1", "--output_dir=out"]
    (proxy,) = proxies_of(cli.read_flags(TYPES, deep), [16], [], [])
    _, _, training = proxy.arguments()
    assert (training.mup_base_width, training.mup_base_depth) == (16, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--depths", "2", "2"], "depths=[2, 2]: must be different numbers of layers"),
        (["--depths", "0"], "depths=[0]: must be different numbers of layers"),
        (["--depth", "2"], "depth=2: must be left out: --depths says which"),
        (["--depths", "1", "2", "--trials=1"], "at least one for each of the 2 proxies"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    argv: list[str], message: str, run_script: RunScript, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("sweep.py", [*tiny, "--widths", "16", *argv, "--output_dir=/nonexistent/out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_checkpoints_have_their_own_depth(
    run_script: RunScript, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("sweep.py", [*tiny, "--checkpoints", "out/x", "--depths", "2", "--output_dir=out"]) == 2
    assert "depths=[2]: must be left out with checkpoints" in capsys.readouterr().err


def test_for_real_a_run_from_the_recipe_has_the_loss_of_the_deep_proxy(
    run_script: RunScript, tiny: list[str], tmp_path: Path
) -> None:
    argv = [*tiny, "--widths", "16", "--depths", "1", "2", "--grid=learning_rate=0.1", "--seeds=1"]
    argv.append("--no_coordinate_check")
    assert run_script("sweep.py", [*argv, f"--output_dir={tmp_path}"]) == 1  # one value is too few
    rate = read_recipe(str(tmp_path / "recipe.yaml")).optimizer["learning_rate"]
    deep = ["--recipe", str(tmp_path / "recipe.yaml"), "--width=16", "--depth=2", "--use_cpu", "--report_to=none"]
    deep += [next(flag for flag in tiny if "cache_dir" in flag), f"--output_dir={tmp_path / 'deep'}"]
    assert run_script("train.py", deep) == 0
    losses = {t["depth"]: t["loss"] for t in trials_of(tmp_path) if t["params"]["learning_rate"] == rate}
    assert losses[1] != losses[2]
    assert json.loads((tmp_path / "deep/all_results.json").read_text("utf-8"))["eval_loss"] == losses[2]
    report = (tmp_path / "deep/mup_report.txt").read_text("utf-8")
    assert "1 layers to 2" in report


def test_studies_of_widths_are_called_as_before() -> None:
    assert study_name("kfac_mup", 64) == "kfac_mup-width64"
    assert study_name("kfac_mup", (64, 8)) == "kfac_mup-width64-depth8"
