"""Embeddings and heads: diagonal factors of the size of the vocabulary, against dense matrices in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.dense_fisher import METHODS, dense_preconditioner, eye, relative, stand_still
from shared.helpers import BOTH_ENDS, SMALL, dense_factors, gpt2, llama, numpy_damping, token_loss_sum, trained
from shared.kfac_reference import BLOCKS, fresh_state
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import hf_so2
from hf_so2.damping import RULES, Damping

VOCABULARY, WIDTH, RHO = 6, 3, 0.02
BOTH = {**BOTH_ENDS, "head_output_factor": "diagonal"}


class Bigram(nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.double()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, VOCABULARY - 1, (2, 5, 8), generator=generator)
    return tokens, targets  # the last entry of the vocabulary never occurs


def rows_of(batch: tuple[Tensor, Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`h` and `δ` of both layers, one-hot vectors written out."""
    model = Bigram()
    layers = {"embedding.weight": model.embedding, "head.weight": model.head}
    dense = dense_factors(model, layers, lambda out, data: token_loss_sum(out, data[1]), batch)
    one_hot = np.eye(VOCABULARY)[batch[0].reshape(-1).numpy()]
    return {
        "embedding.weight": (one_hot, dense["embedding.weight"].deltas.numpy()),
        "head.weight": (dense["head.weight"].inputs.numpy(), dense["head.weight"].deltas.numpy()),
    }


def diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.diag(matrix.diagonal())


def damped_block(name: str, layer: str, h: np.ndarray, delta: np.ndarray, state: dict[str, Tensor]) -> np.ndarray:
    """What the method inverts, as a matrix on `vec(G)`."""
    fisher_rows = np.einsum("to,ti->toi", delta, h).reshape(len(h), -1)
    weight_h, weight_delta = (np.sum(x**2, axis=1, keepdims=True) for x in (h, delta))
    traced = name in ("tkfac", "tekfac")
    tau = float(np.mean(weight_h * weight_delta)) if traced else 1.0
    a = (h * (weight_delta if traced else 1)).T @ h / len(h) / np.sqrt(tau)
    b = (delta * (weight_h if traced else 1)).T @ delta / len(h) / np.sqrt(tau)
    a, b = (diagonal(a), b) if layer == "embedding.weight" else (a, diagonal(b))
    if name in ("kfac", "tkfac"):
        return np.kron(b + RHO * eye(b), a + RHO * eye(a))
    if name == "foof":
        return np.kron(eye(b), a + RHO * eye(a))
    bases = [state[f"{side}_basis"].numpy() if f"{side}_basis" in state else eye(x) for side, x in (("B", b), ("A", a))]
    basis = np.kron(*bases)
    s = np.mean((fisher_rows @ basis) ** 2, axis=0)
    return basis @ np.diag(s + RHO) @ basis.T


@pytest.mark.parametrize("name", METHODS)
def test_preconditioners_are_the_inverses_of_dense_blocks(name: str, batch: tuple[Tensor, Tensor]) -> None:
    both = BOTH if name != "foof" else {k: v for k, v in BOTH.items() if k != "head_output_factor"}
    optimizer = stand_still(name, Bigram(), batch, damping=RHO, embedding_damping=RHO, **both)
    for layer, (h, delta) in rows_of(batch).items():
        entry = optimizer.curvature.layers[layer]
        block = damped_block(name, layer, h, delta, entry.state)
        actual = dense_preconditioner(entry.block, entry.state, entry.shape)
        assert relative(actual, np.linalg.inv(block)) < 1e-10, layer


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", METHODS)
def test_a_head_without_an_output_factor_is_preconditioned_by_its_inputs(
    name: str, rule: str, batch: tuple[Tensor, Tensor]
) -> None:
    """Where ε is relative to a product of two factors, as in EKFAC, its root is relative to the one that is left."""
    optimizer = stand_still(name, Bigram(), batch, damping=RHO, damping_rule=rule, precondition_head=True)
    (entry,) = optimizer.curvature.layers.values()
    h, _ = rows_of(batch)["head.weight"]
    a = h.T @ h / len(h)
    of_a_product = name in ("ekfac", "tekfac") and rule in ("trace", "trace_mean", "spectral")
    rho, _ = numpy_damping(rule, RHO**0.5 if of_a_product else RHO, a, np.ones((1, 1)))
    expected = np.linalg.inv(np.kron(np.eye(VOCABULARY), a + rho * eye(a)))
    assert relative(dense_preconditioner(entry.block, entry.state, entry.shape), expected) < 1e-10


