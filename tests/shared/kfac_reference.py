"""The K-FAC family in NumPy, from the formulas: running averages, seeds, moving bases, preconditioning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_so2.curvature import EKFAC, FOOF, KFAC, TEKFAC, TKFAC

BLOCKS: dict[str, Callable[[float], Any]] = {
    "kfac": KFAC,
    "foof": FOOF,
    "ekfac": EKFAC,
    "tkfac": TKFAC,
    "tekfac": TEKFAC,
}
CORRECTED = ("ekfac", "tekfac")

Rows = tuple[np.ndarray, np.ndarray]


def random_rows(rng: np.random.Generator, count: int, shape: tuple[int, int]) -> Rows:
    """Correlated `h` (count, fan_in) and `δ` (count, fan_out), so that no two methods agree."""
    fan_out, fan_in = shape
    h = rng.normal(size=(count, fan_in)) @ rng.normal(size=(fan_in, fan_in))
    delta = rng.normal(size=(count, fan_out)) @ rng.normal(size=(fan_out, fan_out))
    return h, delta * np.linalg.norm(h, axis=1, keepdims=True)


def fresh_state(block: Any, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return block.init_state(shape, torch.device("cpu"), dtype)


def feed(block: Any, state: dict[str, Tensor], rows: Rows) -> None:
    """One update with the means over `rows`."""
    dtype = state["weight"].dtype
    h, delta = (torch.from_numpy(part).to(dtype) for part in rows)
    block.update(state, {name: total / len(h) for name, total in block.observe(state, h, delta).items()})


def rho(rule: str, epsilon: float, eigenvalues: np.ndarray) -> float:
    """The rules that look at one spectrum only."""
    return {
        "trace": epsilon * float(eigenvalues.sum()),
        "trace_mean": epsilon * float(eigenvalues.mean()),
        "spectral": epsilon * float(eigenvalues.max()),
        "constant": epsilon,
    }[rule]


@dataclass
class Reference:
    """One layer.

    Args:
        name: a key of `BLOCKS`.
        beta: decay of the averages.
        averages: the running averages, uncorrected, after `steps` updates.
        frozen: the factors `(B, A)` of the last refresh, where no eigenbasis is used.
        bases: the eigenbases `(U_B, U_A)` of the last refresh, where one is.
        s: the corrected diagonal in them.
    """

    name: str
    beta: float
    averages: dict[str, np.ndarray] = field(default_factory=dict)
    steps: int = 0
    frozen: tuple[np.ndarray, np.ndarray] | None = None
    bases: tuple[np.ndarray, np.ndarray] | None = None
    s: np.ndarray | None = None

    def update(self, rows: Rows) -> None:
        h, delta = rows
        if self.s is not None and self.bases is not None:
            basis_b, basis_a = self.bases
            observed = np.einsum("to,ti->oi", (delta @ basis_b) ** 2, (h @ basis_a) ** 2) / len(h)
            self.s = self.beta * self.s + (1 - self.beta) * observed
        weight_h, weight_delta = np.ones(len(h)), np.ones(len(h))
        if self.name in ("tkfac", "tekfac"):
            weight_h, weight_delta = np.sum(h**2, axis=1), np.sum(delta**2, axis=1)
        new = {
            "A": np.einsum("t,ti,tj->ij", weight_delta, h, h) / len(h),
            "B": np.einsum("t,ti,tj->ij", weight_h, delta, delta) / len(h),
            "tau": np.mean(np.sum(h**2, axis=1) * np.sum(delta**2, axis=1)),
        }
        for key, value in new.items():
            self.averages[key] = self.beta * self.averages.get(key, 0.0 * value) + (1 - self.beta) * value
        self.steps += 1

    @property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """`(B, A)` with bias correction."""
        b, a, tau = (self.averages[key] / (1 - self.beta**self.steps) for key in ("B", "A", "tau"))
        scale = np.sqrt(tau) if self.name in ("tkfac", "tekfac") else 1.0
        return b / scale, a / scale

    def refresh(self) -> None:
        if self.name not in CORRECTED:
            self.frozen = self.factors
            return
        (values_b, basis_b), (values_a, basis_a) = (np.linalg.eigh(factor) for factor in self.factors)
        if self.s is None or self.bases is None:
            self.s = np.outer(values_b, values_a)
        else:
            old = np.kron(*self.bases)
            dense = old @ np.diag(self.s.ravel()) @ old.T
            new = np.kron(basis_b, basis_a)
            self.s = (new.T @ dense @ new).diagonal().reshape(self.s.shape)
        self.bases = basis_b, basis_a

    def precondition(self, gradient: np.ndarray, rule: str, epsilon: float, rho_s: float | None = None) -> np.ndarray:
        """`rho_s`: ρ of the last refresh, which EKFAC keeps while S goes on."""
        if self.name in CORRECTED:
            assert self.s is not None
            assert self.bases is not None
            basis_b, basis_a = self.bases
            damping = rho(rule, epsilon, self.s) if rho_s is None else rho_s
            return basis_b @ ((basis_b.T @ gradient @ basis_a) / (self.s + damping)) @ basis_a.T
        assert self.frozen is not None
        b, a = self.frozen
        right = np.linalg.solve(a + rho(rule, epsilon, np.linalg.eigvalsh(a)) * np.eye(len(a)), gradient.T).T
        if self.name == "foof":
            return right
        return np.linalg.solve(b + rho(rule, epsilon, np.linalg.eigvalsh(b)) * np.eye(len(b)), right)
