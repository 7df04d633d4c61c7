"""`fisher="mc"`: labels drawn from the model, against the Fisher matrix with all labels written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from shared.dense_fisher import STANDSTILL, linear_layers, mlp_case, relative
from shared.helpers import captured_factors, dense_factors, gpt2, in_float64, llama, rows_that_count
from torch import Tensor, nn

import hf_so2
from hf_so2.layers.sampled_labels import generator_for, sampled_loss

DRAWS = 3000


def sampled(model: nn.Module, batch: Tensor, counted: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
    """The factors of one step that moves no weight."""
    optimizer = hf_so2.build_optimizer("kfac", model, fisher="mc", **STANDSTILL)
    outputs = model(batch)
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    optimizer.sample_fisher(logits, counted)
    logits.square().mean().backward()  # any loss at all: its gradient must not matter
    optimizer.step()
    return captured_factors(optimizer)


def enumerated(model: nn.Module, batch: Tensor, counted: Tensor) -> dict[str, np.ndarray]:
    """`B = (1/N) Σ_s Σ_y p(y|s) Σ_t δ_t δ_tᵀ`, with δ_t the derivative of position s's loss under label y alone."""
    layers = linear_layers(model)
    outputs = model(batch)
    logits = (outputs if isinstance(outputs, Tensor) else outputs.logits).detach()
    rows = logits.reshape(-1, logits.shape[-1])
    factors: dict[str, np.ndarray] = {}
    for position in counted.reshape(-1).nonzero().flatten().tolist():
        for label, probability in enumerate(rows[position].softmax(0).tolist()):

            def one_loss(out: Any, data: Any, position: int = position, label: int = label) -> Tensor:
                flat = (out if isinstance(out, Tensor) else out.logits).reshape(-1, logits.shape[-1])
                return -flat[position].log_softmax(0)[label]

            for name, dense in dense_factors(model, layers, one_loss, (batch,)).items():
                delta = dense.deltas.numpy()
                factors[name] = factors.get(name, 0.0) + probability * delta.T @ delta / int(counted.sum())
    return factors


def test_factors_of_an_mlp_approach_the_enumeration_of_labels() -> None:
    model, (inputs, _) = mlp_case()
    inputs = inputs[:4]
    expected = enumerated(model, inputs, torch.ones(4, dtype=torch.bool))
    for name, factors in sampled(model, inputs.repeat(DRAWS, 1)).items():
        assert relative(factors["B"].numpy(), expected[name]) < 0.1, name


def test_factors_of_a_transformer_approach_the_enumeration_of_labels() -> None:
    """With masked positions, which draw no label's loss but are positions of `A` where later ones look at them."""
    model = in_float64(llama(vocab_size=5)).train()
    tokens = torch.tensor([[1, 4, 2, 3]])
    counted = torch.tensor([[True, False, True, False]])
    expected = enumerated(model, tokens, counted)
    layers = linear_layers(model)
    chosen = counted.unsqueeze(2)
    dense = dense_factors(model, layers, lambda out, data: (out.logits.square() * chosen).sum(), (tokens,))
    live = rows_that_count(dense)
    for name, factors in sampled(model, tokens.repeat(DRAWS, 1), counted.repeat(DRAWS, 1)).items():
        assert relative(factors["B"].numpy(), expected[name]) < 0.1, name
        h = dense[name].inputs[live[name]]
        assert relative(factors["A"].numpy(), (h.T @ h / len(h)).numpy()) < 1e-12, name


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 32, (4, 9), generator=generator) for _ in range(count)]


def observed_run(fisher: str, checkpointing: bool) -> Iterator[tuple[Any, ...]]:
    """Loss, gradients and the state of torch's generator after every backward pass; no weight moves."""
    torch.manual_seed(5)
    model = gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = hf_so2.build_optimizer("kfac", model, fisher=fisher, factor_update_steps=1, **STANDSTILL)
    for batch in batches():
        outputs = model(input_ids=batch, labels=batch)
        optimizer.sample_fisher(outputs.logits, loss=outputs.loss)
        outputs.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        yield outputs.loss.item(), gradients, torch.get_rng_state(), captured_inputs(optimizer)
        optimizer.step()
        optimizer.zero_grad()


