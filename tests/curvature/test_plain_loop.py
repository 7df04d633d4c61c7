"""A tiny Llama in a plain loop, under every method of the K-FAC family."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.dense_fisher import METHODS
from shared.helpers import VOCABULARY, assert_same_parameters, in_float64, llama
from torch import Tensor, nn

import hf_so2

STEPS = 5  # refreshes at steps 1, 2 and 4


def batches(rows: int = 8, length: int = 7, count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (rows, length), generator=generator) for _ in range(count)]


def train(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer, data: list[Tensor], micro_batches: int = 1) -> None:
    for batch in data:
        for part in batch.chunk(micro_batches):
            (model(input_ids=part, labels=part).loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(
    name: str, data: list[Tensor], micro_batches: int = 1, *, model: nn.Module | None = None, **settings: Any
) -> tuple[nn.Module, hf_so2.SecondOrderOptimizer]:
    model = in_float64(llama()) if model is None else model
    optimizer = hf_so2.build_optimizer(name, model.train(), **settings)
    train(model, optimizer, data, micro_batches)
    return model, optimizer


def distance(first: nn.Module, second: nn.Module, start: nn.Module) -> float:
    """The largest relative difference between the ways that two models have gone from `start`, over parameters."""
    triples = zip(first.parameters(), second.parameters(), start.parameters(), strict=True)
    return max(float((a - b).detach().norm() / (b - s).detach().norm()) for a, b, s in triples)


# Fewer tokens than dimensions leave the factors rank-deficient; the default rules must cope with that too.
@pytest.mark.parametrize("rows", [8, 2], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("norm_control", ["spectral", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_the_split_of_a_batch_changes_nothing(name: str, norm_control: str, rows: int) -> None:
    data = batches(rows, 7)
    # Without norm control such a rate would blow the weights up and any round-off with them.
    lr = 0.01 if norm_control == "spectral" else 1e-6
    settings = {"norm_control": norm_control, "lr": lr, "fallback_learning_rate": 0.01}
    whole, halves = trained(name, data, **settings)[0], trained(name, data, 2, **settings)[0]
    assert distance(halves, whole, in_float64(llama())) < 1e-8


@pytest.mark.parametrize("name", METHODS)
def test_the_order_within_a_batch_changes_nothing(name: str) -> None:
    data = batches()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    settings = {"lr": 0.01, "fallback_learning_rate": 0.01}
    first, second = trained(name, data, **settings)[0], trained(name, [batch[order] for batch in data], **settings)[0]
    assert distance(second, first, in_float64(llama())) < 1e-7


@pytest.mark.parametrize("name", METHODS)
def test_mup_at_the_base_width_is_the_standard_parametrization_bit_for_bit(name: str) -> None:
    data = batches()
    plain, _ = trained(name, data, model=llama())
    mup, _ = trained(f"{name}_mup", data, model=llama(), base_config=llama().config)
    assert_same_parameters(mup, plain)


@pytest.mark.parametrize("name", METHODS)
def test_state_dict_goes_through_a_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    data = batches(count=8)
    model, optimizer = trained(name, data[:3], model=llama())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, data[3:])

    resumed = llama().train()
    other = hf_so2.build_optimizer(name, resumed)
    train(resumed, other, data[:1])  # not fresh: everything has to be overwritten
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert as_bytes(other.state_dict()) == as_bytes(saved["optimizer"])
    train(resumed, other, data[3:])
    assert_same_parameters(resumed, model)
    assert as_bytes(other.state_dict()) == as_bytes(optimizer.state_dict())


def as_bytes(state: Any) -> list[Any]:
    """Every leaf of nested dictionaries and lists, tensors as their raw bytes, in an order of its own."""
    if isinstance(state, dict):
        return [(str(key), as_bytes(state[key])) for key in sorted(state, key=str)]
    if isinstance(state, list | tuple):
        return [as_bytes(entry) for entry in state]
    if isinstance(state, Tensor):
        buffer = io.BytesIO(state.detach().contiguous().numpy().tobytes())
        return [str(state.dtype), tuple(state.shape), buffer.getvalue()]
    return [state]


def test_a_checkpoint_of_another_method_is_refused() -> None:
    saved = hf_so2.build_optimizer("kfac", torch.nn.Linear(3, 2)).state_dict()
    optimizer = hf_so2.build_optimizer("ekfac", torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match="weight: saved A_basis has shape None"):
        optimizer.load_state_dict(saved)
