"""Every optimizer on several ranks of `accelerate launch` trains as in one process, wherever its curvature is held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shared.helpers import relative_error
from shared.launching import ACCELERATE, launch
from shared.ranks import INTERRUPTED, STEPS, TOLERANCE, cases, check_ends, parameters, train

PROGRAM = Path(__file__).with_name("every_name_program.py")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_as_one_process_does(ranks: int, tmp_path: Path) -> None:
    """Ten steps with accumulation, uneven batches and token counts; ranks end bit-equal to each other."""
    code, log = launch(ACCELERATE, ranks, PROGRAM, tmp_path, timeout=1800)
    assert code == 0, log[-3000:]
    results = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(ranks)]
    check_ends(cases(all_of_them=ranks > 2), [result["ends"] for result in results])

    straight = results[0]["straight"]
    assert all(torch.equal(result["resumed"], straight) for result in results)
    # Any rank's checkpoint is complete, and goes on in one process.
    for rank in (0, ranks - 1):
        checkpoint = torch.load(tmp_path / f"checkpoint-{rank}.pt", weights_only=True)
        model, optimizer = train(INTERRUPTED, steps=range(STEPS // 2, STEPS), resume=checkpoint)
        assert relative_error(parameters(model), straight) < TOLERANCE[INTERRUPTED.dtype]
        # The log has every layer, wherever it is held.
        expected = optimizer.telemetry("layer")
        del expected["curvature/refresh_seconds"], results[rank]["telemetry"]["curvature/refresh_seconds"]
        assert results[rank]["telemetry"] == pytest.approx(expected, rel=1e-8)