@pytest.mark.parametrize("name", METHODS)
def test_a_head_without_an_output_factor_scales_with_the_width_like_its_inputs(name: str) -> None:
    """Whatever the method: `A` grows with the width, and constant damping with it; the rate stays."""
    given = {"precondition_head": True, "damping_rule": "constant", "norm_control": "none"}
    optimizer = hf_so2.build_optimizer(f"{name}_mup", llama(64), base_config=llama(16).config, **given)
    layer = optimizer.curvature.layers["lm_head.weight"]
    assert layer.damping.multiplier_a == 4.0
    (group,) = (group for group in optimizer.param_groups if "lm_head.weight" in group["param_names"])
    assert group["lr"] == optimizer.settings.lr


@pytest.mark.parametrize("name", METHODS)
@given(seed=st.integers(0, 2**31 - 1), count=st.integers(1, 12), size=st.integers(1, 5), fan_out=st.integers(1, 4))
@settings(max_examples=15)
def test_indices_are_unit_vectors(name: str, seed: int, count: int, size: int, fan_out: int) -> None:
    """-1 stands for a padded row, which is zero."""
    rng = np.random.default_rng(seed)
    indices, delta = rng.integers(-1, size, count), torch.from_numpy(rng.normal(size=(count, fan_out)))
    written_out = torch.from_numpy(np.vstack([np.eye(size), np.zeros((1, size))])[indices])
    block = BLOCKS[name](0.5, diagonal="A")
    state = fresh_state(block, (fan_out, size))
    if "B_basis" in state:
        state["B_basis"].copy_(torch.linalg.qr(torch.from_numpy(rng.normal(size=(fan_out, fan_out)))).Q)
    actual = block.observe(state, torch.from_numpy(indices), delta)
    expected = block.observe(state, written_out, delta)
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("rule", RULES)
def test_damping_of_a_diagonal_side_is_judged_per_row(rule: str) -> None:
    """As the dense rule, but with the mean of the diagonal where that has the trace."""
    rng = np.random.default_rng(0)
    frequencies, b = rng.random(7), np.cov(rng.normal(size=(4, 30)))
    a = np.diag(frequencies)
    rho_a, rho_b = numpy_damping(rule, 0.1, a, b)
    if rule == "trace":
        rho_a /= len(a)
    actual = Damping(rule, 0.1)(torch.from_numpy(frequencies), torch.from_numpy(b))
    np.testing.assert_allclose([float(rho) for rho in actual], [rho_a, rho_b], rtol=1e-12)
    swapped = Damping(rule, 0.1)(torch.from_numpy(b), torch.from_numpy(frequencies))
    if rule != "pi":
        assert [float(rho) for rho in reversed(swapped)] == [float(rho) for rho in actual]


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral"])
def test_damping_of_a_product_has_the_strength_of_both_factors(rule: str) -> None:
    """`ε = ε_A ε_B` where nothing is judged per row: a strength of √ε on each is the same as ε on the product."""
    a, b = torch.tensor([3.0, 1.0, 0.5]), torch.tensor([2.0, 0.25])
    rho_a, rho_b = Damping(rule, 1e-5**0.5)(a.diag(), b.diag())
    assert float(Damping(rule, 1e-5).single(b.outer(a))) == pytest.approx(float(rho_a * rho_b), rel=1e-6)


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral"])
def test_single_damping_is_that_of_the_factors_where_the_block_is_their_product(rule: str) -> None:
    frequencies, values = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([3.0, 1.0])
    rho_a, rho_b = Damping(rule, 0.1)(frequencies, values.diag())
    assert float(Damping(rule, 0.1).single(values.outer(frequencies), "A")) == pytest.approx(float(rho_a * rho_b) / 0.1)


