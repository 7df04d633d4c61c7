"""curvature.png: which points of the log are drawn, and where there is nothing to draw."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared.helpers import llama, token_rows, trained

from hf_so2.transfer.reporting.curvature_plot import PANELS, curves, plot_curvature

LOGGED = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 2}


@pytest.mark.parametrize(
    ("optim", "sides", "panels"),
    [
        ("kfac", {"A", "B"}, ["damping", "condition", "update_rms"]),
        ("shampoo", {"L", "R"}, ["damping", "condition", "update_rms"]),
        ("ekfac", {""}, ["damping", "condition", "update_rms"]),
        ("soap", {"L", "R"}, ["condition", "update_rms"]),
        ("muon", set(), ["update_rms"]),
    ],
)
def test_it_draws_the_log(optim: str, sides: set[str], panels: list[str], tmp_path: Path) -> None:
    log = trained(llama(), token_rows(), tmp_path, optim=optim, **LOGGED).state.log_history
    found = curves(log)
    assert [name for name in PANELS if name in found] == panels
    for quantity, lines in found.items():
        assert {role for role, _ in lines} == {"attention", "mlp"}
        assert {side for _, side in lines} == ({""} if quantity == "update_rms" else sides)
        for (role, side), points in lines.items():
            key = f"curvature/{role}/{quantity}{f'_{side}' if side else ''}"
            assert points == [(step + 1, log[step][key]) for step in range(2) if key in log[step]]
    plot_curvature(log, tmp_path / "curvature.png", optim)
    assert (tmp_path / "curvature.png").read_bytes().startswith(b"\x89PNG")


def test_layers_keep_their_dotted_names() -> None:
    key = "curvature/model.layers.0.mlp.up_proj.weight/damping_A"
    assert curves([{"step": 3, key: 0.5, "curvature/skipped_steps": 0}]) == {
        "damping": {("model.layers.0.mlp.up_proj.weight", "A"): [(3, 0.5)]}
    }


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "curvature/skipped_steps": 0}]])
def test_without_curvature_there_is_no_file(log: list[dict[str, float]], tmp_path: Path) -> None:
    plot_curvature(log, tmp_path / "curvature.png", "adamw")
    assert not list(tmp_path.iterdir())
