"""A tiny Llama in a plain loop with its embedding and head preconditioned, under every method of the K-FAC family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from curvature.test_plain_loop import batches, distance, train, trained
from shared.dense_fisher import METHODS
from shared.helpers import BOTH_ENDS, assert_same_parameters, in_float64, llama

import hf_so2

NONE = ("foof", "diagonal")  # the one method without output factors
RATES = {"lr": 0.01, "fallback_learning_rate": 0.01}


@pytest.mark.parametrize(
    ("name", "factor"), [(name, f) for name in METHODS for f in ("identity", "diagonal") if (name, f) != NONE]
)
def test_the_split_of_a_batch_changes_nothing(name: str, factor: str) -> None:
    settings = {**BOTH_ENDS, **RATES, **({} if factor == "identity" else {"head_output_factor": factor})}
    data = batches()
    whole, halves = trained(name, data, **settings)[0], trained(name, data, 2, **settings)[0]
    assert distance(halves, whole, in_float64(llama())) < 1e-8


@pytest.mark.parametrize("name", METHODS)
def test_mup_at_the_base_width_is_the_standard_parametrization_bit_for_bit(name: str) -> None:
    data = batches()
    plain, _ = trained(name, data, model=llama(), **BOTH_ENDS)
    mup, _ = trained(f"{name}_mup", data, model=llama(), base_config=llama().config, **BOTH_ENDS)
    assert_same_parameters(mup, plain)


@pytest.mark.parametrize("name", ["kfac", "tekfac"])
def test_state_dict_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    data = batches(count=6)
    model, optimizer = trained(name, data[:3], model=llama(), **BOTH_ENDS)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, data[3:])
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = llama().train()
    other = hf_so2.build_optimizer(name, resumed, **BOTH_ENDS)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, data[3:])
    assert_same_parameters(resumed, model)
