"""What people switch on in the Trainer, each with K-FAC: rows of docs/features.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, set_seed

import hf_so2

pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}


def rows(count: int = 64) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 4, (count, 16), generator=generator).cumsum(1) % 64
    return datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})


def model() -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=64, max_position_embeddings=16))


def trainer(folder: Path, callbacks: list[Any] | None = None, network: Any = None, **changes: Any) -> Any:
    fields: dict[str, Any] = {"optim": "kfac", "use_cpu": True, "report_to": "none", "logging_steps": 1}
    fields |= {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}
    fields |= {"save_strategy": "steps"} if "save_steps" in changes else {}
    args = hf_so2.SecondOrderTrainingArguments(output_dir=str(folder), **fields | changes)
    return hf_so2.SecondOrderTrainer(
        model=network or model(), args=args, train_dataset=rows(), eval_dataset=rows(16), callbacks=callbacks
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.5},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"auto_find_batch_size": True},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1},
        {"dataloader_drop_last": True},
        {"max_steps": -1, "num_train_epochs": 1},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.5},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"include_num_input_tokens_seen": "all"},
        {"average_tokens_across_devices": False},
        {"eval_on_start": True, "eval_strategy": "epoch", "eval_accumulation_steps": 1},
        {"seed": 1, "full_determinism": False, "data_seed": 2},
        EVERY_STEP,
        {**EVERY_STEP, "save_strategy": "best", "metric_for_best_model": "eval_loss"},
        {"save_steps": 2, "save_total_limit": 1},
        {"save_steps": 2, "save_only_model": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
def test_the_flag_works(changes: dict[str, Any], tmp_path: Path) -> None:
    ran = trainer(tmp_path, **changes)
    ran.train()
    losses = [entry["loss"] for entry in ran.state.log_history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < losses[0]
    curvature = [name for entry in ran.state.log_history for name in entry if name.startswith("curvature/")]
    assert curvature


def test_early_stopping(tmp_path: Path) -> None:
    patience = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    stopped = trainer(tmp_path, [patience], **EVERY_STEP)
    stopped.train()
    assert stopped.state.global_step < 6


def test_hyperparameter_search(tmp_path: Path) -> None:
    searched = trainer(tmp_path, eval_strategy="steps", eval_steps=6)
    searched.model_init = lambda trial=None: model()
    best = searched.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.1, log=True)},
        n_trials=2,
        direction="minimize",
        backend="optuna",
    )
    assert 0.01 <= best.hyperparameters["learning_rate"] <= 0.1


def test_predict_and_evaluate(tmp_path: Path) -> None:
    trained = trainer(tmp_path)
    trained.train()
    assert trained.predict(rows(8)).metrics["test_loss"] == pytest.approx(trained.evaluate(rows(8))["eval_loss"])


def adapted(kind: str) -> Any:
    peft = pytest.importorskip("peft")
    options = {"dora": {"use_dora": True}, "head": {"modules_to_save": ["lm_head"]}}.get(kind, {})
    return peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options))


@pytest.mark.parametrize("kind", ["lora", "dora", "head"])
def test_adapters(kind: str, tmp_path: Path) -> None:
    ran = trainer(tmp_path, network=adapted(kind), save_steps=3)
    before = ran.evaluate()["eval_loss"]  # a frozen model of random weights: batches differ more than steps
    ran.train()
    assert ran.evaluate()["eval_loss"] < before
    assert any(entry.algorithm == "kfac" for entry in ran.coverage().parameters)
    resumed = trainer(tmp_path, network=adapted(kind), save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, one), other in zip(ran.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_log_is_in_the_trainers_state(tmp_path: Path) -> None:
    ran = trainer(tmp_path, save_steps=6)
    ran.train()
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text("utf-8"))["log_history"]
    assert any(name.startswith("curvature/") for entry in history for name in entry)
