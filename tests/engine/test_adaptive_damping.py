"""Levenberg-Marquardt damping: the prediction against dense matrices, the rule, and who must not notice."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared.helpers import assert_same_parameters, gpt2, in_float64, llama, optimizer_of, token_rows, trained
from torch import Tensor, nn

import hf_so2
from hf_so2.curvature import EKFAC
from hf_so2.engine import adaptive

METHODS = ["kfac", "tkfac", "ekfac", "tekfac"]
ADAPTIVE: dict[str, Any] = {"adaptive_damping": True, "norm_control": "kl_clip"}


def mlp(*, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias)).double()


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (model(inputs) - 1).square().mean()


def train(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.reevaluate_with(lambda step=step: loss(model, step))
        optimizer.step()


def dense_fisher(layer: Any) -> np.ndarray:
    """The block's undamped approximation, written out; vec stacks rows."""
    state = {key: value.numpy() for key, value in layer.state.items()}
    if "S" in state:
        basis = np.kron(state["B_basis"], state["A_basis"])
        return (basis * state["S"].reshape(-1)) @ basis.T
    a, b = state["A"] / state["weight"], state["B"] / state["weight"]
    tau = state["tau"] / state["weight"] if "tau" in state else 1.0
    return np.kron(b, a) / tau


@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_ratio_is_the_actual_over_the_dense_models_change(name: str, with_biases: bool) -> None:
    """With momentum, clip and weight decay in the step, and biases that are columns of the weights, or that the
    fallback moves only afterwards.
    """
    model = mlp(bias=True)
    optimizer = hf_so2.build_optimizer(
        name, model, lr=0.3, weight_decay=0.1, damping=0.1, precondition_biases=with_biases, **ADAPTIVE
    )
    train(model, optimizer, range(6))
    weights = {name: [name, name.replace("weight", "bias")][: 1 + with_biases] for name in ("0.weight", "2.weight")}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    loss(model, 6).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert optimizer.wants_loss  # step 7
    optimizer.reevaluate_with(lambda: loss(model, 6))
    optimizer.step()

    predicted = 0.0
    after = {n: p.detach() for n, p in model.named_parameters()}
    for weight, columns in weights.items():
        change, gradient = (
            np.concatenate([x[n].numpy().reshape(len(x[n]), -1) for n in columns], axis=1).reshape(-1)
            for x in ({n: after[n] - before[n] for n in columns}, gradients)
        )
        fisher = dense_fisher(optimizer.curvature.layers[weight])
        predicted += gradient @ change + change @ fisher @ change / 2
    moved = mlp(bias=True)
    moved.load_state_dict(before)
    start = float(loss(moved, 6).detach())
    moved.load_state_dict(before | {n: after[n] for columns in weights.values() for n in columns})
    actual = float(loss(moved, 6).detach()) - start
    assert predicted < 0
    assert optimizer.telemetry()["curvature/reduction_ratio"] == pytest.approx(actual / predicted, rel=1e-6)


