"""Statistics and steps of what people train against dense rows, with padding and accumulation."""

from __future__ import annotations

from functools import cache

import pytest
from shared.dense_fisher import METHODS, STANDSTILL, relative
from shared.dense_rows import EPSILON, DenseLayer, dense_layers, draw_the_most_probable
from shared.tasks import TASKS, Task
from torch import Tensor

import hf_so2

# The first builds the bases in which EKFAC's second measures S.
STEPS = 2


@cache
def case(task: str, side: str) -> Task:
    return TASKS[task](side)


@cache
def expected(task: str, side: str, fisher: str) -> dict[str, DenseLayer]:
    return dense_layers(case(task, side), fisher)


def trained(name: str, task: Task, fisher: str, parts: int) -> tuple[hf_so2.SecondOrderOptimizer, dict[str, Tensor]]:
    """The optimizer after some steps on one batch, and what the last one has subtracted; those before move nothing."""
    model = task.model().train()
    settings = STANDSTILL | {"damping_rule": "trace", "damping": EPSILON, "preconditioner_update_steps": 1}
    optimizer = hf_so2.build_optimizer(name, model, fisher=fisher, **settings)
    weights = {weight: model.get_parameter(weight) for weight in optimizer.curvature.layers}
    for step in range(STEPS):
        for inputs in task.parts(parts):
            outputs = model(**inputs)
            loss = task.row_losses(outputs.logits, inputs["labels"]).sum() / task.rows
            if parts == 1 and task.own_loss:
                loss = outputs.loss
            optimizer.sample_fisher(outputs.logits, loss=loss, independent=task.independent)
            loss.backward()
        if step == STEPS - 1:
            before = {weight: parameter.detach().clone() for weight, parameter in weights.items()}
            for group in optimizer.param_groups:
                group["lr"] = 1.0 if group["algorithm"] == name else group["lr"]
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, {weight: before[weight] - parameter.detach() for weight, parameter in weights.items()}


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize(
    ("side", "parts"), [("right", 1), ("left", 1), ("right", 2), pytest.param("left", 2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", METHODS)
def test_statistics_and_step_are_those_of_the_rows_that_a_loss_depends_on(
    name: str, task: str, side: str, parts: int, fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_the_most_probable(monkeypatch)
    optimizer, steps = trained(name, case(task, side), fisher, parts)
    dense = expected(task, side, fisher)
    compared = dense.keys() & steps.keys()
    assert len(compared) > len(steps) / 2
    for layer in compared:
        state = optimizer.curvature.layers[layer].state
        wanted = dense[layer].statistics(name)
        for key in wanted.keys() & state.keys():
            assert relative(state[key] / state["weight"], wanted[key]) < 1e-10, (layer, key)
        if "S" in state:
            s = dense[layer].second_moments(state["A_basis"].numpy(), state["B_basis"].numpy())
            assert relative(state["S"], s) < 1e-10, layer
        assert relative(steps[layer], dense[layer].step(name)) < 1e-8, layer
