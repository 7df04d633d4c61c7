"""Layers that read the same tensor share the sums of their inputs, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from shared.helpers import captured_factors, gpt2, in_float64, llama, token_rows
from torch import Tensor, nn

import hf_so2
from hf_so2.layers.adapters import LINEAR
from hf_so2.layers.backward import Backward
from hf_so2.layers.capture import Capture
from hf_so2.layers.sums import Call, Readers


def recorded(capture: Capture, known: dict[str, list[str]]) -> None:
    """From now on `known` gets, for every layer, which of its sums it was handed."""
    for name, source in list(capture.summation.sources.items()):

        def spy(h: Tensor, delta: Tensor, given: Any, *rest: Any, name: str = name, source: Any = source) -> Any:
            known[name] = sorted(given)
            return source.observe(h, delta, given, *rest)

        capture.summation.sources[name] = replace(source, observe=spy)  # type: ignore[index]


def backward(model: nn.Module) -> None:
    tokens = torch.stack([row["input_ids"] for row in token_rows(4)])
    model(input_ids=tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize(
    ("name", "sharing"),
    [("kfac", ["A"]), ("foof", ["A"]), ("ekfac", ["A"]), ("tkfac", [])],  # TKFAC weighs every input by its gradient
)
def test_one_sum_for_queries_keys_and_values_and_one_for_both_halves_of_the_mlp(name: str, sharing: list[str]) -> None:
    model = llama().train()
    optimizer = hf_so2.build_optimizer(name, model)
    assert optimizer.curvature is not None
    known: dict[str, list[str]] = {}
    recorded(optimizer.curvature.capture, known)
    backward(model)
    assert len(known) == 14
    alone = sorted(".".join(name.split(".")[3:5]) for name, given in known.items() if not given)
    shared = [given for given in known.values() if given]
    if not sharing:
        assert not shared
        return
    assert shared == [sharing] * 6
    # One of each group computes; which one, autograd decides.
    assert sum("self_attn" in name for name in alone) == 4
    assert sum("mlp" in name for name in alone) == 4


def test_layers_with_one_input_do_not_add_into_each_other() -> None:
    """Three micro-batches: what one layer adds up must not reach the others through a tensor that they were handed."""
    model = in_float64(llama()).train()
    optimizer = hf_so2.build_optimizer("kfac", model)
    inputs: list[Tensor] = []
    attention = model.get_submodule("model.layers.0.self_attn.q_proj")
    handle = attention.register_forward_hook(
        lambda _, args, __: inputs.append(args[0].detach()[:, :-1].reshape(-1, 16))
    )
    for _ in range(3):
        backward(model)
    handle.remove()
    optimizer.step()
    h = torch.cat(inputs)
    factors = captured_factors(optimizer)
    for projection in "qkv":
        a = factors[f"model.layers.0.self_attn.{projection}_proj.weight"]["A"]
        torch.testing.assert_close(a, h.mT @ h / len(h), rtol=1e-12, atol=0.0)


def test_a_tensor_written_to_is_another_tensor() -> None:
    backward = Backward(0, None)

    def readers(given: Tensor) -> Readers:
        return Readers(given, given._version, LINEAR, torch.float32, backward)

    def included(first: Readers, given: Tensor, during: Backward = backward) -> bool:
        return first.include(Call("weight", given, None), LINEAR, torch.float32, during)  # type: ignore[arg-type]

    inputs = torch.randn(6, 3)
    first = readers(inputs)
    assert included(first, inputs.detach())
    assert not included(first, inputs.view(3, 6))
    assert not included(first, inputs, Backward(1, None))
    inputs.add_(1)
    assert not included(first, inputs)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_no_activation_outlives_the_backward_pass(build: Any) -> None:
    model = build().train()
    optimizer = hf_so2.build_optimizer("kfac", model)
    assert optimizer.curvature is not None
    backward(model)
    assert optimizer.curvature.capture.summation.waiting is None
    assert optimizer.curvature.capture._captured.layers
    optimizer.step()
    assert not optimizer.curvature.capture._captured.layers
