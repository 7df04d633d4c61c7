"""`second_order` and `second_order_arguments` over Trainers that are not transformers' plain one."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import (
    VOCABULARY,
    arguments,
    assert_same_parameters,
    captured_factors,
    in_float64,
    llama,
    optimizer_of,
    relative_error,
    token_rows,
)
from torch import nn
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import hf_so2

QUIET: dict[str, Any] = {
    "optim": "kfac",
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "lr_scheduler_type": "constant",
    "dataloader_pin_memory": False,
}


class OwnLoss(Trainer):
    """Overrides what is overridden most, with parameters in an order of its own."""

    def __init__(self, smoothness: float, *args: Any, **kwargs: Any) -> None:
        self.smoothness, self.calls = smoothness, []
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        self.calls.append("compute_loss")
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss + self.smoothness * sum(p.square().sum() for p in model.parameters())
        return (loss, outputs) if kwargs.get("return_outputs") else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append("training_step")
        return super().training_step(*args, **kwargs)


OwnTrainer = hf_so2.second_order(OwnLoss)
Seq2SeqArguments = hf_so2.second_order_arguments(Seq2SeqTrainingArguments)


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def test_same_class_comes_back() -> None:
    assert hf_so2.second_order(OwnLoss) is OwnTrainer
    assert hf_so2.second_order(OwnTrainer) is OwnTrainer
    assert hf_so2.second_order(Trainer) is hf_so2.SecondOrderTrainer
    assert hf_so2.second_order_arguments(TrainingArguments) is hf_so2.SecondOrderTrainingArguments
    assert hf_so2.second_order_arguments(Seq2SeqArguments) is Seq2SeqArguments
    assert pickle.loads(pickle.dumps(Seq2SeqArguments)) is Seq2SeqArguments
    assert pickle.loads(pickle.dumps(OwnTrainer)) is OwnTrainer
    assert issubclass(OwnTrainer, OwnLoss)
    assert OwnTrainer.__name__ == "SecondOrderOwnLoss"


def test_arguments_are_read_by_a_process_that_never_made_their_class(tmp_path: Path) -> None:
    args = Seq2SeqArguments(output_dir=str(tmp_path), predict_with_generate=True, **QUIET | {"optim": "kfac_mup"})
    torch.save(args, tmp_path / "training_args.bin")
    code = f"""
import torch
args = torch.load({str(tmp_path / "training_args.bin")!r}, weights_only=False)
assert (args.optim.value, args.predict_with_generate, args.damping) == ("kfac_mup", True, {args.damping!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flags_are_those_of_both(tmp_path: Path) -> None:
    argv = ["--output_dir", str(tmp_path), "--optim=ekfac_mup", "--damping=0.02", "--generation_max_length=7"]
    (args,) = HfArgumentParser(Seq2SeqArguments).parse_args_into_dataclasses(argv)
    assert (args.optim.value, args.damping, args.generation_max_length) == ("ekfac_mup", 0.02, 7)
    assert args.learning_rate == hf_so2.SecondOrderTrainingArguments(str(tmp_path), optim="ekfac_mup").learning_rate


def test_foreign_optimizers_take_the_defaults_of_the_class_behind(tmp_path: Path) -> None:
    @dataclass
    class Slower(TrainingArguments):
        learning_rate: float = 3e-7

    made = hf_so2.second_order_arguments(Slower)
    assert made(str(tmp_path), optim="adamw_torch").learning_rate == 3e-7
    assert made(str(tmp_path), optim="kfac").learning_rate != 3e-7


def test_field_with_another_meaning_is_refused() -> None:
    @dataclass
    class Clash(TrainingArguments):
        damping: str = "none"

    with pytest.raises(
        hf_so2.ConfigurationError, match=r"^arguments='Clash': must not have a field damping of its own"
    ):
        hf_so2.second_order_arguments(Clash)


@pytest.mark.parametrize("wrong", [nn.Linear, "SFTTrainer", None])
def test_what_is_no_trainer_is_refused(wrong: Any) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^trainer='\w+': must be transformers\.Trainer or a subclass"):
        hf_so2.second_order(wrong)
    with pytest.raises(
        hf_so2.ConfigurationError, match=r"^arguments='\w+': must be transformers\.TrainingArguments or"
    ):
        hf_so2.second_order_arguments(wrong)


def test_plain_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        hf_so2.ConfigurationError, match=r"^args='TrainingArguments': must be SecondOrderTrainingArguments$"
    ):
        OwnTrainer(0.0, model=llama(), args=TrainingArguments(str(tmp_path), use_cpu=True))


def test_own_loss_and_step_are_called_and_count_the_same(tmp_path: Path) -> None:
    """The weight decay inside the loss is no part of the layers' statistics, which are those of the plain Trainer."""
    rows, settings = token_rows(padded=True), {"max_steps": 1, "gradient_accumulation_steps": 2}
    own = OwnTrainer(0.1, model=in_float64(llama()), args=arguments(tmp_path, **settings), train_dataset=rows)
    own.train()
    assert own.calls == ["training_step", "compute_loss"] * 2
    plain = hf_so2.SecondOrderTrainer(
        model=in_float64(llama()), args=arguments(tmp_path, **settings), train_dataset=rows
    )
    plain.train()
    expected = captured_factors(optimizer_of(plain))
    for name, factors in captured_factors(optimizer_of(own)).items():
        for side, factor in factors.items():
            assert relative_error(factor, expected[name][side]) < 1e-10


def test_sampled_fisher_with_an_own_loss(tmp_path: Path) -> None:
    own = OwnTrainer(0.0, model=llama(), args=arguments(tmp_path, fisher="mc"), train_dataset=token_rows())
    plain = hf_so2.SecondOrderTrainer(model=llama(), args=arguments(tmp_path, fisher="mc"), train_dataset=token_rows())
    own.train()
    plain.train()
    assert_same_parameters(own.model, plain.model)


def seq2seq_rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    return [{**row, "labels": row["input_ids"].flip(0)[:7]} for row in token_rows(count)]


def seq2seq_trainer(folder: Path, **changes: Any) -> Any:
    args = Seq2SeqArguments(output_dir=str(folder), **(QUIET | {"predict_with_generate": True} | changes))
    rows = seq2seq_rows()
    return hf_so2.second_order(Seq2SeqTrainer)(t5(), args, train_dataset=rows, eval_dataset=rows[:8])


def test_seq2seq_resumes_bit_for_bit_and_logs_curvature(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    whole = seq2seq_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert {"loss", "curvature/mlp/damping_A"} <= whole.state.log_history[0].keys()
    assert "eval_loss" in whole.evaluate()
    resumed = seq2seq_trainer(tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(resumed.model, whole.model)
    for name, layer in optimizer_of(resumed).curvature.layers.items():
        assert torch.equal(layer.state["B"], optimizer_of(whole).curvature.layers[name].state["B"])
