"""What turns a gradient into an update around the preconditioner: order and kind of momentum, grafted norms, exponents.

Oracles: `torch.optim.Adam` and `SGD` on the same gradients, recursions in NumPy, dense roots in float64.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from shared.helpers import assert_same_parameters, relative_error
from torch import Tensor, nn

import hf_so2
from hf_so2.curvature import KFAC

FAN_IN, FAN_OUT, ROWS = 7, 5, 20
RHO, MU, LR = 0.05, 0.8, 0.1
CONSTANT: dict[str, Any] = {"damping_rule": "constant", "damping": RHO, "momentum": MU, "lr": LR}


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FAN_IN, FAN_OUT, bias=False).double()


def backward(model: nn.Linear, step: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A loss that is linear in the weight, so that its gradient does not depend on it: `h` and `δ`, (rows, …)."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, FAN_IN, generator=generator, dtype=torch.float64)
    deltas = torch.randn(ROWS, FAN_OUT, generator=generator, dtype=torch.float64) * scale
    model.zero_grad()
    ((model(inputs.to(model.weight.dtype)) * deltas).sum() / ROWS).backward()
    return inputs, deltas


def changes(settings: dict[str, Any], steps: int, scales: dict[int, float] | None = None) -> Iterator[Tensor]:
    """The change of the weight in each step."""
    model = linear()
    optimizer = hf_so2.build_optimizer("kfac", model, **settings)
    for step in range(steps):
        before = model.weight.detach().clone()
        backward(model, step, (scales or {}).get(step, 1.0))
        optimizer.step()
        yield model.weight.detach() - before


def reference_norms(optimizer_class: Any, steps: int, **arguments: Any) -> Iterator[float]:
    """Frobenius norms of the steps that an optimizer of torch makes with the same gradients."""
    model = linear()
    optimizer = optimizer_class(model.parameters(), **arguments)
    for step in range(steps):
        before = model.weight.detach().clone()
        backward(model, step)
        optimizer.step()
        yield float(torch.linalg.vector_norm(model.weight.detach() - before))


@pytest.mark.parametrize("nesterov", [False, True])
def test_grafted_sgd_has_the_norm_of_torch_sgd(nesterov: bool) -> None:
    """An average with decay μ is torch's sum times 1-μ."""
    settings = {"norm_control": "graft_sgd", "momentum": MU, "nesterov": nesterov, "lr": LR}
    expected = reference_norms(torch.optim.SGD, 6, lr=LR * (1 - MU), momentum=MU, nesterov=nesterov)
    for change, norm in zip(changes(settings, 6), expected, strict=True):
        assert float(torch.linalg.vector_norm(change)) == pytest.approx(norm, rel=1e-10)


def test_grafted_adam_has_the_norm_of_torch_adam() -> None:
    settings = {"norm_control": "graft_adam", "momentum": MU, "adam_beta2": 0.7, "adam_epsilon": 1e-3, "lr": LR}
    expected = reference_norms(torch.optim.Adam, 6, lr=LR, betas=(MU, 0.7), eps=1e-3)
    for change, norm in zip(changes(settings, 6), expected, strict=True):
        assert float(torch.linalg.vector_norm(change)) == pytest.approx(norm, rel=1e-10)


@pytest.mark.parametrize(
    ("norm_control", "reference", "arguments"),
    [
        ("graft_sgd", torch.optim.SGD, {}),
        ("graft_adam", torch.optim.Adam, {"betas": (0.0, 0.95), "eps": 1e-8}),
    ],
)
def test_momentum_after_grafts_to_the_norm_without_momentum(
    norm_control: str, reference: Any, arguments: dict[str, Any]
) -> None:
    settings = {"norm_control": norm_control, "momentum_order": "after", "momentum": MU, "lr": LR}
    expected = reference_norms(reference, 6, lr=LR, **arguments)
    for change, norm in zip(changes(settings, 6), expected, strict=True):
        assert float(torch.linalg.vector_norm(change)) == pytest.approx(norm, rel=1e-10)


