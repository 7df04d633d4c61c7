"""What must not break training: non-finite numbers, idle layers, empty and frozen parameters, extreme scales."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.helpers import assert_same_parameters, llama, token_rows
from torch import Tensor, nn

import hf_so2


def mlp(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4, bias=bias))


def backward(model: nn.Module, *, seed: int = 0, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    ((model(torch.randn(20, 6, generator=generator)) - 1).square().mean() * scale).backward()


def snapshot(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return copy.deepcopy({"model": model.state_dict(), "state": state["state"], "curvature": state["curvature"]})


def tensors(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Every number and tensor of nested dictionaries, by path; counters of skipped steps left out."""
    if isinstance(tree, dict):
        found: dict[str, Tensor] = {}
        for key, value in tree.items():
            if key not in ("skipped_steps", "in_a_row"):
                found |= tensors(value, f"{path}/{key}")
        return found
    return {path: torch.as_tensor(tree)}


def assert_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["0.weight", "2.bias"])
def test_non_finite_gradient_skips_the_step_and_touches_nothing(bad: float, where: str) -> None:
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, fallback_learning_rate=0.01, weight_decay=0.1)
    for step in range(3):
        backward(model, seed=step)
        optimizer.step()
    before = tensors(snapshot(model, optimizer))
    backward(model, seed=3)
    model.get_parameter(where).grad.view(-1)[1] = bad
    optimizer.step()
    after = tensors(snapshot(model, optimizer))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert (optimizer.steps, optimizer.skipped_steps) == (3, 1)

    reference = mlp()
    straight = hf_so2.build_optimizer("kfac", reference, fallback_learning_rate=0.01, weight_decay=0.1)
    for step in (0, 1, 2, 4):
        backward(reference, seed=step)
        straight.step()
    backward(model, seed=4)
    optimizer.step()
    assert_same_parameters(model, reference)


def test_non_finite_statistics_alone_are_dropped() -> None:
    """A clipped gradient can be finite where the captured one was not: only the factors of that layer stay behind."""
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, factor_update_steps=1)
    for step in range(2):
        backward(model, seed=step)
        optimizer.step()
    name = "0.weight"
    before = {key: x.clone() for key, x in optimizer.curvature.layers[name].state.items() if key in ("A", "B")}
    other = optimizer.curvature.layers["2.weight"].state["A"].clone()
    model.zero_grad()
    inputs = torch.randn(20, 6)
    inputs[3, 2] = 1e30  # finite, but not its square
    model[0](inputs).mean().backward()
    model[2](torch.randn(20, 8)).square().mean().backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()
    assert (optimizer.steps, optimizer.skipped_steps, optimizer.curvature.dropped_statistics) == (3, 0, 1)
    for key, value in before.items():
        assert torch.equal(optimizer.curvature.layers[name].state[key], value)
    assert not torch.equal(optimizer.curvature.layers["2.weight"].state["A"], other)
    assert_finite(model)


def test_twenty_skipped_steps_in_a_row_stop_training() -> None:
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model)

    def poisoned() -> None:
        backward(model)
        model[0].weight.grad.fill_(float("nan"))
        optimizer.step()

    for _ in range(19):
        poisoned()
    backward(model)
    optimizer.step()  # one good step starts the count anew
    for _ in range(19):
        poisoned()
    with pytest.raises(hf_so2.TrainingDivergedError, match="20 steps in a row"):
        poisoned()
    assert optimizer.skipped_steps == 39