def captured_inputs(optimizer: hf_so2.SecondOrderOptimizer) -> dict[str, Tensor]:
    return {name: layer.sums["A"].clone() for name, layer in optimizer.curvature.capture._captured.layers.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gradients_and_random_numbers_are_undisturbed(checkpointing: bool) -> None:
    # One after the other: both use torch's own generator.
    sampled_run, plain_run = (list(observed_run(fisher, checkpointing)) for fisher in ("mc", "empirical"))
    runs = zip(sampled_run, plain_run, strict=True)
    for (loss, gradients, state, inputs), (expected_loss, expected, expected_state, expected_inputs) in runs:
        assert loss == expected_loss
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
        assert torch.equal(state, expected_state)
        assert inputs.keys() == expected_inputs.keys()
        assert all(torch.equal(inputs[name], expected_inputs[name]) for name in inputs)


def test_checkpointing_changes_no_factor() -> None:
    plain, checkpointed = in_float64(llama()).train(), in_float64(llama()).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    expected = sampled(plain, batches()[0])
    for name, factors in sampled(checkpointed, batches()[0]).items():
        for key, value in factors.items():
            torch.testing.assert_close(value, expected[name][key])


@pytest.mark.parametrize("flags", [{}, {"precondition_embeddings": True}, {"precondition_head": True}])
def test_reentrant_checkpointing_is_refused(flags: dict[str, bool]) -> None:
    """Whether nothing, something below or something above the checkpointed part was seen."""
    model = llama().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    optimizer = hf_so2.build_optimizer("kfac", model, fisher="mc", **flags)
    model.enable_input_require_grads()
    outputs = model(input_ids=batches()[0], labels=batches()[0])

    def step() -> None:
        optimizer.sample_fisher(outputs.logits)
        outputs.loss.backward()

    with pytest.raises(hf_so2.ConfigurationError, match=r"^fisher='mc': cannot be used with reentrant"):
        step()


def test_a_forgotten_call_is_said() -> None:
    model = llama().train()
    optimizer = hf_so2.build_optimizer("kfac", model, fisher="mc")
    model(input_ids=batches()[0], labels=batches()[0]).loss.backward()
    with pytest.raises(hf_so2.ConfigurationError, match=r"^fisher='mc': needs a call of .*sample_fisher\(logits\)"):
        optimizer.step()


def test_the_extra_pass_is_made_on_factor_update_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = llama().train(), []
    optimizer = hf_so2.build_optimizer("kfac", model, fisher="mc", factor_update_steps=5)
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(optimizer.steps + 1) or grad(*a, **k))
    for batch in batches(11):
        outputs = model(input_ids=batch, labels=batch)
        optimizer.sample_fisher(outputs.logits)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert passes == [1, 2, 4, 5, 7, 10]


def test_micro_batches_add_up_and_draw_labels_of_their_own() -> None:
    model = in_float64(llama()).train()
    optimizer = hf_so2.build_optimizer("kfac", model, fisher="mc", **STANDSTILL)
    batch = batches()[0]
    sums = []
    for _ in range(2):
        outputs = model(input_ids=batch, labels=batch)
        optimizer.sample_fisher(outputs.logits)
        outputs.loss.backward()
        sums.append({n: layer.sums["B"].clone() for n, layer in optimizer.curvature.capture._captured.layers.items()})
    optimizer.step()
    for name, factors in captured_factors(optimizer).items():
        assert not torch.allclose(sums[1][name], 2 * sums[0][name])
        torch.testing.assert_close(factors["B"], sums[1][name] / 72)


def test_draws_depend_on_seed_step_and_rank_and_on_nothing_else() -> None:
    device, logits = torch.device("cpu"), torch.zeros(64, 7)
    torch.manual_seed(0)

    def draw(*key: int) -> float:
        return float(sampled_loss(logits * 1.0 + torch.arange(7), None, generator_for(*key, device)))

    first = draw(3, 10, 1)
    torch.manual_seed(1)
    assert draw(3, 10, 1) == first
    assert len({first, draw(4, 10, 1), draw(3, 11, 1), draw(3, 10, 2), draw(10, 3, 1)}) == 5


def test_sampled_loss_follows_the_predictions() -> None:
    """Its mean is the entropy, and masked rows do not count."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0)).repeat(20_000, 1)
    probabilities = logits[0].softmax(0)
    entropy = float(-(probabilities * probabilities.log()).sum())
    counted = torch.arange(20_000) % 2 == 0
    loss = sampled_loss(logits, counted, torch.Generator().manual_seed(0))
    assert float(loss) / 10_000 == pytest.approx(entropy, rel=0.03)
    assert float(sampled_loss(logits, ~counted & counted, torch.Generator())) == 0
