"""What a loop does with an optimizer beside stepping: its groups, its states, and what is refused in one line."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared.helpers import gpt2
from shared.loops import loss_of, net
from torch import nn

import hf_so2
from hf_so2.optim.skipping import have_no_gradient


@pytest.mark.parametrize(
    ("model", "value"),
    [
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "weight"),
        (lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Linear(4, 4)), "0"),
    ],
)
def test_gradients_of_other_kinds_are_refused(model: Callable[[], nn.Module], value: str) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=rf"^model='{value}': "):
        hf_so2.build_optimizer("kfac", model())


def test_momentum_of_a_group_is_the_one_that_is_used() -> None:
    """As a schedule or a callback edits it."""
    models = net(), net()
    for model, edit in zip(models, (True, False), strict=True):
        optimizer = hf_so2.build_optimizer("kfac", model, **({} if edit else {"momentum": 0.5}))
        for group in optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = 0.5
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_state_loads_where_other_settings_group_parameters_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    """The saved hyperparameters go on, as in torch, and a warning says so."""
    first, second = net(), net()
    saved = hf_so2.build_optimizer("kfac", first, weight_decay=0.1, lr=0.1, fallback_learning_rate=0.01)
    loaded = hf_so2.build_optimizer("kfac", second, weight_decay=0.0, lr=0.1, fallback_learning_rate=0.1)
    for model, optimizer in ((first, saved), (second, loaded)):
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    second.load_state_dict(first.state_dict())
    with caplog.at_level(logging.WARNING):
        loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert any("weight_decay=0.1 goes on" in record.getMessage() for record in caplog.records)
    for model, optimizer in ((first, saved), (second, loaded)):
        loss_of(model, 1).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_distributed_checkpoints_neither_count_a_step_nor_lose_curvature_silently() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = net()
    optimizer = hf_so2.build_optimizer("kfac", model)
    state = get_optimizer_state_dict(model, optimizer)
    assert optimizer.steps == 0
    with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint, which leaves that out"):
        set_optimizer_state_dict(model, optimizer, state)
    curvature = optimizer.curvature_state_dict()
    optimizer.curvature_in_state_dict = False
    set_optimizer_state_dict(model, optimizer, state)
    optimizer.load_curvature_state_dict(curvature)
    loss_of(model, 0).backward()
    optimizer.step()
    assert optimizer.steps == 1


def test_a_model_without_config_is_refused_by_mup_names_of_the_trainer(tmp_path: Any) -> None:
    args = hf_so2.SecondOrderTrainingArguments(
        output_dir=str(tmp_path), optim="kfac_mup", mup_base_width=8, use_cpu=True, report_to="none"
    )
    with pytest.raises(hf_so2.ConfigurationError, match=r"^model='Sequential': has no config.*apply_mup"):
        hf_so2.SecondOrderTrainer(model=net(), args=args)


def test_a_refusal_by_mup_names_the_way_out() -> None:
    model = gpt2()
    model.is_quantized = True
    with pytest.raises(hf_so2.ConfigurationError, match="kfac trains it at this width as it is"):
        hf_so2.build_optimizer("kfac_mup", model, base_config=model.config)


@pytest.mark.parametrize(("entry", "expected"), [(None, True), (0.0, True), (1e-40, False), (float("nan"), False)])
def test_zeros_are_no_gradient(entry: float | None, expected: bool) -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 2)]
    if entry is not None:
        parameters[0].grad = torch.tensor([0.0, entry, 0.0])
    assert have_no_gradient(parameters) is expected
