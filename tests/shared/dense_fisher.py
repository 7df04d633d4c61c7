"""Dense Fisher blocks and dense preconditioners, written out from the definitions in float64.

vec stacks rows: entry (i, j) of a (fan_out, fan_in) matrix is entry `i · fan_in + j` of the vector, so that a Kronecker
block is `kron(B, A)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from shared.helpers import in_float64, llama, token_loss_sum
from torch import Tensor, nn
from torch.func import grad

import hf_so2

METHODS = ("kfac", "foof", "ekfac", "tkfac", "tekfac")

# A step that leaves every weight as it is and every statistic at its value of this batch.
STANDSTILL: dict[str, Any] = {
    "lr": 1e-30,
    "fallback_learning_rate": 1e-30,
    "momentum": 0.0,
    "beta2": 0.0,
    "norm_control": "none",
    "damping_rule": "constant",
}


@dataclass
class DenseBlock:
    """Everything the definitions make of the gradients `δ hᵀ` of single tokens, shape (N, fan_out, fan_in)."""

    token_gradients: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.token_gradients.shape[1:]

    @property
    def gradient(self) -> np.ndarray:
        return self.token_gradients.mean(axis=0)

    @property
    def fisher(self) -> np.ndarray:
        """`(1/N) Σ vec(δ hᵀ) vec(δ hᵀ)ᵀ`."""
        vectors = self.token_gradients.reshape(len(self.token_gradients), -1)
        return vectors.T @ vectors / len(vectors)

    @property
    def trace_restricted(self) -> tuple[np.ndarray, np.ndarray, float]:
        """`(τΦ, τΨ, τ)`: the partial traces and the trace of the block."""
        fan_out, fan_in = self.shape
        four = self.fisher.reshape(fan_out, fan_in, fan_out, fan_in)
        phi, psi = np.einsum("oioj->ij", four), np.einsum("pijj->pi", four.transpose(0, 2, 1, 3))
        return phi, psi, float(np.trace(self.fisher))


def token_gradients(
    model: nn.Module, layers: dict[str, nn.Module], loss_sum: Callable[..., Tensor], batch: tuple[Any, ...]
) -> dict[str, DenseBlock]:
    """Give every token a copy of its own of every weight and differentiate the summed loss by the copies.

    Neither `h` nor `δ` is looked at: their product comes out of `torch.func.grad` as a whole.
    """
    copies: dict[str, Tensor] = {}

    def own_weight(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            if name not in copies:
                weight = module.weight.detach()
                copies[name] = weight.expand(len(rows), *weight.shape).clone()
                return None
            result = torch.einsum("toi,ti->to", copies[name], rows)
            return (result if module.bias is None else result + module.bias.detach()).reshape(output.shape)

        return hook

    handles = [module.register_forward_hook(own_weight(name)) for name, module in layers.items()]

    def loss(weights: dict[str, Tensor]) -> Tensor:
        copies.update(weights)
        return loss_sum(model(batch[0]), batch)

    try:
        with torch.no_grad():
            model(batch[0])
        gradients = grad(loss)(dict(copies))
    finally:
        for handle in handles:
            handle.remove()
    return {name: DenseBlock(gradients[name].detach().numpy()) for name in layers}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every `Linear` but a language model's head, by the name of its weight."""
    modules = model.named_modules()
    return {f"{n}.weight": m for n, m in modules if isinstance(m, nn.Linear) and n != "lm_head"}


def loss_sum(outputs: Any, batch: tuple[Any, ...]) -> Tensor:
    return token_loss_sum(outputs if isinstance(outputs, Tensor) else outputs.logits, batch[1])


def mlp_case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), nn.GELU(), nn.Linear(6, 5)).double()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(23, 7, generator=generator, dtype=torch.float64)
    return model, (inputs, torch.randint(0, 5, (23,), generator=generator))


def transformer_case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, 32, (2, 3, 8), generator=generator)
    return in_float64(llama()).train(), (tokens, targets)


CASES = {"mlp": mlp_case, "transformer": transformer_case}


def stand_still(
    name: str, model: nn.Module, batch: tuple[Any, ...], *, steps: int = 2, **settings: Any
) -> hf_so2.SecondOrderOptimizer:
    """The optimizer after `steps` steps that changed no weight.

    Two steps give EKFAC's S: the first builds the bases, the second measures S in them.
    """
    optimizer = hf_so2.build_optimizer(name, model, **(STANDSTILL | settings))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(steps):
        optimizer.zero_grad()
        (loss_sum(model(batch[0]), batch) / batch[1].numel()).backward()
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    return optimizer


def after_still_steps(
    optim: str,
    batch: tuple[Tensor, Tensor],
    steps: int,
    parts: Iterable[Any],
    resume: Mapping[str, Any] | None = None,
    **settings: Any,
) -> hf_so2.SecondOrderOptimizer:
    """The optimizer of an MLP whose weights hardly move, so that every step sees the same rows.

    Args:
        optim: its name.
        batch: inputs and targets.
        steps: number of steps, each on the parts of the batch one after the other.
        parts: indices of sequences.
        resume: a state to load before.
        settings: settings of the optimizer.
    """
    model, _ = mlp_case()
    inputs, targets = batch
    optimizer = hf_so2.build_optimizer(optim, model, lr=1e-30, fallback_learning_rate=1e-30, **settings)
    if resume is not None:
        optimizer.load_state_dict(dict(resume))
    for _ in range(steps):
        for part in parts:
            (token_loss_sum(model(inputs[part]), targets[part]) / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def dense_preconditioner(block: Any, state: dict[str, Tensor], shape: tuple[int, int]) -> np.ndarray:
    """The matrix of `vec(G) -> vec(P(G))`, one column per unit matrix."""
    size = shape[0] * shape[1]
    units = torch.eye(size, dtype=state["weight"].dtype).reshape(size, *shape)
    return torch.stack([block.precondition(state, unit).reshape(-1) for unit in units], dim=1).numpy()


def eye(matrix: np.ndarray) -> np.ndarray:
    return np.eye(len(matrix))


def relative(actual: Any, expected: Any) -> float:
    """`‖actual - expected‖ / ‖expected‖`."""
    return float(np.linalg.norm(np.asarray(actual) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected)))


def approximation(name: str, state: dict[str, Tensor]) -> np.ndarray:
    """The dense block that a method's averages stand for, undamped, from the documented contents of its state."""
    average = {key: (value / state["weight"]).numpy() for key, value in state.items() if key in ("A", "B", "tau")}
    if name in ("ekfac", "tekfac"):
        basis = np.kron(state["B_basis"].numpy(), state["A_basis"].numpy())
        return basis @ np.diag(state["S"].numpy().ravel()) @ basis.T
    product = np.kron(average["B"], average["A"])
    return product if name == "kfac" else product / average["tau"]
