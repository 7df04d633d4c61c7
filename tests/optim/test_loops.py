"""Odd training loops: each trains as the same loop does without the odd circumstance."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SMALL, captured_factors, gpt2, in_float64, llama, relative_error
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.func import grad as func_grad
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import hf_so2
from hf_so2.optim.skipping import have_no_gradient

Odd = Callable[[int, nn.Module, hf_so2.SecondOrderOptimizer], object]
NAMES = ["kfac", "ekfac", "tkfac", "foof"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batch(seed: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = size * torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 4, (12,), generator=generator)


def loss_of(model: nn.Module, seed: int, size: float = 1.0) -> Tensor:
    inputs, targets = batch(seed, size)
    return nn.functional.cross_entropy(model(inputs), targets)


def differences(name: str, before: Odd, after: Odd = lambda *_: None, **settings: Any) -> tuple[float, float]:
    """Relative change of the update of four steps, and of the factors, by what is done around every backward pass."""
    runs = []
    for odd in (False, True):
        model = net()
        start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        optimizer = hf_so2.build_optimizer(name, model, **settings)
        for step in range(4):
            if odd:
                before(step, model, optimizer)
            loss_of(model, step).backward()
            if odd:
                after(step, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        moved = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - start
        factors = [x.reshape(-1) for layer in captured_factors(optimizer).values() for x in layer.values()]
        runs.append((moved, torch.cat(factors)))
    (moved, factors), (odd_moved, odd_factors) = runs
    return float((odd_moved - moved).norm() / moved.norm()), float((odd_factors - factors).norm() / factors.norm())


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


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_gradients_may_be_reset_between_forward_and_backward(fisher: str) -> None:
    found = []
    for late in (False, True):
        model = net()
        optimizer = hf_so2.build_optimizer("kfac", model, fisher=fisher)
        for step in range(3):
            if not late:
                optimizer.zero_grad()
            inputs, targets = batch(step)
            logits = model(inputs)
            optimizer.sample_fisher(logits)
            if late:
                optimizer.zero_grad()
            nn.functional.cross_entropy(logits, targets).backward()
            optimizer.step()
        found.append(captured_factors(optimizer))
    for name, factors in found[0].items():
        assert all(torch.equal(found[1][name][key], value) for key, value in factors.items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_batch_left_out_draws_no_labels(when: str) -> None:
    """Whether its backward pass was made or not."""
    found = []
    for odd in (False, True):
        model = net()
        optimizer = hf_so2.build_optimizer("kfac", model, fisher="mc", lr=1e-30, fallback_learning_rate=1e-30)
        for step in range(3):
            if odd:
                logits = model(batch(100 + step, 20.0)[0])
                optimizer.sample_fisher(logits)
                if when == "after":
                    nn.functional.cross_entropy(logits, batch(100 + step)[1]).backward()
                    optimizer.zero_grad()
            inputs, targets = batch(step)
            logits = model(inputs)
            optimizer.sample_fisher(logits, counted=torch.ones(12, dtype=torch.bool))
            nn.functional.cross_entropy(logits, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(captured_factors(optimizer))
    for name, factors in found[0].items():
        torch.testing.assert_close(found[1][name]["A"], factors["A"], rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_an_evaluation_with_gradients_on_keeps_no_graph(fisher: str, head: bool) -> None:
    """It goes with what the model returned, as without an optimizer, and waits for no search of cycles by Python."""
    model = llama().train()
    optimizer = hf_so2.build_optimizer("kfac", model, fisher=fisher, precondition_head=head)
    hidden: list[weakref.ref[Tensor]] = []
    handle = model.model.layers[0].register_forward_hook(lambda _, __, output: hidden.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        outputs = model(input_ids=torch.ones(2, 8, dtype=torch.long))
        assert hidden[0]() is not None
        if fisher == "mc":
            assert len(optimizer.curvature.capture._forward.notes) == 14 + head
        del outputs
        assert hidden[0]() is None
    finally:
        gc.enable()
        handle.remove()
    if fisher == "mc":
        assert not optimizer.curvature.capture._forward.notes


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


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_classifier(name: str, family: str) -> None:
    """A batch of 12 positions, and the same one padded to 48."""
    tokens = torch.randint(1, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for length in (12, 48):
        torch.manual_seed(0)
        if family == "bert":
            config = BertConfig(**SMALL, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            model: nn.Module = BertForSequenceClassification(config).double()
        else:
            model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)).double()
        optimizer = hf_so2.build_optimizer(name, model)
        padded = nn.functional.pad(tokens, (0, length - 12))
        mask = (torch.arange(length) < 12).long().expand(4, -1)
        for _ in range(2):
            model(input_ids=padded, attention_mask=mask, labels=tokens[:, 0] % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((captured_factors(optimizer), torch.cat([p.detach().reshape(-1) for p in model.parameters()])))
    for layer, factors in found[0][0].items():
        for key, value in factors.items():
            torch.testing.assert_close(found[1][0][layer][key], value, rtol=1e-6, atol=1e-10 * float(value.abs().max()))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.0, atol=1e-6)


def test_packed_documents_are_no_sequence() -> None:
    model = llama().train()
    optimizer = hf_so2.build_optimizer("kfac", model, weight_sharing="reduce")
    tokens = torch.ones(1, 8, dtype=torch.long)
    model(input_ids=tokens, position_ids=torch.arange(8)[None], labels=tokens).loss.backward()
    optimizer.step()
    with pytest.raises(hf_so2.ConfigurationError, match=r"^weight_sharing='reduce': .*packed documents.*expand"):
        model(input_ids=tokens, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), labels=tokens)


@pytest.mark.parametrize(
    ("model", "value"),
    [
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "weight"),
        (lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Linear(4, 4)), "0"),
    ],
)
def test_gradients_of_other_kinds_are_refused(model: Callable[[], nn.Module], value: str) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=rf"^model='{value}': "):
        hf_so2.build_optimizer("kfac", model())


def test_momentum_of_a_group_is_the_one_that_is_used() -> None:
    """As a schedule or a callback edits it."""
    models = net(), net()
    for model, edit in zip(models, (True, False), strict=True):
        optimizer = hf_so2.build_optimizer("kfac", model, **({} if edit else {"momentum": 0.5}))
        for group in optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = 0.5
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_state_loads_where_other_settings_group_parameters_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    """The saved hyperparameters go on, as in torch, and a warning says so."""
    first, second = net(), net()
    saved = hf_so2.build_optimizer("kfac", first, weight_decay=0.1, lr=0.1, fallback_learning_rate=0.01)
    loaded = hf_so2.build_optimizer("kfac", second, weight_decay=0.0, lr=0.1, fallback_learning_rate=0.1)
    for model, optimizer in ((first, saved), (second, loaded)):
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    second.load_state_dict(first.state_dict())
    with caplog.at_level(logging.WARNING):
        loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert any("weight_decay=0.1 goes on" in record.getMessage() for record in caplog.records)
    for model, optimizer in ((first, saved), (second, loaded)):
        loss_of(model, 1).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_distributed_checkpoints_neither_count_a_step_nor_lose_curvature_silently() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = net()
    optimizer = hf_so2.build_optimizer("kfac", model)
    state = get_optimizer_state_dict(model, optimizer)
    assert optimizer.steps == 0
    with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint, which leaves that out"):
        set_optimizer_state_dict(model, optimizer, state)
    curvature = optimizer.curvature_state_dict()
    optimizer.curvature_in_state_dict = False
    set_optimizer_state_dict(model, optimizer, state)
    optimizer.load_curvature_state_dict(curvature)
    loss_of(model, 0).backward()
    optimizer.step()
    assert optimizer.steps == 1


def test_a_model_without_config_is_refused_by_mup_names_of_the_trainer(tmp_path: Any) -> None:
    args = hf_so2.SecondOrderTrainingArguments(
        output_dir=str(tmp_path), optim="kfac_mup", mup_base_width=8, use_cpu=True, report_to="none"
    )
    with pytest.raises(hf_so2.ConfigurationError, match=r"^model='Sequential': has no config.*apply_mup"):
        hf_so2.SecondOrderTrainer(model=net(), args=args)


def test_a_refusal_by_mup_names_the_way_out() -> None:
    model = gpt2()
    model.is_quantized = True
    with pytest.raises(hf_so2.ConfigurationError, match="kfac trains it at this width as it is"):
        hf_so2.build_optimizer("kfac_mup", model, base_config=model.config)


@pytest.mark.parametrize(("entry", "expected"), [(None, True), (0.0, True), (1e-40, False), (float("nan"), False)])
def test_zeros_are_no_gradient(entry: float | None, expected: bool) -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 2)]
    if entry is not None:
        parameters[0].grad = torch.tensor([0.0, entry, 0.0])
    assert have_no_gradient(parameters) is expected


def _completions(seed: int) -> tuple[Tensor, Tensor]:
    """Token ids and shifted labels, of which a prompt and the last position have none."""
    ids = torch.randint(1, SMALL["vocab_size"], (3, 10), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    labels[:, :4] = labels[:, -1] = -100
    return ids, labels


def _loss_of_completions(model: nn.Module, seed: int, *, fused: bool) -> Tensor:
    ids, labels = _completions(seed)
    if fused:  # as TRL and Liger do: the head's weight is multiplied by, the head is not called
        logits = model.model(input_ids=ids).last_hidden_state @ model.lm_head.weight.T
    else:
        logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("fused", [(True, True), (True, False), (False, True)], ids=["fused", "first", "second"])
@pytest.mark.parametrize("announced", [False, True], ids=["silent", "announced"])
def test_rows_with_a_loss_are_counted_where_no_head_is_called(announced: bool, fused: tuple[bool, bool]) -> None:
    """Prompts have no loss but keys and values that others read: layers alone cannot tell how many rows have one."""
    found = []
    for kinds in (fused, (False, False)):
        model = in_float64(llama()).train()
        optimizer = hf_so2.build_optimizer("kfac", model)
        for seed, kind in enumerate(kinds):
            if announced:
                optimizer.announce(None, 0.5, is_mean=True)
            (_loss_of_completions(model, seed, fused=kind) / 2).backward()
        optimizer.step()
        found.append(captured_factors(optimizer))
    for name, factors in found[0].items():
        for side, factor in factors.items():
            assert relative_error(factor, found[1][name][side]) < 1e-12, (name, side)


def test_one_backward_pass_of_both_kinds_of_loss_counts_each_once() -> None:
    found = []
    for fused in (True, False):
        model = in_float64(llama()).train()
        optimizer = hf_so2.build_optimizer("kfac", model)
        sum(_loss_of_completions(model, seed, fused=fused and seed == 1) for seed in range(2)).backward()
        optimizer.step()
        found.append(captured_factors(optimizer))
    for name, factors in found[0].items():
        for side, factor in factors.items():
            assert relative_error(factor, found[1][name][side]) < 1e-12, (name, side)