@pytest.mark.parametrize("norm_control", ["graft_sgd", "graft_adam"])
def test_grafting_keeps_the_direction(norm_control: str) -> None:
    pairs = zip(
        changes({**CONSTANT, "norm_control": norm_control}, 5),
        changes({**CONSTANT, "norm_control": "none"}, 5),
        strict=True,
    )
    for grafted, plain in pairs:
        ratio = torch.linalg.vector_norm(grafted) / torch.linalg.vector_norm(plain)
        assert relative_error(grafted, plain * ratio) < 1e-10


@pytest.mark.parametrize("norm_control", ["graft_sgd", "graft_adam"])
def test_a_zero_update_stays_zero_under_grafting(norm_control: str) -> None:
    settings = {"norm_control": norm_control, "momentum": 0.0, "lr": LR}
    sizes = [float(torch.linalg.vector_norm(c)) for c in changes(settings, 4, {0: 0.0, 2: 0.0})]
    assert sizes[0] == sizes[2] == 0.0
    assert sizes[1] > 0.0
    assert np.isfinite(sizes).all()
    assert sizes[3] > 0.0


def dense_preconditioned(step: int, value: np.ndarray, exponents: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """`(B+ρI)^-e_B V (A+ρI)^-e_A` with the factors of one step, roots by NumPy's eigendecomposition."""
    inputs, deltas = (x.numpy() for x in backward(linear(), step))

    def root(rows: np.ndarray, exponent: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(rows.T @ rows / len(rows) + RHO * np.eye(rows.shape[1]))
        return (vectors * values**-exponent) @ vectors.T

    return root(deltas, exponents[1]) @ value @ root(inputs, exponents[0])


def gradient(step: int) -> np.ndarray:
    inputs, deltas = backward(linear(), step)
    return (deltas.T @ inputs / ROWS).numpy()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_both_orders_of_momentum_equal_the_numpy_recursion(order: str, nesterov: bool) -> None:
    """`m ← μ m + (1-μ) x`, with Nesterov `(1-μ) x + μ m`; x is the gradient or what the preconditioner made of it."""
    settings = {
        **CONSTANT,
        "norm_control": "none",
        "momentum_order": order,
        "nesterov": nesterov,
        "beta2": 0.0,
        "factor_update_steps": 1,
        "preconditioner_update_steps": 1,
    }
    average = np.zeros((FAN_OUT, FAN_IN))
    for step, change in enumerate(changes(settings, 6)):
        value = gradient(step) if order == "before" else dense_preconditioned(step, gradient(step))
        average = MU * average + (1 - MU) * value
        moment = (1 - MU) * value + MU * average if nesterov else average
        expected = dense_preconditioned(step, moment) if order == "before" else moment
        assert relative_error(change, torch.from_numpy(-LR * expected)) < 1e-9


def test_nesterov_is_that_of_torch_sgd() -> None:
    """With a preconditioner that is nearly a multiple of the identity: `ρ² P(G) → G` for large ρ."""
    rho = 1e9
    settings = {**CONSTANT, "damping": rho, "norm_control": "none", "nesterov": True, "lr": LR * rho**2}
    model = linear()
    sgd = torch.optim.SGD(model.parameters(), lr=LR * (1 - MU), momentum=MU, nesterov=True)
    for step, change in enumerate(changes(settings, 6)):
        before = model.weight.detach().clone()
        backward(model, step)
        sgd.step()
        assert relative_error(change, model.weight.detach() - before) < 1e-6


class Corrected(KFAC):
    """A block that asks for bias-corrected momentum, as Adam in an eigenbasis does."""

    corrects_momentum = True


@pytest.mark.parametrize("nesterov", [False, True])
def test_corrected_momentum_of_equal_gradients_is_the_gradient(nesterov: bool) -> None:
    """From the first step on, where the plain average is `(1-μ^t) G`."""
    optimizer = hf_so2.build_optimizer("kfac", model := linear(), **CONSTANT, nesterov=nesterov, norm_control="none")
    optimizer.curvature.layers["weight"].block = Corrected(0.95)
    expected = torch.from_numpy(-LR * dense_preconditioned(0, gradient(0)))
    for _ in range(4):
        before = model.weight.detach().clone()
        backward(model, 0)
        optimizer.step()
        assert relative_error(model.weight.detach() - before, expected) < 1e-10


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (1.0, 0.5), (0.25, 0.75)])
@pytest.mark.parametrize("optim", ["kfac", "tkfac"])
def test_exponents_equal_dense_roots(optim: str, exponents: tuple[float, float]) -> None:
    model = linear()
    inputs, deltas = backward(model, 0)
    before = model.weight.detach().clone()
    settings = {**CONSTANT, "momentum": 0.0, "norm_control": "none"}
    optimizer = hf_so2.build_optimizer(optim, model, exponent_a=exponents[0], exponent_b=exponents[1], **settings)
    backward(model, 0)
    optimizer.step()
    if optim == "kfac":
        expected = dense_preconditioned(0, gradient(0), exponents)
    else:
        h, d = inputs.numpy(), deltas.numpy()
        weights_h, weights_d = (h**2).sum(1, keepdims=True), (d**2).sum(1, keepdims=True)
        tau = (weights_h * weights_d).mean()
        a, b = (h * weights_d).T @ h / ROWS / np.sqrt(tau), (d * weights_h).T @ d / ROWS / np.sqrt(tau)
        roots = []
        for factor, exponent in ((b, exponents[1]), (a, exponents[0])):
            values, vectors = np.linalg.eigh(factor + RHO * np.eye(len(factor)))
            roots.append((vectors * values**-exponent) @ vectors.T)
        expected = roots[0] @ gradient(0) @ roots[1]
    assert relative_error(model.weight.detach() - before, torch.from_numpy(-LR * expected)) < 1e-9


