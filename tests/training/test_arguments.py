"""The training arguments: every way they travel, and what they refuse."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import arguments, assert_same_parameters, llama, optimizer_of, token_rows, trained
from transformers import HfArgumentParser, SchedulerType, Trainer, TrainingArguments

import hf_so2

CHOSEN: dict[str, Any] = {
    "optim": "kfac_mup",
    "learning_rate": 0.07,
    "mup_base_width": 16,
    "damping": 0.02,
    "damping_rule": "spectral",
    "norm_control": "kl_clip",
    "kl_clip": 0.3,
    "beta2": 0.9,
    "factor_update_steps": 2,
    "preconditioner_update_steps": 4,
    "fallback_learning_rate": 0.005,
    "skip_modules": ["gate_proj"],
    "damping_overrides": ["q_proj=0.1", "mlp=pi:1e-3"],
    "nesterov": True,
    "max_preconditioner_dim": 100,
    "weight_decay": 0.1,
    "momentum": 0.8,
    "adam_epsilon": 1e-7,
}


def chosen(value: Any) -> Any:
    return getattr(value, "value", value)


def assert_equal_arguments(
    first: hf_so2.SecondOrderTrainingArguments, second: hf_so2.SecondOrderTrainingArguments
) -> None:
    assert type(first) is type(second) is hf_so2.SecondOrderTrainingArguments
    assert first.to_dict() == second.to_dict()
    assert first.optim == second.optim
    assert first.optimizer_settings() == second.optimizer_settings()


def test_fields_become_settings(tmp_path: Path) -> None:
    settings = arguments(tmp_path, **CHOSEN).optimizer_settings()
    names = {"learning_rate": "lr"}
    for name, value in CHOSEN.items():
        if name not in ("optim", "mup_base_width"):
            actual = getattr(settings, names.get(name, name))
            assert actual == (tuple(value) if isinstance(value, list) else value), name


@pytest.mark.parametrize(
    "changes", [CHOSEN, {}, {"optim": "adamw_torch", "learning_rate": 1e-4}], ids=["ours", "defaults", "theirs"]
)
def test_pickle_deepcopy_and_training_args_bin(changes: dict[str, Any], tmp_path: Path) -> None:
    args = arguments(tmp_path, **changes)
    torch.save(args, tmp_path / "training_args.bin")
    for copied in (
        pickle.loads(pickle.dumps(args)),
        copy.deepcopy(args),
        torch.load(tmp_path / "training_args.bin", weights_only=False),
    ):
        assert type(copied) is type(args)
        assert copied.to_dict() == args.to_dict()


@pytest.mark.parametrize("changes", [CHOSEN, {"optim": "adamw_mup", "mup_base_width": 8}], ids=["kfac", "adamw"])
def test_json_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    args = arguments(tmp_path, **changes)
    path = tmp_path / "args.json"
    path.write_text(args.to_json_string())
    assert json.loads(path.read_text())["optim"] == changes["optim"]
    parser = HfArgumentParser(hf_so2.SecondOrderTrainingArguments)
    (again,) = parser.parse_json_file(path, allow_extra_keys=True)
    assert_equal_arguments(again, args)


def test_command_line(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    for name, value in CHOSEN.items():
        flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    (args,) = HfArgumentParser(hf_so2.SecondOrderTrainingArguments).parse_args_into_dataclasses(flags)
    direct = hf_so2.SecondOrderTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **CHOSEN)
    assert_equal_arguments(args, direct)


def test_help_of_every_flag_can_be_printed() -> None:
    text = HfArgumentParser(hf_so2.SecondOrderTrainingArguments).format_help()
    assert "--damping_rule" in text
    assert "--mup_base_width" in text


def test_saved_training_arguments_are_those_of_the_run(tmp_path: Path) -> None:
    trainer = trained(llama(), token_rows(16), tmp_path, max_steps=1)
    trainer.save_model(str(tmp_path / "model"))
    loaded = torch.load(tmp_path / "model" / "training_args.bin", weights_only=False)
    assert_equal_arguments(loaded, trainer.args)


def test_optim_args_override_the_fields(tmp_path: Path) -> None:
    text = "damping=0.5, norm_control=kl_clip,kl_clip=1e-3,preconditioner_update_steps=7,skip_modules=q_proj;k_proj"
    text += ",damping_overrides=v_proj=0.1;mlp=pi:1e-3,nesterov=true"
    settings = arguments(tmp_path, damping=0.1, optim_args=text).optimizer_settings()
    assert (settings.damping, settings.norm_control, settings.kl_clip) == (0.5, "kl_clip", 1e-3)
    assert settings.preconditioner_update_steps == 7
    assert settings.skip_modules == ("q_proj", "k_proj")
    assert settings.damping_overrides == ("v_proj=0.1", "mlp=pi:1e-3")
    assert settings.nesterov is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("damping", "optim_args="),
        ("damping=big", "damping="),
        ("preconditioner_update_steps=2.5", "preconditioner_update_steps="),
        ("damping=-1", "damping="),
        ("dampening=1", "dampening=.*did you mean 'damping'"),
    ],
)
def test_bad_optim_args_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=f"^{message}"):
        arguments(tmp_path, optim_args=text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "kfacc"}, r"optim='kfacc': .*did you mean 'kfac'"),
        ({"damping_rule": "tracee"}, r"damping_rule='tracee': must be one of trace, "),
        ({"damping": -1.0}, r"damping=-1\.0: must be a number above 0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: must be a number above 0"),
        ({"per_device_train_batch_size": 0}, r"per_device_train_batch_size=0: must be at least 1"),
        ({"momentum": 1.0}, r"momentum=1\.0: must be a number in \[0, 1\)"),
        ({"optim": "adamw", "damping": 0.1}, r"damping=0\.1: has no effect on adamw"),
        (
            {"optim": "adamw_torch", "damping": 0.1},
            r"damping=0\.1: has no effect on transformers' optimizer adamw_torch",
        ),
        ({"optim": "kfac_mup", "mup_base_width": 8, "mup_base_config": "x.json"}, r"mup_base_config=.*excludes"),
        ({"optim": "kfac_mup", "mup_base_config": "{bad"}, r"mup_base_config='\{bad': must be valid JSON"),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycle": 1}},
            r"lr_scheduler_kwargs=.*must suit lr_scheduler_type=linear: .*num_cycle",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"lr_scheduler_kwargs=.*must suit .*min_lr"),
        ({"report_to": ["flyte"]}, r"report_to='flyte': is not installed; must be one of none"),
        ({"deepspeed": {"train_batch_size": 1}}, r"deepspeed="),
    ],
    ids=str,
)
def test_mistakes_are_refused_in_one_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=f"^{message}") as caught:
        arguments(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_mup_name_without_a_base_is_refused_by_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^mup_base_width=None"):
        trained(llama(), token_rows(16), tmp_path, optim="kfac_mup")


@pytest.mark.parametrize(
    "base", [{"hidden_size": 8}, {"model_type": "lama"}, {"model_type": "llama", "hidden_size": "x"}]
)
def test_a_base_that_is_no_config_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^mup_base_config=.*must be a readable model config"):
        trained(llama(), token_rows(16), tmp_path, optim="kfac_mup", mup_base_config=base)


@pytest.mark.parametrize("schedule", [entry.value for entry in SchedulerType])
def test_every_schedule_that_gets_what_it_needs_is_taken(schedule: str, tmp_path: Path) -> None:
    needed = {"cosine_with_min_lr": {"min_lr": 0.0}, "cosine_warmup_with_min_lr": {"min_lr": 0.0}}
    needed["warmup_stable_decay"] = {"num_decay_steps": 5}
    given = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": needed.get(schedule)}
    args = arguments(tmp_path, **given, eval_strategy="steps", eval_steps=1)
    assert args.lr_scheduler_type.value == schedule


def test_a_base_wider_than_the_model_is_refused_by_its_flag(tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^mup_base_width=64: must not be wider than the model, 16"):
        trained(llama(), token_rows(16), tmp_path, optim="kfac_mup", mup_base_width=64)


def test_foreign_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^args="):
        hf_so2.SecondOrderTrainer(model=llama(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "rmsprop"])
def test_names_of_transformers_still_work(optim: str, tmp_path: Path) -> None:
    """`sgd` is a name of both and means the same."""
    mine = trained(llama(), token_rows(), tmp_path, optim=optim, learning_rate=1e-3)
    reference = TrainingArguments(
        output_dir=str(tmp_path),
        optim=optim,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=3,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
        seed=0,
    )
    theirs = Trainer(model=llama(), args=reference, train_dataset=token_rows())
    theirs.train()
    assert_same_parameters(mine.model, theirs.model)


def test_default_of_other_fields_is_that_of_transformers(tmp_path: Path) -> None:
    """With a name of transformers, nothing that it trains with differs from its own defaults."""
    mine = hf_so2.SecondOrderTrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", use_cpu=True)
    theirs = TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", use_cpu=True)
    expected = theirs.to_dict()
    actual = mine.to_dict()
    assert {name: chosen(actual[name]) for name in expected} == {name: chosen(x) for name, x in expected.items()}


@pytest.mark.parametrize("optim", hf_so2.OPTIMIZERS)
def test_every_name_trains_with_nothing_but_its_name(optim: str, tmp_path: Path) -> None:
    base = {"mup_base_width": 16} if optim.endswith("_mup") else {}
    trainer = trained(llama(32), token_rows(32), tmp_path, optim=optim, **base, max_steps=2)
    assert optimizer_of(trainer).steps == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    report = trainer.coverage()
    assert report is not None
    assert {entry.name for entry in report.parameters} == dict(trainer.model.named_parameters()).keys()


def test_set_optimizer(tmp_path: Path) -> None:
    args = arguments(tmp_path).set_optimizer(name="adamw_mup", learning_rate=1e-4)
    assert (args.optim.value, args.learning_rate) == ("adamw_mup", 1e-4)
    with pytest.raises(hf_so2.ConfigurationError, match=r"^optim="):
        args.set_optimizer(name="adamm")
