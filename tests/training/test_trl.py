"""TRL's trainers with our optimizers: statistics against the plain loop, flags, telemetry, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from shared.helpers import assert_same_parameters, captured_factors, in_float64, llama, optimizer_of, relative_error
from shared.trl_trainers import Batches, arguments, completions, per_row, preferences, sentences, tokenizer

import hf_so2

trl = pytest.importorskip("trl")


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


def sft(folder: Path, *, model: Any = None, rows: Any = None, **changes: Any) -> Any:
    return hf_so2.second_order(trl.SFTTrainer)(
        model=llama() if model is None else model,
        args=arguments(trl.SFTConfig, folder, **changes),
        train_dataset=completions() if rows is None else rows,
        processing_class=tokenizer(),
    )


def dpo(folder: Path, *, model: Any = None, **changes: Any) -> Any:
    reference = None if changes.get("precompute_ref_log_probs") else llama()
    return hf_so2.second_order(trl.DPOTrainer)(
        llama() if model is None else model,
        reference,  # second by position, where others have the arguments
        args=arguments(trl.DPOConfig, folder, **changes),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )


MAKERS = {"sft": sft, "dpo": dpo}


def torchs_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def trls_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return per_row(model, batch).sum()


# TRL's head computes in float32 whatever it is given, so that torch's agrees to that precision only.
LOSSES = {"torch": (torchs_loss, 1e-6), "trl": (trls_loss, 1e-10)}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("packing", [False, True], ids=["completions", "packed"])
@pytest.mark.parametrize("head", LOSSES)
def test_sft_statistics_equal_the_plain_loops(head: str, packing: bool, checkpointing: bool, tmp_path: Path) -> None:
    """Prompts without labels and padding, or packed rows, over two micro-batches; float64."""
    settings: dict[str, Any] = {"max_steps": 1, "gradient_accumulation_steps": 2, "completion_only_loss": True}
    rows = None
    if packing:
        rows = datasets.Dataset.from_dict({"text": sentences(64, 3)})
        settings |= {"packing": True, "packing_strategy": "wrapped", "completion_only_loss": None}
    settings["gradient_checkpointing"] = checkpointing
    trainer = sft(tmp_path, model=in_float64(llama()), rows=rows, **settings)
    batches = Batches(trainer)
    trainer.train()
    assert len(batches.inputs) == 2
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches.inputs]
    assert packing or (batches.inputs[0]["labels"] == -100).any()

    model = sft(tmp_path, model=in_float64(llama()), rows=rows, **settings).model.train()  # with TRL's head on it
    optimizer = hf_so2.build_optimizer("kfac", model)
    loss, tolerance = LOSSES[head]
    for batch, count in zip(batches.inputs, counts, strict=True):
        optimizer.announce(count, 1 / int(sum(counts)), batch.get("attention_mask"))
        (loss(model, batch) / sum(counts)).backward()
    optimizer.step()
    expected = captured_factors(optimizer)
    for name, factors in captured_factors(optimizer_of(trainer)).items():
        for side, factor in factors.items():
            assert relative_error(factor, expected[name][side]) < tolerance, (name, side)


@pytest.mark.parametrize("kind", MAKERS)
def test_trains_logs_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = MAKERS[kind](tmp_path, **settings)
    whole.train()
    first = whole.state.log_history[0]
    assert {"loss", "curvature/mlp/damping_A", "curvature/attention/update_rms"} <= first.keys()
    assert {"sft": "mean_token_accuracy", "dpo": "rewards/margins"}[kind] in first
    resumed = MAKERS[kind](tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_parameters(resumed.model, whole.model)
    for name, layer in optimizer_of(resumed).curvature.layers.items():
        assert torch.equal(layer.state["B"], optimizer_of(whole).curvature.layers[name].state["B"])


def test_reference_model_leaves_no_statistics(tmp_path: Path) -> None:
    """DPO runs the reference beside the model: with its outputs computed beforehand, statistics are the same."""
    beside, before = (dpo(tmp_path, max_steps=1, precompute_ref_log_probs=early) for early in (False, True))
    beside.train()
    before.train()
    expected = captured_factors(optimizer_of(before))
    assert len(expected) == 14
    for name, factors in captured_factors(optimizer_of(beside)).items():
        for side, factor in factors.items():
            torch.testing.assert_close(factor, expected[name][side])


def test_dpo_statistics_equal_the_plain_loops(tmp_path: Path) -> None:
    """The loss of Rafailov et al. 2023, eq. 7, written out; float64 but for TRL's head."""
    trainer = dpo(tmp_path, model=in_float64(llama()), max_steps=1, beta=0.3)
    batches = Batches(trainer)
    trainer.train()
    (batch,) = batches.inputs
    plain = dpo(tmp_path, model=in_float64(llama()), beta=0.3)
    model = plain.model.train()
    optimizer = hf_so2.build_optimizer("kfac", model)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    with torch.no_grad():
        reference = -per_row(plain.ref_model, given)
    chosen, rejected = (-per_row(model, given) - reference).chunk(2)
    (-torch.nn.functional.logsigmoid(0.3 * (chosen - rejected))).mean().backward()
    optimizer.step()
    expected = captured_factors(optimizer)
    for name, factors in captured_factors(optimizer_of(trainer)).items():
        for side, factor in factors.items():
            assert relative_error(factor, expected[name][side]) < 1e-10, (name, side)


def test_mup_is_applied_and_survives_loading_by_name(tmp_path: Path) -> None:
    fields = {"optim": "kfac_mup", "mup_base_width": 16, "max_steps": 1}
    trainer = sft(tmp_path / "first", model=llama(32), **fields)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = sft(tmp_path / "second", model=str(tmp_path / "saved"), model_init_kwargs={"dtype": "float32"}, **fields)
    assert_same_parameters(again.model, trainer.model)
    again.train()
    assert again.model.config.so2_mup["base_width"] == 16


def test_flags_are_read_by_trls_parser(tmp_path: Path) -> None:
    parser = trl.TrlParser(hf_so2.second_order_arguments(trl.SFTConfig))
    argv = ["--output_dir", str(tmp_path), "--optim", "soap", "--learning_rate", "0.01", "--packing", "true"]
    (args,) = parser.parse_args_and_config([*argv, "--bf16", "false"])
    assert (args.optim.value, args.learning_rate, args.packing) == ("soap", 0.01, True)


def test_arguments_that_trl_would_replace_are_refused(tmp_path: Path) -> None:
    args = hf_so2.SecondOrderTrainingArguments(str(tmp_path), optim="kfac", use_cpu=True)
    with pytest.raises(hf_so2.ConfigurationError, match=r"must be second_order_arguments\(SFTConfig\)$"):
        hf_so2.second_order(trl.SFTTrainer)(llama(), args, train_dataset=completions(), processing_class=tokenizer())
