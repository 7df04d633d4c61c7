"""Odd training loops: each trains as the same loop does without the odd circumstance."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from shared.helpers import captured_factors, in_float64, llama, relative_error
from shared.loops import NAMES, Odd, batch, differences, loss_of, net
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.func import grad as func_grad

import hf_so2


def dropped(forget: Callable[[nn.Module, hf_so2.SecondOrderOptimizer], object]) -> Odd:
    def drop(step: int, model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer) -> None:
        loss_of(model, 100 + step, 20.0).backward()
        forget(model, optimizer)

    return drop


def interrupted(step: int, model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer) -> None:
    inputs, targets = batch(100 + step)
    hidden = model[1](model[0](inputs))

    def stop(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    hidden.register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        nn.functional.cross_entropy(model[4](model[3](model[2](hidden))), targets).backward()
    optimizer.zero_grad()


def hessian_vector_product(step: int, model: nn.Module, optimizer: object) -> None:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(model, 100 + step, 20.0), parameters, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in gradients), parameters)


def adversary(step: int, model: nn.Module, optimizer: object) -> None:
    """Another model learns to please this one, which is frozen for it."""
    other = nn.Linear(6, 6).double()
    model.requires_grad_(False)
    nn.functional.cross_entropy(model(other(batch(step)[0])), batch(step)[1]).backward()
    model.requires_grad_(True)


def probe(step: int, model: nn.Module, optimizer: object) -> None:
    inputs, targets = batch(100 + step, 20.0)
    inputs.requires_grad_()
    torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), inputs)


def per_example(step: int, model: nn.Module, optimizer: object) -> None:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(weights: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, weights, (row,)), target)

    vmap(func_grad(one), in_dims=(None, 0, 0))(weights, *batch(step))


def other_weights(step: int, model: nn.Module, optimizer: object) -> None:
    weights = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    inputs, targets = batch(100 + step)
    nn.functional.cross_entropy(functional_call(model, weights, (inputs,)), targets).backward()


def evaluation(step: int, model: nn.Module, optimizer: object) -> None:
    loss_of(model, 100 + step, 20.0)


FOREIGN: dict[str, Odd] = {
    "optimizer.zero_grad": dropped(lambda model, optimizer: optimizer.zero_grad()),
    "optimizer.zero_grad to zeros": dropped(lambda model, optimizer: optimizer.zero_grad(set_to_none=False)),
    "model.zero_grad": dropped(lambda model, optimizer: model.zero_grad()),
    "gradients zeroed in place": dropped(lambda model, optimizer: [p.grad.zero_() for p in model.parameters()]),
    "Ctrl-C in a backward pass": interrupted,
    "Hessian-vector product": hessian_vector_product,
    "gradient by the inputs": probe,
    "adversary": adversary,
    "torch.func": per_example,
    "functional_call": other_weights,
    "evaluation with gradients on": evaluation,
}


@pytest.mark.parametrize("circumstance", FOREIGN)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_trained_on_is_not_counted(name: str, circumstance: str) -> None:
    assert max(differences(name, FOREIGN[circumstance])) < 1e-10


RESETS: dict[str, Odd] = {
    "model.zero_grad": lambda step, model, optimizer: model.zero_grad(),
    "set to none": lambda step, model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
    "zeroed in place": lambda step, model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("reset", RESETS)
def test_gradients_that_a_language_model_resets_do_not_count(reset: str, every: int) -> None:
    """Those of its head are there before those of any layer, and layers take turns."""
    found = []
    for odd in (False, True):
        model = in_float64(llama(num_hidden_layers=2)).train()
        optimizer = hf_so2.build_optimizer("kfac", model, factor_update_steps=every, preconditioner_update_steps=3)
        generator = torch.Generator().manual_seed(0)
        for step in range(8):
            tokens, others = torch.randint(1, 32, (2, 4, 7), generator=generator)
            if odd:
                model(input_ids=others, labels=others).loss.backward()
                RESETS[reset](step, model, optimizer)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(captured_factors(optimizer))
    plain, disturbed = found
    for name, factors in plain.items():
        assert all(relative_error(disturbed[name][key], value) < 1e-10 for key, value in factors.items()), name


def held_back(step: int, model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer) -> None:
    kept = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        parameter.grad = gradient


def by_hand(step: int, model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer) -> None:
    optimizer.zero_grad()
    optimizer.curvature.capture.discard()
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss_of(model, step), parameters), strict=True):
        parameter.grad = gradient


@pytest.mark.parametrize("after", [held_back, by_hand])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_a_caller_hands_back_are_counted(name: str, after: Odd) -> None:
    assert max(differences(name, lambda *_: None, after)) < 1e-10


def test_a_second_backward_pass_through_one_forward_pass_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = hf_so2.build_optimizer("kfac", model)
    loss = loss_of(model, 0)
    with caplog.at_level(logging.WARNING):
        loss.backward(retain_graph=True)
        assert not caplog.records
        loss.backward()
    assert sum("second backward pass" in record.getMessage() for record in caplog.records) == 1
    optimizer.step()


def test_statistics_follow_a_model_that_is_cast() -> None:
    runs = []
    for late in (False, True):
        model = net().float()
        if not late:
            model.double()
        optimizer = hf_so2.build_optimizer("kfac", model)
        model.double()
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(layer.state["A"].dtype == torch.float64 for layer in optimizer.curvature.layers.values())
        runs.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*runs)
