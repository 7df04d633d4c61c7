"""Two gloo ranks with half of each batch train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shared.helpers import captured_factors, llama, optimizer_of, relative_error, token_rows, trained
from shared.launching import ACCELERATE, TORCHRUN, launch

PROGRAM = Path(__file__).with_name("ranks_program.py")


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_process(launcher: list[str], tmp_path: Path) -> None:
    """Two ranks times two micro-batches of four equal one batch of sixteen; both ranks end with equal parameters."""
    code, log = launch(launcher, 2, PROGRAM, tmp_path)
    assert code == 0, log[-3000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, parameter in first["parameters"].items():
        assert torch.equal(parameter, second["parameters"][name]), name
    for name, factors in first["factors"].items():
        assert all(torch.equal(factors[key], second["factors"][name][key]) for key in factors), name

    alone = trained(llama(), token_rows(padded=True), tmp_path, damping=1e-2)
    for name, expected in captured_factors(optimizer_of(alone)).items():
        for key, value in expected.items():
            assert relative_error(first["factors"][name][key], value) < 1e-5, (name, key)
    for name, expected_parameter in alone.model.state_dict().items():
        assert relative_error(first["parameters"][name], expected_parameter) < 1e-5, name

    # The same with each layer's curvature on one rank only, logged and saved on the way.
    assert sorted(first["held"] + second["held"]) == sorted(first["factors"])
    assert first["held"]
    assert second["held"]
    # The checkpoint is complete, and goes on in one process where every rank holds everything.
    resumed = trained(llama(), token_rows(padded=True), tmp_path, damping=1e-2, resume=str(tmp_path / "checkpoint-2"))
    for name, expected_parameter in alone.model.state_dict().items():
        assert torch.equal(first["spread"][name], second["spread"][name]), name
        assert relative_error(first["spread"][name], expected_parameter) < 1e-5, name
        assert relative_error(resumed.model.state_dict()[name], expected_parameter) < 1e-5, name
