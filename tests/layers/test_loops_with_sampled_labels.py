"""Odd training loops and evaluations under `fisher="mc"`."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from shared.helpers import captured_factors, llama
from shared.loops import batch, net
from torch import Tensor, nn

import hf_so2


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


@pytest.mark.slow  # compiles a model
def test_buffers_that_a_compiled_backward_pass_uses_up_are_refused() -> None:
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1).train()
    optimizer = hf_so2.build_optimizer("kfac", model, fisher="mc")
    tokens = torch.ones(2, 8, dtype=torch.long)
    outputs = torch.compile(model, backend="aot_eager")(input_ids=tokens, labels=tokens)
    with pytest.raises(hf_so2.ConfigurationError, match=r"^fisher='mc': needs .*donated_buffer = False"):
        optimizer.sample_fisher(outputs.logits, loss=outputs.loss)