def test_a_failed_refresh_keeps_the_last_preconditioner_until_it_fails_too_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """LAPACK gives up in float32 and in float64 on one layer: that is counted and logged, and in the end stops."""
    model = mlp()
    optimizer = hf_so2.build_optimizer("ekfac", model, preconditioner_update_steps=1)
    backward(model)
    optimizer.step()
    layer = optimizer.curvature.layers["2.weight"]
    before = {key: layer.state[key].clone() for key in layer.block.refreshed if key != "S"}  # S is an average besides
    tried = []

    def no_convergence(matrix: Tensor) -> Any:
        if len(matrix) == 4:
            tried.append(matrix.dtype)
            raise torch.linalg.LinAlgError("made to fail")
        return decompose(matrix)

    decompose = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", no_convergence)
    for step in range(1, 10):
        backward(model, seed=step)
        optimizer.step()
        assert optimizer.curvature.failed_refreshes == layer.failures == step
        assert all(torch.equal(layer.state[key], value) for key, value in before.items())
        assert "2.weight: refresh failed" in caplog.records[-1].getMessage()
    assert tried == [torch.float32, torch.float64] * 9
    assert optimizer.curvature.layers["0.weight"].refreshes == 10
    assert_finite(model)

    monkeypatch.undo()
    backward(model)
    optimizer.step()
    assert (layer.failures, optimizer.curvature.failed_refreshes) == (0, 9)
    monkeypatch.setattr(torch.linalg, "eigh", no_convergence)
    for step in range(9):
        backward(model, seed=step)
        optimizer.step()
    with pytest.raises(hf_so2.TrainingDivergedError, match=r"^2\.weight: .* 10 times in a row"):
        optimizer.step()


class Functional(nn.Module):
    """Uses one weight without calling its module, as some attention implementations do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called, self.bypassed = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.called(inputs)), self.bypassed.weight)


def test_weight_used_functionally_gets_adamw_and_the_table_says_so() -> None:
    """Its trajectory is that of `torch.optim.AdamW` fed with the same gradients."""
    model = Functional()
    optimizer = hf_so2.build_optimizer(
        "kfac", model, lr=0.05, hidden_fallback_learning_rate=0.01, weight_decay=0.1, fallback_warmup_steps=1
    )
    reference = nn.Parameter(model.bypassed.weight.detach().clone())
    adamw = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    decay = 0.05 * 0.1  # lr · weight_decay of the weight's group
    for step in range(4):
        backward(model, seed=step)
        reference.grad = model.bypassed.weight.grad.clone()
        reference.data.mul_(1 - decay)
        adamw.step()
        optimizer.step()
        torch.testing.assert_close(model.bypassed.weight, reference, rtol=1e-6, atol=1e-8)
    rows = {entry.name: entry for entry in optimizer.coverage().parameters}
    assert rows["bypassed.weight"].algorithm == "adamw"
    assert "no input was captured" in rows["bypassed.weight"].reason
    assert rows["called.weight"].algorithm == "kfac"
    assert "no input was captured" in str(optimizer.coverage())


class LowRank(nn.Module):
    """A LoRA branch beside a frozen weight: the second matrix starts at zero, so the first one's `δ` is zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(6, 4)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.frozen.requires_grad_(False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.frozen(inputs) + self.up(self.down(inputs))


@pytest.mark.parametrize("norm_control", ["none", "kl_clip", "spectral"])
@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral", "pi", "constant"])
def test_zero_factor_gives_finite_updates(norm_control: str, rule: str) -> None:
    model = LowRank()
    optimizer = hf_so2.build_optimizer("kfac", model, lr=0.01, norm_control=norm_control, damping_rule=rule)
    down, up, frozen = model.down.weight.clone(), model.up.weight.clone(), model.frozen.weight.clone()
    backward(model)
    optimizer.step()
    assert_finite(model)
    assert torch.equal(model.down.weight, down)  # a zero gradient moves nothing, whatever its factor
    assert not torch.equal(model.up.weight, up)
    for step in range(1, 6):
        backward(model, seed=step)
        optimizer.step()
        assert_finite(model)
    assert not torch.equal(model.down.weight, down)
    assert torch.equal(model.frozen.weight, frozen)


