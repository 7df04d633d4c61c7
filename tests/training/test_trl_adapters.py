"""TRL's SFT, DPO and reward trainers, whole and with PEFT's adapters: statistics against the plain loop, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import SMALL, captured_factors, in_float64, llama, optimizer_of, relative_error
from shared.trl_trainers import Batches, arguments, completions, per_row, preferences, tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import hf_so2

trl = pytest.importorskip("trl", reason="needs trl")
peft = pytest.importorskip("peft", reason="needs peft")

PARTS, BETA, CENTRE = 2, 0.3, 0.01
ADAPTERS = ["lora", "dora", "saved"]


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


def adapted(model: nn.Module, adapter: str, task: str, head: str) -> nn.Module:
    """Adapters that are no zeros at the start, so that both of their matrices have a gradient from the first step."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"dora": {"use_dora": True}, "saved": {"modules_to_save": [head]}}.get(adapter, {})
    config = peft.LoraConfig(
        r=4, target_modules=["v_proj", "down_proj"], init_lora_weights=False, task_type=task, **options
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def causal(adapter: str, *, double: bool) -> nn.Module:
    model = in_float64(llama()) if double else llama()
    return model if adapter == "whole" else adapted(model, adapter, "CAUSAL_LM", "lm_head")


def rewarding(adapter: str, *, double: bool) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1, eos_token_id=1))
    model = in_float64(model) if double else model
    return model if adapter == "whole" else adapted(model, adapter, "SEQ_CLS", "score")


def make(kind: str, adapter: str, folder: Path, *, double: bool = False, **changes: Any) -> Any:
    trainer, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }[kind]
    own = {"dpo": {"beta": BETA}, "reward": {"center_rewards_coefficient": CENTRE}}.get(kind, {})
    model = (rewarding if kind == "reward" else causal)(adapter, double=double)
    return hf_so2.second_order(trainer)(
        model=model,
        args=arguments(config, folder, gradient_accumulation_steps=PARTS, **(own | changes)),
        train_dataset=completions() if kind == "sft" else preferences(),
        processing_class=tokenizer(),
    )


def sft_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A sum over tokens; TRL's SFT divides by their number in the whole step."""
    return per_row(model, batch).sum()


def dpo_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Rafailov et al. 2023, eq. 7, at the start, when the model is its own reference: TRL copies its adapters."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    with torch.no_grad():
        reference = -per_row(model, given)
    chosen, rejected = (-per_row(model, given) - reference).chunk(2)
    return -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def reward_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Bradley and Terry's, with the mean reward held near zero (Eisenstein et al. 2023)."""
    chosen, rejected = model(**batch).logits[:, 0].chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).mean() + CENTRE * (chosen + rejected).square().mean()


LOSSES = {"sft": sft_loss, "dpo": dpo_loss, "reward": reward_loss}
# SFT and DPO of whole models are in test_trl.py.
CASES = [(kind, adapter) for kind in LOSSES for adapter in ADAPTERS] + [("reward", "whole")]


@pytest.mark.parametrize(("kind", "adapter"), CASES)
def test_statistics_equal_the_plain_loops(kind: str, adapter: str, tmp_path: Path) -> None:
    trainer = make(kind, adapter, tmp_path, double=True, max_steps=1)
    batches = Batches(trainer)
    trainer.train()
    assert len(batches.inputs) == PARTS

    model = make(kind, adapter, tmp_path, double=True).model.train()  # with what TRL has put on it
    optimizer = hf_so2.build_optimizer("kfac", model)
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches.inputs) if kind == "sft" else 0
    for batch in batches.inputs:
        if kind == "sft":
            optimizer.announce(None, 1 / tokens)
            (LOSSES[kind](model, batch) / tokens).backward()
        else:
            optimizer.announce(None, 1 / PARTS, is_mean=True)
            (LOSSES[kind](model, batch) / PARTS).backward()
    optimizer.step()
    expected, found = captured_factors(optimizer), captured_factors(optimizer_of(trainer))
    assert found.keys() == expected.keys()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2}
    assert found.keys() >= {name for name in trained if "lora_" in name}
    for name, factors in found.items():
        for side, factor in factors.items():
            assert relative_error(factor, expected[name][side]) < 1e-10, (name, side)


@pytest.mark.parametrize(("kind", "adapter"), CASES)
def test_trains_logs_and_resumes_bit_for_bit(kind: str, adapter: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = make(kind, adapter, tmp_path, **settings)
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    for name, p in whole.model.named_parameters():
        assert name not in start or not torch.equal(p, start[name]), name
    first = whole.state.log_history[0]
    assert {"loss", "curvature/mlp/damping_A", "curvature/attention/update_rms"} <= first.keys()
    assert {"sft": "mean_token_accuracy", "dpo": "rewards/margins", "reward": "margin"}[kind] in first
    resumed = make(kind, adapter, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), (other_name, other) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other), name
    for name, layer in optimizer_of(resumed).curvature.layers.items():
        assert torch.equal(layer.state["B"], optimizer_of(whole).curvature.layers[name].state["B"]), name
