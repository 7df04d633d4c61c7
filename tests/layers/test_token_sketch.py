"""`factor_token_sketch`: factors from signed sums over the tokens of a sequence, with the same mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.dense_fisher import METHODS, after_still_steps, linear_layers, mlp_case, relative
from shared.helpers import captured_factors, dense_factors, llama, token_loss_sum
from torch import Tensor

import hf_so2
from hf_so2.layers.plan import fold_of_sequences

SEQUENCES, LENGTH = 6, 5
CPU = torch.device("cpu")


def matrix(sequences: int, length: int, size: int, seed: int = 0) -> np.ndarray:
    """The sketch as a matrix (groups, positions): what it makes of the identity."""
    fold = fold_of_sequences(torch.Size((sequences, length)), size, seed, CPU)
    identity = torch.eye(sequences * length, dtype=torch.float64)
    return (identity if fold is None else fold(identity, None)).numpy()


@given(sequences=st.integers(1, 3), length=st.integers(1, 20), size=st.integers(1, 24), seed=st.integers(0, 2**40))
def test_every_token_is_in_one_group_of_its_sequence(sequences: int, length: int, size: int, seed: int) -> None:
    sketch = matrix(sequences, length, size, seed)
    groups = -(-length // size)
    assert sketch.shape == (sequences * groups, sequences * length)
    assert set(np.unique(sketch)) <= {-1.0, 0.0, 1.0}
    assert np.array_equal(np.abs(sketch).sum(axis=0), np.ones(sequences * length))
    sizes = np.abs(sketch).sum(axis=1)
    assert sizes.max() <= size
    assert sizes.max() - sizes.min() <= 1
    # Of one sequence as of another.
    assert np.array_equal(sketch, np.kron(np.eye(sequences), matrix(1, length, size, seed)))


def test_products_of_different_tokens_have_mean_zero() -> None:
    """`E[SᵀS] = I`, so that the mean of `(S X)ᵀ (S Y)` is `XᵀY`; within six standard errors, for all pairs."""
    draws = 4000
    products = np.mean([sketch.T @ sketch for sketch in (matrix(1, 12, 4, seed) for seed in range(draws))], axis=0)
    assert np.array_equal(np.diag(products), np.ones(12))
    assert np.abs(products - np.eye(12)).max() < 6 / np.sqrt(draws)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(SEQUENCES, LENGTH, 7, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 5, (SEQUENCES, LENGTH), generator=generator)


def optimizer_after(
    steps: int,
    parts: Iterable[Any] = (slice(None),),
    optim: str = "kfac",
    resume: Mapping[str, Any] | None = None,
    **settings: Any,
) -> hf_so2.SecondOrderOptimizer:
    return after_still_steps(optim, batch(), steps, parts, resume, **{"factor_token_sketch": 2, **settings})


@pytest.mark.parametrize("optim", METHODS)
def test_factors_are_those_of_the_signed_sums(optim: str) -> None:
    optimizer = optimizer_after(1, optim=optim)
    model, _ = mlp_case()
    dense = dense_factors(model, linear_layers(model), lambda out, data: token_loss_sum(out, data[1]), batch())
    sketch, tokens = matrix(SEQUENCES, LENGTH, 2, seed=1), SEQUENCES * LENGTH
    assert optimizer.curvature is not None
    for name, layer in optimizer.curvature.layers.items():
        h, delta = dense[name].inputs.numpy(), dense[name].deltas.numpy()
        rows = {"A": h, "B": delta}
        if optim in ("tkfac", "tekfac"):
            lengths = {side: np.linalg.norm(x, axis=1, keepdims=True) for side, x in rows.items()}
            rows = {"A": h * lengths["B"], "B": delta * lengths["A"]}
            tau = ((lengths["A"] * lengths["B"]) ** 2).sum() / tokens
            assert relative(layer.state["tau"] / layer.state["weight"], tau) < 1e-12
        for side in ("A",) if optim == "foof" else ("A", "B"):
            folded = sketch @ rows[side]
            assert relative(layer.state[side] / layer.state["weight"], folded.T @ folded / tokens) < 1e-12


@pytest.mark.parametrize("parts", [(slice(0, 2), slice(2, 6)), ([3, 1, 5, 0, 4, 2],)])
def test_neither_the_split_of_a_batch_nor_its_order_matters(parts: Any) -> None:
    whole, other = captured_factors(optimizer_after(2)), captured_factors(optimizer_after(2, parts))
    for name in whole:
        for side in "AB":
            assert relative(other[name][side], whole[name][side]) < 1e-12


def test_signs_are_drawn_anew_at_every_step_and_resume_with_it() -> None:
    once = optimizer_after(1)
    twice = captured_factors(optimizer_after(2))
    resumed = captured_factors(optimizer_after(1, resume=once.state_dict()))
    for name, factors in captured_factors(once).items():
        assert torch.equal(resumed[name]["A"], twice[name]["A"])
        assert relative(twice[name]["A"], factors["A"]) > 1e-3


def test_what_is_no_sequence_is_taken_whole() -> None:
    """A batch of vectors, and the tokens that an embedding counts."""
    inputs, targets = batch()
    seen, frequencies = [], []
    for size in (1, 4):
        model, _ = mlp_case()
        optimizer = hf_so2.build_optimizer("kfac", model, factor_token_sketch=size)
        token_loss_sum(model(inputs[:, 0]), targets[:, 0]).backward()
        optimizer.step()
        seen.append(captured_factors(optimizer))

        model = llama()
        optimizer = hf_so2.build_optimizer("kfac", model, factor_token_sketch=size, precondition_embeddings=True)
        tokens = torch.arange(24).reshape(2, 12) % 7
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        assert optimizer.curvature is not None
        frequencies.append(optimizer.curvature.layers["model.embed_tokens.weight"].state)
    for name, factors in seen[0].items():
        assert all(torch.equal(factors[side], seen[1][name][side]) for side in "AB")
    assert torch.equal(frequencies[0]["A"], frequencies[1]["A"])
    assert not torch.equal(frequencies[0]["B"], frequencies[1]["B"])
