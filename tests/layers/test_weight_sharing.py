"""`weight_sharing`: what counts as an example of a layer that is used at every position of a sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shared.dense_fisher import METHODS, approximation, linear_layers, mlp_case, relative, stand_still
from shared.helpers import captured_factors, dense_factors, llama, optimizer_of, token_loss_sum, token_rows, trained
from torch import Tensor, nn

import hf_so2

Batch = tuple[Tensor, Tensor]


def sequences() -> tuple[nn.Module, Batch]:
    model, _ = mlp_case()
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(6, 5, 7, generator=generator, dtype=torch.float64)
    return model, (inputs, torch.randint(0, 5, (6, 5), generator=generator))


def rows_of(model: nn.Module, batch: Batch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`h` and `δ` of every layer, (sequences, positions, fan)."""
    dense = dense_factors(model, linear_layers(model), lambda out, data: token_loss_sum(out, data[1]), batch)
    shape = batch[1].shape
    return {n: tuple(x.numpy().reshape(*shape, -1) for x in (d.inputs, d.deltas)) for n, d in dense.items()}


@pytest.mark.parametrize("halves", [False, True])
def test_reduced_factors_equal_their_definition(halves: bool) -> None:
    """`A` averages over sequences the square of the mean input, `B` over tokens that of the summed gradient."""
    model, (inputs, targets) = sequences()
    optimizer = hf_so2.build_optimizer("kfac", model, weight_sharing="reduce")
    for part in (slice(0, 2), slice(2, 6)) if halves else (slice(0, 6),):
        (token_loss_sum(model(inputs[part]), targets[part]) / 30).backward()
    dense = rows_of(mlp_case()[0], (inputs, targets))
    optimizer.step()
    for name, factors in captured_factors(optimizer).items():
        h, delta = dense[name]
        assert relative(factors["A"], np.einsum("si,sj->ij", h.mean(1), h.mean(1)) / 6) < 1e-12
        assert relative(factors["B"], np.einsum("si,sj->ij", delta.sum(1), delta.sum(1)) / 30) < 1e-12


def test_corrected_diagonal_is_of_reduced_rows() -> None:
    model, batch = sequences()
    optimizer = stand_still("ekfac", model, batch, weight_sharing="reduce")
    optimizer.curvature.capture.remove()
    for name, (h, delta) in rows_of(model, batch).items():
        state = optimizer.curvature.layers[name].state
        basis_a, basis_b = state["A_basis"].numpy(), state["B_basis"].numpy()
        expected = ((delta.sum(1) @ basis_b) ** 2).T @ ((h.mean(1) @ basis_a) ** 2) / 30
        assert relative(state["S"], expected) < 1e-11


@pytest.mark.parametrize("name", METHODS)
def test_sequences_of_one_token_are_tokens(name: str) -> None:
    _, (inputs, targets) = sequences()
    batch = inputs.reshape(30, 1, 7), targets.reshape(30, 1)
    reduced, expanded = (stand_still(name, mlp_case()[0], batch, weight_sharing=w) for w in ("reduce", "expand"))
    for layer, entry in reduced.curvature.layers.items():
        for key, value in entry.state.items():
            torch.testing.assert_close(value, expanded.curvature.layers[layer].state[key])


def test_padded_positions_are_left_out(tmp_path: Path) -> None:
    """Padded on the right, a causal model cannot tell what the padding holds, and neither can the factors."""
    clean = token_rows(16, padded=True)
    noisy = [
        {**row, "input_ids": row["input_ids"].where(row["attention_mask"].bool(), torch.tensor(7))} for row in clean
    ]
    settings = {"max_steps": 1, "weight_sharing": "reduce"}
    first, second = (
        captured_factors(optimizer_of(trained(llama(), rows, tmp_path, **settings))) for rows in (clean, noisy)
    )
    for name, factors in first.items():
        for key, value in factors.items():
            torch.testing.assert_close(value, second[name][key], rtol=1e-5, atol=0)
    lengths = torch.stack([row["attention_mask"].sum() for row in clean])
    assert len(set(lengths.tolist())) > 2


def test_padded_means_are_over_what_is_not_padding(tmp_path: Path) -> None:
    """The first layer's inputs do not depend on other positions: its `A` by hand."""
    rows = token_rows(16, padded=True)
    model = llama()
    optimizer = optimizer_of(trained(model, rows, tmp_path, max_steps=1, weight_sharing="reduce", learning_rate=1e-30))
    fresh = llama()
    means = []
    for row in rows:
        embedded = fresh.model.embed_tokens(row["input_ids"][row["attention_mask"].bool()][:-1])
        means.append(fresh.model.layers[0].input_layernorm(embedded).mean(dim=0).detach().double())
    expected = sum(m.outer(m) for m in means) / len(rows)
    actual = captured_factors(optimizer)["model.layers.0.self_attn.q_proj.weight"]["A"]
    assert relative(actual, expected) < 1e-5


def test_reduced_factors_equal_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="pip install --no-deps -r tests/second_opinion.txt")
    model, batch = sequences()
    optimizer = stand_still("kfac", model, batch, weight_sharing="reduce")
    optimizer.curvature.capture.remove()

    class ClassesSecond(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).movedim(-1, 1)

    for name, module in linear_layers(model).items():
        operator = curvlinops.KFACLinearOperator(
            ClassesSecond(model),
            nn.CrossEntropyLoss(reduction="mean"),
            [module.weight],
            [batch],
            fisher_type="empirical",
            kfac_approx="reduce",
            check_deterministic=False,
            progressbar=False,
        )
        theirs = (operator @ torch.eye(module.weight.numel(), dtype=torch.float64)).detach().numpy()
        assert relative(approximation("kfac", optimizer.curvature.layers[name].state), theirs) < 1e-11, name
