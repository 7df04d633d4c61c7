"""`fisher="mc"` in the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import (
    SMALL,
    assert_same_parameters,
    captured_factors,
    gpt2,
    llama,
    optimizer_of,
    token_rows,
    trained,
)
from transformers import LlamaConfig, LlamaForSequenceClassification

import hf_so2

STILL: dict[str, Any] = {"learning_rate": 1e-30, "fallback_learning_rate": 1e-30, "norm_control": "none"}
LOGGED = {"logging_strategy": "steps", "logging_steps": 1}


@pytest.mark.parametrize("steps", [1, 4])
def test_losses_and_counts_are_those_of_the_empirical_run(steps: int, tmp_path: Path) -> None:
    """Dropout, padding and masked prompts included; `A` holds no label at all."""
    # Left to themselves layers take turns, but not where one backward pass serves them all.
    settings = {**STILL, **LOGGED, "factor_update_steps": 1}
    settings |= {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 16 // steps}
    runs = []
    for fisher in ("mc", "empirical"):
        model = gpt2(resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)
        runs.append(trained(model, token_rows(padded=True), tmp_path, fisher=fisher, **settings))
    mc, empirical = runs
    assert_same_parameters(mc.model, empirical.model)
    for key in ("loss", "grad_norm"):
        logs = [[entry[key] for entry in trainer.state.log_history if key in entry] for trainer in runs]
        assert len(logs[0]) == 3
        assert logs[0] == logs[1]
    ours, theirs = (captured_factors(optimizer_of(trainer)) for trainer in runs)
    for name, factors in ours.items():
        assert torch.equal(factors["A"], theirs[name]["A"])
        # A fresh model's predictions are as good as uniform, and so are these labels: of the same size.
        assert not torch.equal(factors["B"], theirs[name]["B"])
        assert 0.5 < float(factors["B"].trace() / theirs[name]["B"].trace()) < 2


def test_resume_draws_the_labels_that_it_would_have_drawn(tmp_path: Path) -> None:
    settings = {"fisher": "mc", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trained(llama(), token_rows(), tmp_path, **settings)
    resumed = trained(llama(), token_rows(), tmp_path / "again", resume=str(tmp_path / "checkpoint-3"), **settings)
    assert_same_parameters(resumed.model, whole.model)
    other = trained(llama(), token_rows(), tmp_path / "other", **settings, seed=1, data_seed=0)
    expected = captured_factors(optimizer_of(whole))
    assert not any(torch.equal(f["B"], expected[n]["B"]) for n, f in captured_factors(optimizer_of(other)).items())


def test_a_classifier_draws_one_label_per_example(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_labels=3)
    rows = [{**row, "labels": row["input_ids"][0] % 3} for row in token_rows()]
    trainer = trained(LlamaForSequenceClassification(config), rows, tmp_path, fisher="mc")
    factors = captured_factors(optimizer_of(trainer))
    assert all(torch.isfinite(f["B"]).all() and f["B"].any() for f in factors.values())


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^fisher='mc': cannot be used with reentrant"):
        trained(
            llama(),
            token_rows(),
            tmp_path,
            fisher="mc",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )
