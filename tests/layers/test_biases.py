"""`precondition_biases`: the textbook's extra column, `h ← [h, 1]`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from shared.dense_fisher import METHODS, dense_preconditioner, eye, loss_sum, mlp_case, relative, stand_still
from shared.helpers import assert_same_parameters, dense_factors, gpt2
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_so2

RHO = 0.03


def conv1d_case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    _, batch = mlp_case()
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(9, 7), nn.Tanh(), Conv1D(5, 9)).double()
    for module in (model[0], model[2]):
        nn.init.normal_(module.bias)
    return model, batch


CASES = {"linear": mlp_case, "conv1d": conv1d_case}


def extended_rows(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`[h, 1]` and `δ` of every layer."""
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    dense = dense_factors(model, layers, loss_sum, batch)
    ones = np.ones((len(batch[0]), 1))
    return {n: (np.hstack([d.inputs.numpy(), ones]), d.deltas.numpy()) for n, d in dense.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_preconditioners_are_those_of_the_extended_layer(name: str, case: str) -> None:
    model, batch = CASES[case]()
    optimizer = stand_still(name, model, batch, damping=RHO, precondition_biases=True)
    optimizer.curvature.capture.remove()
    for layer, (h, delta) in extended_rows(model, batch).items():
        entry = optimizer.curvature.layers[layer]
        a, b = h.T @ h / len(h), delta.T @ delta / len(h)
        weight_h, weight_delta = (np.sum(x**2, axis=1, keepdims=True) for x in (h, delta))
        root = np.sqrt(np.mean(weight_h * weight_delta))
        phi, psi = (h * weight_delta).T @ h / len(h) / root, (delta * weight_h).T @ delta / len(h) / root
        if name in ("ekfac", "tekfac"):
            basis = np.kron(entry.state["B_basis"].numpy(), entry.state["A_basis"].numpy())
            rows = np.einsum("to,ti->toi", delta, h).reshape(len(h), -1)
            block = basis @ np.diag(np.mean((rows @ basis) ** 2, axis=0) + RHO) @ basis.T
        else:
            right, left = {"kfac": (a, b), "foof": (a, None), "tkfac": (phi, psi)}[name]
            block = np.kron(eye(b) if left is None else left + RHO * eye(left), right + RHO * eye(right))
        assert relative(dense_preconditioner(entry.block, entry.state, entry.shape), np.linalg.inv(block)) < 1e-9


@pytest.mark.parametrize("norm_control", ["none", "spectral"])
@pytest.mark.parametrize("case", CASES)
def test_weight_and_bias_take_their_parts_of_one_update(case: str, norm_control: str) -> None:
    """Two steps with momentum; the optimizer's decay leaves the bias alone."""
    model, batch = CASES[case]()
    bare = deepcopy(model)  # without hooks
    settings: dict[str, Any] = {"damping_rule": "constant", "damping": RHO, "momentum": 0.5, "beta2": 0.0}
    optimizer = hf_so2.build_optimizer(
        "kfac", model, lr=0.1, weight_decay=0.2, norm_control=norm_control, precondition_biases=True, **settings
    )
    moments: dict[str, np.ndarray] = {}
    for _ in range(2):
        bare.load_state_dict(model.state_dict())
        rows = extended_rows(bare, batch)
        start = {n: p.detach().clone().numpy() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        (loss_sum(model(batch[0]), batch) / len(batch[0])).backward()
        optimizer.step()
        for layer, (h, delta) in rows.items():
            moments[layer] = 0.5 * moments.get(layer, 0.0) + 0.5 * delta.T @ h / len(h)
            a, b = h.T @ h / len(h), delta.T @ delta / len(h)
            left = np.linalg.solve(b + RHO * eye(b), moments[layer])
            update = np.linalg.solve(a + RHO * eye(a), left.T).T
            if norm_control == "spectral":
                update *= np.sqrt(update.shape[0] / update.shape[1]) / np.linalg.norm(update, 2)
            module, bias = model.get_submodule(layer.removesuffix(".weight")), layer.replace("weight", "bias")
            weight = start[layer] if isinstance(module, nn.Linear) else start[layer].T
            moved = module.weight.detach().numpy()
            moved = moved if isinstance(module, nn.Linear) else moved.T
            tolerance = 1e-3 if norm_control == "spectral" else 1e-9  # of the iteration for the norm
            assert relative(weight * (1 - 0.02) - moved, 0.1 * update[:, :-1]) < tolerance
            assert relative(start[bias] - module.bias.detach().numpy(), 0.1 * update[:, -1]) < tolerance


def test_coverage_and_resume() -> None:
    """Biases of norms stay in the fallback; the state goes through `state_dict` bit for bit."""
    batch = torch.randint(1, 32, (4, 9), generator=torch.Generator().manual_seed(0))

    def steps(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()

    model = gpt2().train()
    optimizer = hf_so2.build_optimizer("kfac", model, precondition_biases=True)
    steps(model, optimizer, 2)
    found = {entry.name: entry.algorithm for entry in optimizer.coverage().parameters}
    assert found["transformer.h.0.attn.c_attn.bias"] == found["transformer.h.1.mlp.c_proj.bias"] == "kfac"
    assert found["transformer.h.0.ln_1.bias"] == found["transformer.ln_f.bias"] == "adamw"
    bias = model.transformer.h[0].attn.c_attn.bias
    assert optimizer.state[bias].keys() == {"momentum_buffer"}
    copy = gpt2().train()
    other = hf_so2.build_optimizer("kfac", copy, precondition_biases=True)
    copy.load_state_dict(model.state_dict())
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 2)
    steps(copy, other, 2)
    assert_same_parameters(copy, model)
