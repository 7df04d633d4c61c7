"""Statistics of what people train with the Trainer against dense rows: it knows what each loss is divided by."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared.dense_fisher import relative
from shared.dense_rows import dense_layers, draw_the_most_probable
from shared.helpers import captured_factors, optimizer_of, trained
from shared.tasks import TASKS

# Those whose model computes the loss, in float64.
OWN = [name for name, task in TASKS.items() if task("right").own_loss]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("task", OWN)
def test_statistics_are_those_of_the_rows_that_a_loss_depends_on(
    task: str, fisher: str, parts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draw_the_most_probable(monkeypatch)
    case = TASKS[task]("left")
    rows = [{key: value[row] for key, value in case.inputs.items()} for row in range(4)]
    trainer = trained(
        case.model(),
        rows,
        tmp_path,
        fisher=fisher,
        max_steps=1,
        per_device_train_batch_size=4 // parts,
        gradient_accumulation_steps=parts,
        max_grad_norm=0.0,
    )
    found, expected = captured_factors(optimizer_of(trainer)), dense_layers(case, fisher)
    compared = found.keys() & expected.keys()
    assert len(compared) > len(found) / 2
    for layer in compared:
        for key, value in zip(("A", "B"), expected[layer].factors, strict=True):
            assert relative(found[layer][key], value) < 1e-10, (layer, key)
