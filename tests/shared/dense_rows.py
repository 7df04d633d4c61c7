"""What the definitions make of the rows of one layer: factors, the dense Fisher block, and the step of every method.

vec stacks rows, so that a Kronecker block is `kron(B, A)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from shared.helpers import dense_factors, rows_that_count
from shared.tasks import Task
from torch import Tensor, nn

# A share of the trace of what it is added to.
EPSILON = 1e-2


@dataclass
class DenseLayer:
    """One layer over a whole batch.

    Args:
        h: its inputs, (rows, fan_in), of the rows that count.
        delta: their output gradients of the rows' own losses, (rows, fan_out).
        n: how many predictions have a loss.
        gradient: of the training loss, (fan_out, fan_in).
    """

    h: np.ndarray
    delta: np.ndarray
    n: int
    gradient: np.ndarray

    @cached_property
    def fisher(self) -> np.ndarray:
        """`(1/N) Σ vec(δ hᵀ) vec(δ hᵀ)ᵀ`."""
        vectors = np.einsum("to,ti->toi", self.delta, self.h).reshape(len(self.h), -1)
        return vectors.T @ vectors / self.n

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """`A` and `B`."""
        return self.h.T @ self.h / len(self.h), self.delta.T @ self.delta / self.n

    @cached_property
    def trace_restricted(self) -> tuple[np.ndarray, np.ndarray, float]:
        """`τΦ`, `τΨ` and `τ`: the partial traces and the trace of the block."""
        fan_out, fan_in = self.gradient.shape
        four = self.fisher.reshape(fan_out, fan_in, fan_out, fan_in)
        return np.einsum("oioj->ij", four), np.einsum("oipi->op", four), float(np.trace(self.fisher))

    def statistics(self, name: str) -> dict[str, np.ndarray | float]:
        """What a method averages, but for EKFAC's S."""
        if name in ("tkfac", "tekfac"):
            return dict(zip(("A", "B", "tau"), self.trace_restricted, strict=True))
        return dict(zip(("A", "B"), self.factors, strict=True))

    def second_moments(self, basis_a: np.ndarray, basis_b: np.ndarray) -> np.ndarray:
        """The diagonal of the block in a Kronecker basis, (fan_out, fan_in)."""
        basis = np.kron(basis_b, basis_a)
        return np.einsum("ki,kl,li->i", basis, self.fisher, basis, optimize=True).reshape(self.gradient.shape)

    def step(self, name: str) -> np.ndarray:
        """The damped inverse of what a method takes the block for, times the gradient."""
        if name in ("ekfac", "tekfac"):
            a, b = self.factors if name == "ekfac" else self.trace_restricted[:2]
            basis_a, basis_b = np.linalg.eigh(a)[1], np.linalg.eigh(b)[1]
            s = self.second_moments(basis_a, basis_b)
            basis = np.kron(basis_b, basis_a)
            block = basis @ np.diag(s.ravel() + EPSILON * s.sum()) @ basis.T
        elif name == "foof":
            block = np.kron(np.eye(len(self.gradient)), damped(self.factors[0]))
        elif name == "tkfac":
            phi, psi, tau = self.trace_restricted
            block = np.kron(damped(psi / np.sqrt(tau)), damped(phi / np.sqrt(tau)))
        else:
            a, b = self.factors
            block = np.kron(damped(b), damped(a))
        return np.linalg.solve(block, self.gradient.ravel()).reshape(self.gradient.shape)


def damped(factor: np.ndarray) -> np.ndarray:
    return factor + EPSILON * np.trace(factor) * np.eye(len(factor))


def dense_layers(task: Task, fisher: str) -> dict[str, DenseLayer]:
    """Every `Linear` of a task's model, by the name of its weight; those that no row of a loss depends on left out.

    Args:
        fisher: `empirical`, or `mc` with the most probable label drawn everywhere.
    """
    model = task.model()
    inputs = dict(task.inputs)
    labels = inputs.pop("labels")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)

    class Predictions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, _: Tensor) -> Tensor:
            return model(**inputs).logits

    def drawn(logits: Tensor) -> Tensor:
        rows = logits[task.places]
        if task.independent:
            answers = (rows > 0).to(rows)
            return nn.functional.binary_cross_entropy_with_logits(rows, answers, reduction="none").mean(dim=1).sum()
        return nn.functional.cross_entropy(rows, rows.argmax(dim=1), reduction="sum")

    losses = {
        "empirical": lambda logits, _: task.row_losses(logits, labels).sum(),
        "mc": lambda logits, _: drawn(logits),
    }
    modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    arguments = Predictions(), modules
    trained = dense_factors(*arguments, losses["empirical"], (task.inputs["input_ids"],))
    found = trained if fisher == "empirical" else dense_factors(*arguments, losses[fisher], (task.inputs["input_ids"],))
    live = rows_that_count(found)
    layers = {}
    for name, rows in found.items():
        if not rows.deltas.any():
            continue
        gradient = trained[name].deltas.mT @ trained[name].inputs / task.rows
        h, delta = rows.inputs[live[name]], rows.deltas[live[name]]
        layers[name] = DenseLayer(h.numpy(), delta.numpy(), task.rows, gradient.numpy())
    return layers


def draw_the_most_probable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have labels drawn that the oracle knows as well."""
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: p.argmax(dim=1, keepdim=True))
    monkeypatch.setattr(torch, "bernoulli", lambda p, **_: (p > 0.5).to(p))