VARIANTS: dict[str, dict[str, Any]] = {
    "graft_adam": {"norm_control": "graft_adam"},
    "graft_sgd": {"norm_control": "graft_sgd", "nesterov": True},
    "after": {"momentum_order": "after", "nesterov": True},
    "root": {"exponent_a": 0.5, "exponent_b": 0.5, "norm_control": "kl_clip"},
    "overrides": {"damping_overrides": ["0=spectral:0.1"]},
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_continues_bit_for_bit(variant: str) -> None:
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, **VARIANTS[variant])
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(5, 12))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = mlp()
    again.load_state_dict(saved["model"])
    fresh = hf_so2.build_optimizer("kfac", again, **VARIANTS[variant])
    fresh.load_state_dict(saved["optimizer"])
    train(again, fresh, range(5, 12))
    assert_same_parameters(again, model)


PROGRAM = """
import sys
sys.path[:0] = {paths!r}
import torch, hf_so2
from engine import test_momentum_and_grafting as test
torch.set_num_threads(1)
for variant, settings in test.VARIANTS.items():
    saved = torch.load(f"{folder}/{{variant}}.pt", weights_only=True)
    model = test.mlp()
    model.load_state_dict(saved["model"])
    optimizer = hf_so2.build_optimizer("kfac", model, **settings)
    optimizer.load_state_dict(saved["optimizer"])
    test.train(model, optimizer, range(5, 8))
    torch.save(model.state_dict(), f"{folder}/{{variant}}-after.pt")
"""


@pytest.mark.slow  # starts an interpreter, which imports transformers
def test_another_process_continues_bit_for_bit(tmp_path: Any, request: pytest.FixtureRequest) -> None:
    ends = {}
    for variant, settings in VARIANTS.items():
        model = mlp()
        optimizer = hf_so2.build_optimizer("kfac", model, **settings)
        train(model, optimizer, range(5))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / f"{variant}.pt")
        train(model, optimizer, range(5, 8))
        ends[variant] = model.state_dict()
    root = request.config.rootpath
    program = PROGRAM.format(paths=[str(root), str(root / "tests")], folder=tmp_path)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    for variant, expected in ends.items():
        actual = torch.load(tmp_path / f"{variant}-after.pt", weights_only=True)
        assert all(torch.equal(actual[name], value) for name, value in expected.items()), variant