@pytest.mark.parametrize("norm_control", ["none", "kl_clip", "graft_adam", "graft_sgd", "spectral"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30])
def test_extreme_gradient_scales_give_no_nan(norm_control: str, scale: float) -> None:
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, norm_control=norm_control)
    for step in range(4):
        backward(model, seed=step, scale=scale)
        optimizer.step()
        assert_finite(model)
        for layer in optimizer.curvature.layers.values():
            assert all(torch.isfinite(x).all() for x in layer.state.values()), layer.name


@given(exponent=st.integers(-30, 30), rows=st.integers(1, 8), rule=st.sampled_from(["trace", "spectral", "constant"]))
@settings(max_examples=25)
def test_rank_deficient_factors_at_any_scale(exponent: int, rows: int, rule: str) -> None:
    """Fewer rows than dimensions leave most eigenvalues at zero; damping has to carry them."""
    torch.manual_seed(0)
    model = nn.Linear(12, 10)
    optimizer = hf_so2.build_optimizer("kfac", model, damping_rule=rule)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model.zero_grad()
        (model(torch.randn(rows, 12, generator=generator)).square().mean() * 10.0**exponent).backward()
        optimizer.step()
        assert_finite(model)


def test_the_scale_of_the_loss_does_not_change_spectral_steps() -> None:
    """K-FAC's direction is free of the loss's scale under trace damping, and the norm control fixes the length."""
    changes = []
    for scale in (1e-3, 1.0, 1e3):
        model = mlp(bias=False).double()
        before = model[0].weight.detach().clone()
        optimizer = hf_so2.build_optimizer("kfac", model)
        torch.manual_seed(1)
        (model(torch.randn(20, 6, dtype=torch.float64)).square().mean() * scale).backward()
        optimizer.step()
        changes.append(model[0].weight.detach() - before)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(changes[2], changes[1], rtol=1e-9, atol=1e-12)


class WithSpareModules(nn.Sequential):
    """`mlp` plus whatever a test attaches without being called."""

    def __init__(self) -> None:
        super().__init__(*mlp())

    def forward(self, inputs: Tensor) -> Tensor:
        return self[2](self[1](self[0](inputs)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_frozen_and_unused_parameters() -> None:
    model = WithSpareModules()
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    model.register_parameter("empty_matrix", nn.Parameter(torch.empty(0, 5)))
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    model.add_module("no_units", nn.Linear(6, 0))
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = hf_so2.build_optimizer("kfac", model)
    for step in range(3):
        backward(model, seed=step)
        model.no_units(torch.randn(20, 6)).sum().backward()
        model.empty.grad, model.empty_matrix.grad = torch.empty(0), torch.empty(0, 5)
        optimizer.step()
    assert optimizer.steps == 3
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(model.unused, torch.ones(3))
    rows = {entry.name: entry for entry in optimizer.coverage().parameters}
    assert rows["0.weight"].reason == "frozen"
    assert rows["2.weight"].algorithm == "kfac"


def test_every_gradient_is_covered_and_every_group_scheduled() -> None:
    """Each parameter sits in exactly one group; a scheduler multiplies all rates; group 0 is at the base rate."""
    model = llama(32).train()
    base = llama(16)
    optimizer = hf_so2.build_optimizer(
        "kfac_mup", model, base_config=base.config, lr=0.05, fallback_learning_rate=0.02, norm_control="none"
    )
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.05
    initial = [group["lr"] for group in optimizer.param_groups]
    assert len(set(initial)) > 1
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    tokens = torch.stack([row["input_ids"] for row in token_rows(2)])
    for step in range(1, 4):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == [lr * 0.5**step for lr in initial]


def test_rate_zero_moves_nothing() -> None:
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    backward(model)
    optimizer.step()
    assert_same_parameters(model, before)


def test_step_without_gradients_or_captures_survives() -> None:
    """Checkpoint tools call `step` once on a fresh optimizer to create its state."""
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model)
    before = copy.deepcopy(model)
    optimizer.step()
    assert_same_parameters(model, before)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert_same_parameters(model, before)
