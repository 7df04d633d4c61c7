"""At the base width μP changes nothing, and our first-order names are transformers' own optimizers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import assert_same_parameters, gpt2, llama, optimizer_of, token_rows, trained
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_so2

STEPS = {"max_steps": 5, "lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1}
MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2}
BASE = {"mup_base_width": 16}


@pytest.mark.parametrize("settings", [{}, {"norm_control": "none"}, {"norm_control": "kl_clip"}], ids=str)
@pytest.mark.parametrize("damping_rule", ["trace", "constant"])
def test_kfac_mup_is_kfac(settings: dict[str, Any], damping_rule: str, tmp_path: Path) -> None:
    common = STEPS | settings | {"damping_rule": damping_rule, "learning_rate": 0.01}
    plain = trained(llama(), token_rows(), tmp_path, optim="kfac", **common)
    mup = trained(llama(), token_rows(), tmp_path, optim="kfac_mup", **BASE, **common)
    assert_same_parameters(mup.model, plain.model)
    assert optimizer_of(mup).steps == 5


def test_kfac_mup_is_kfac_on_gpt2(tmp_path: Path) -> None:
    plain = trained(gpt2(), token_rows(padded=True), tmp_path, optim="kfac", **STEPS)
    mup = trained(gpt2(), token_rows(padded=True), tmp_path, optim="kfac_mup", **BASE, **STEPS)
    assert_same_parameters(mup.model, plain.model)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        ("adamw", "adamw_torch", {"learning_rate": 3e-3}),
        ("adamw", "adamw_torch", {"learning_rate": 3e-3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-5}),
        ("adamw_mup", "adamw_torch", {"learning_rate": 3e-3}),
        ("sgd", "sgd", {"learning_rate": 0.3}),
        ("sgd_mup", "sgd", {"learning_rate": 0.3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", MODELS)
def test_first_order_names_are_those_of_transformers(
    family: str, ours: str, theirs: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The oracle is transformers' Trainer itself, with its own arguments class."""
    base = BASE if ours.endswith("_mup") else {}
    mine = trained(MODELS[family](), token_rows(padded=True), tmp_path, optim=ours, **base, **STEPS, **settings)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        optim=theirs,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=16,
        dataloader_pin_memory=False,
        seed=0,
        **STEPS,
        **settings,
    )
    reference = Trainer(model=MODELS[family](), args=arguments, train_dataset=token_rows(padded=True))
    reference.train()
    assert_same_parameters(mine.model, reference.model)


def test_adamw_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    """Betas, epsilon and weight decay; the rate is the user's to give."""
    optimizer = hf_so2.build_optimizer("adamw", llama(), lr=1e-3)
    reference = torch.optim.AdamW(llama().parameters(), lr=1e-3)
    for key in ("betas", "eps"):
        assert optimizer.param_groups[0][key] == reference.defaults[key]
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_plain_sgd_momentum_is_that_of_torch() -> None:
    ours, theirs = llama().train(), llama().train()
    optimizer = hf_so2.build_optimizer("sgd", ours, lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    tokens = torch.stack([row["input_ids"] for row in token_rows(4)])
    for _ in range(4):
        for model, stepper in ((ours, optimizer), (theirs, reference)):
            stepper.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            stepper.step()
    assert_same_parameters(ours, theirs)


def test_a_base_depth_scales_the_branches_and_the_models_own_changes_nothing(tmp_path: Path) -> None:
    """Beside the base width it is the number of layers that `mup_base_config` would have."""
    layers = llama().config.num_hidden_layers
    plain = trained(llama(), token_rows(), tmp_path, optim="kfac_mup", **BASE, **STEPS)
    same = trained(llama(), token_rows(), tmp_path, optim="kfac_mup", **BASE, mup_base_depth=layers, **STEPS)
    assert_same_parameters(same.model, plain.model)
    config = hf_so2.scale_depth(llama().config, depth=1).to_dict()
    by_depth = trained(llama(), token_rows(), tmp_path, optim="kfac_mup", **BASE, mup_base_depth=1, **STEPS)
    by_config = trained(llama(), token_rows(), tmp_path, optim="kfac_mup", mup_base_config=config, **STEPS)
    assert_same_parameters(by_depth.model, by_config.model)
    weights = [model.get_parameter("model.layers.0.mlp.down_proj.weight") for model in (by_depth.model, plain.model)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mup_base_depth": 0, "mup_base_width": 16}, "mup_base_depth=0: must be a whole number of at least 1"),
        ({"mup_base_depth": 2}, "mup_base_depth=2: needs mup_base_width"),
        ({"mup_base_depth": 2, "mup_base_config": "base"}, "mup_base_depth=2: needs mup_base_width"),
    ],
)
def test_a_base_depth_that_means_nothing_is_refused(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=message):
        hf_so2.SecondOrderTrainingArguments(output_dir=str(tmp_path), optim="kfac_mup", **flags)


def test_a_base_beside_the_models_own_is_not_used_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model that μP has scaled keeps the base that it was scaled from."""
    model = llama()
    base = hf_so2.scale_depth(hf_so2.scale_width(model.config, width=16), depth=1)
    hf_so2.apply_mup(model, base)
    for given in (base, hf_so2.scale_width(base, width=32), hf_so2.scale_depth(base, depth=2)):
        hf_so2.build_optimizer("kfac_mup", model, base_config=given)
    trained(model, token_rows(), tmp_path, optim="kfac_mup", mup_base_width=8, max_steps=1)
    said = [record.getMessage() for record in caplog.records if "base is not used" in record.getMessage()]
    assert [line.rpartition(": ")[2] for line in said] == ["width 32, not 16", "depth 2, not 1", "width 8, not 16"]