@pytest.mark.parametrize("diagonal", ["A", "B", "AB"])
def test_curvature_along_a_step_where_a_side_is_a_diagonal(diagonal: str) -> None:
    """A side without a basis of its own, as of an embedding or a head, has the unit vectors for one."""
    rng = np.random.default_rng(0)
    shapes = {"A": 4, "B": 3}
    bases = {side: np.linalg.qr(rng.standard_normal((n, n)))[0] for side, n in shapes.items() if side not in diagonal}
    s, change = rng.random((3, 4)), rng.standard_normal((3, 4))
    state = {f"{side}_basis": torch.from_numpy(basis) for side, basis in bases.items()} | {"S": torch.from_numpy(s)}
    basis = np.kron(*(bases.get(side, np.eye(shapes[side])) for side in "BA"))
    expected = change.reshape(-1) @ (basis * s.reshape(-1)) @ basis.T @ change.reshape(-1)
    found = EKFAC(0.9, diagonal=diagonal).curvature_along(state, torch.from_numpy(change))
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def prescribed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Ratios that the next measurements are going to find, instead of those of the model."""
    ratios: list[float] = []
    monkeypatch.setattr(adaptive, "predicted_change", lambda updates: -1.0)

    def losses(damping: Any) -> float:
        losses.calls += 1
        return 0.0 if losses.calls % 2 else -ratios.pop(0)

    losses.calls = 0
    monkeypatch.setattr(adaptive.AdaptiveDamping, "_loss", losses)
    return ratios


def test_factor_follows_the_rule_of_the_paper(prescribed: list[float]) -> None:
    """`λ ← λ ω^t` above 3/4 and `λ ω^-t` below 1/4, with ω = 19/20 and t the steps since the last look."""
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, damping=0.1, preconditioner_update_steps=10, **ADAPTIVE)
    prescribed += [0.9, 0.5, 0.1, -3.0, float("nan"), 0.75, 0.25, 2.0]
    exponents = {1: 1, 2: 1, 4: -1, 7: -4, 10: -7, 20: -7, 30: -7, 40: 3}
    exponent = 0
    for step in range(1, 41):
        assert optimizer.wants_loss == (step in exponents)
        train(model, optimizer, range(step, step + 1))
        exponent = exponents.get(step, exponent)
        assert optimizer.curvature.damping_factor == pytest.approx(0.95**exponent, rel=1e-12)
    assert not prescribed


def test_factor_reaches_the_next_refresh_and_the_log(prescribed: list[float]) -> None:
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, damping_rule="constant", damping=0.1, lr=0.01, **ADAPTIVE)
    prescribed += [0.1, 0.5]
    train(model, optimizer, range(2))
    for name, layer in optimizer.curvature.layers.items():
        for side in "AB":
            factor = (layer.state[side] / layer.state["weight"]).numpy()
            expected = np.linalg.inv(factor + 0.1 / 0.95 * np.eye(len(factor)))
            np.testing.assert_allclose(layer.state[f"{side}_root"].numpy(), expected, rtol=1e-9)
            assert optimizer.telemetry("layer")[f"curvature/{name}/damping_{side}"] == pytest.approx(0.1 / 0.95)
    assert optimizer.telemetry()["curvature/damping_factor"] == pytest.approx(1 / 0.95)


@pytest.mark.parametrize("name", METHODS)
def test_a_trustworthy_model_lowers_damping_and_a_step_too_long_raises_it(name: str) -> None:
    factors = []
    for lr in (1e-4, 30.0):
        model = mlp()
        optimizer = hf_so2.build_optimizer(
            name, model, lr=lr, damping=0.1, adaptive_damping=True, norm_control="none", momentum=0.0
        )
        train(model, optimizer, range(2))
        factors.append(optimizer.curvature.damping_factor)
    assert factors[0] < 1 < factors[1]


def test_a_step_of_length_zero_says_nothing() -> None:
    """A warm-up starts at a rate of zero."""
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, weight_decay=0.1, **ADAPTIVE)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(1))
    assert optimizer.curvature.damping_factor == 1.0
    assert "curvature/reduction_ratio" not in optimizer.telemetry()


def test_resume_continues_bit_for_bit() -> None:
    settings = {"lr": 0.3, "damping": 0.1, "preconditioner_update_steps": 3, **ADAPTIVE}
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, **settings)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(5, 13))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = mlp()
    again.load_state_dict(saved["model"])
    fresh = hf_so2.build_optimizer("kfac", again, **settings)
    fresh.load_state_dict(saved["optimizer"])
    assert fresh.curvature.damping_factor != 1.0
    train(again, fresh, range(5, 13))
    assert_same_parameters(again, model)
    assert fresh.curvature.damping_factor == optimizer.curvature.damping_factor


def test_ranks_agree_on_the_mean_of_their_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, the other one played by a function: the loss is the mean of both."""
    optimizer = hf_so2.build_optimizer("kfac", mlp(), **ADAPTIVE)
    monkeypatch.setattr(adaptive, "world", lambda: (0, 2))
    monkeypatch.setattr(adaptive, "sum_over_ranks", lambda tensors: [tensor.add_(5.0) for tensor in tensors])
    for value in (1.0, 2.0):
        optimizer.reevaluate_with(lambda value=value: value)
    assert optimizer._adaptive._loss() == (1.0 + 2.0 + 5.0) / 2


@pytest.mark.parametrize("norm_control", ["spectral", "graft_adam", "graft_sgd"])
def test_refused_where_the_length_of_a_step_does_not_follow_damping(norm_control: str, tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=rf"^adaptive_damping=True: needs norm_control.*{norm_control}"):
        hf_so2.build_optimizer("kfac", mlp(), adaptive_damping=True, norm_control=norm_control)


def test_refused_without_a_model_of_the_loss_or_a_loss(tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^adaptive_damping=True: needs both factors"):
        hf_so2.build_optimizer("foof", mlp(), **ADAPTIVE)
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, **ADAPTIVE)
    loss(model).backward()
    with pytest.raises(hf_so2.ConfigurationError, match=r"^adaptive_damping=True: needs `optimizer.reevaluate_with"):
        optimizer.step()
    with pytest.raises(hf_so2.ConfigurationError, match=r"^adaptive_damping=True: needs max_grad_norm=0"):
        trained(llama(), token_rows(), tmp_path, **ADAPTIVE)


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Every ratio that is measured."""
    found: list[float] = []
    scale = adaptive.AdaptiveDamping.apply

    def recording(self: Any, *args: Any) -> None:
        scale(self, *args)
        found.append(self.ratio)

    monkeypatch.setattr(adaptive.AdaptiveDamping, "apply", recording)
    return found


TRAINER: dict[str, Any] = {**ADAPTIVE, "max_grad_norm": 0.0, "max_steps": 4, "learning_rate": 0.05, "damping": 1e-2}


def test_trainer_measures_the_loss_of_the_whole_step(ratios: list[float], tmp_path: Path) -> None:
    """However it is cut into micro-batches, with padding."""
    for split in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}):
        model = in_float64(llama(num_hidden_layers=1))
        trainer = trained(model, token_rows(padded=True), tmp_path, **(TRAINER | split))
    assert len(ratios) == 6
    # The Trainer's loss of float64 logits is computed in float32.
    assert ratios[3:] == pytest.approx(ratios[:3], rel=1e-2)
    assert all(0.2 < ratio < 3 for ratio in ratios)
    assert optimizer_of(trainer).curvature.damping_factor != 1.0


def test_measuring_disturbs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a factor that never moves, a model with dropout trains bit for bit as without: no random number is drawn,
    nothing is captured, and the model is left in training mode.
    """
    monkeypatch.setattr(adaptive, "GOOD", float("inf"))
    monkeypatch.setattr(adaptive, "POOR", float("-inf"))
    plain, measured = (
        trained(gpt2(resid_pdrop=0.1), token_rows(), tmp_path, **(TRAINER | {"adaptive_damping": on}))
        for on in (False, True)
    )
    assert measured.model.training
    assert_same_parameters(measured.model, plain.model)