@pytest.mark.parametrize("name", METHODS)
def test_spectral_control_fixes_how_far_tokens_move(name: str, batch: tuple[Tensor, Tensor]) -> None:
    """The root mean square change of a vector, over the tokens of the batch, is the learning rate.

    Also where the input factor weighs tokens by the size of their gradients and is not their frequencies.
    """
    model = Bigram()
    before = model.embedding.weight.detach().clone()
    optimizer = hf_so2.build_optimizer(name, model, lr=0.3, precondition_embeddings=True)
    for factor in (1.0, 0.0):
        optimizer.zero_grad()
        (factor * token_loss_sum(model(batch[0]), batch[1]) / 40).backward()
        optimizer.step()
        if factor:
            moved = model.embedding.weight.detach() - before
            assert float(moved[batch[0]].square().mean().sqrt()) == pytest.approx(0.3, rel=1e-12)
            assert not moved[-1].any()  # never seen
    assert torch.isfinite(model.embedding.weight).all()


def test_padding_is_no_token(tmp_path: Any) -> None:
    """Neither what the attention mask leaves out nor the padding index, whose vector gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for size in (4, 9, 7, 10):
        tokens = torch.randint(0, 5, (10,), generator=generator)  # 0 is the padding index, and occurs in the text
        labels, mask = tokens.clone(), (torch.arange(10) < size).long()
        labels[size:] = -100
        rows.append({"input_ids": tokens, "labels": labels, "attention_mask": mask})
    trainer = trained(llama(), rows, tmp_path, max_steps=1, per_device_train_batch_size=4, **BOTH)
    layer = trainer.optimizer.optimizer.curvature.layers["model.embed_tokens.weight"]
    # The last token of a text predicts nothing, and nothing else looks at it.
    tokens = torch.cat([row["input_ids"][row["attention_mask"].bool()][:-1] for row in rows])
    counts = np.bincount(tokens[tokens != 0].numpy(), minlength=32)
    actual = (layer.state["A"] / layer.state["weight"]).numpy()
    np.testing.assert_allclose(actual, counts / counts.sum(), rtol=1e-6)


def reasons(model: nn.Module, **settings: Any) -> dict[str, tuple[str, str]]:
    report = hf_so2.build_optimizer("kfac", model, **settings).coverage()
    return {entry.name: (entry.algorithm, entry.reason) for entry in report.parameters}


def test_coverage_says_which_embeddings_and_heads_are_preconditioned() -> None:
    plain = reasons(llama())
    assert plain["model.embed_tokens.weight"] == ("adamw", "an embedding")
    assert plain["lm_head.weight"] == ("adamw", "the output head")
    both = reasons(llama(), **BOTH)
    assert both["model.embed_tokens.weight"] == ("kfac", "weight of Embedding")
    assert both["lm_head.weight"] == ("kfac", "weight of Linear")
    untied = reasons(gpt2(tie_word_embeddings=False), **BOTH)
    assert untied["transformer.wte.weight"] == ("kfac", "weight of Embedding")
    assert untied["transformer.wpe.weight"] == ("adamw", "an embedding of something else than tokens")


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_scales_falls_back(tied: bool) -> None:
    config = Gemma2Config(**SMALL, tie_word_embeddings=tied)
    found = reasons(Gemma2ForCausalLM(config), **BOTH)["model.embed_tokens.weight"]
    assert found == ("adamw", "weight of Gemma2TextScaledWordEmbedding, which does more than look up a row")


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_an_embedding_with_another_gradient_falls_back(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, **options), nn.Linear(3, 5))
    assert reasons(model, precondition_embeddings=True)["0.weight"] == (
        "adamw",
        "weight of Embedding, which does more than look up a row",
    )


def test_only_the_hidden_dimension_of_a_vocabulary_matrix_is_limited() -> None:
    found = reasons(llama(16, vocab_size=512), max_preconditioner_dim=64, **BOTH)
    assert found["lm_head.weight"][0] == found["model.embed_tokens.weight"][0] == "kfac"
    found = reasons(llama(16, vocab_size=8), max_preconditioner_dim=12, **BOTH)
    assert found["lm_head.weight"] == ("adamw", "a dimension of 16 is above max_preconditioner_dim 12")
