"""Recipes: what is written is what is read, overrides are told, and a bad one is one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import GPT2Config, LlamaConfig

from hf_so2 import cli
from hf_so2.data import DataArguments
from hf_so2.errors import ConfigurationError
from hf_so2.models import ModelArguments, parse_overrides
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.transfer.proxies import Proxy, make_recipe
from hf_so2.transfer.recipe import Recipe, read_recipe, shapes_training, write_recipe
from hf_so2.transfer.wide_run import comparison, read_flags_and_recipe, share_batch

TYPES = (ModelArguments, DataArguments, SecondOrderTrainingArguments)
RECIPE = Recipe(
    transfer={"confirmed": True, "verdict": "It transfers.", "losses": {64: 3.2, 128: 3.1}},
    optimizer={"optim": "kfac_mup", "learning_rate": 0.12, "damping": 1e-05, "skip_modules": ["gate", "lm"]},
    base={"mup_base_width": 64, "mup_base_depth": 2},
    model={"model_type": "llama", "config_overrides": {"hidden_size": 64, "hidden_act": "silu"}, "head": "count"},
    data={"max_seq_length": 64, "vocab_size": 300},
    training={
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "seed": 3,
    },
    source={"command": "python scripts/sweep.py", "versions": {"python": "3.11"}},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_recipe(RECIPE, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_what_is_written_is_what_is_read(path: Path) -> None:
    assert read_recipe(str(path)) == RECIPE
    text = path.read_text(encoding="utf-8")
    assert f"--recipe {path} --width" in text
    assert "NOT CONFIRMED" not in text


def test_every_setting_reaches_the_arguments_untouched(path: Path) -> None:
    flags, recipe, lines = read_flags_and_recipe(TYPES, ["--recipe", str(path), "--width", "512", "--use_cpu"])
    model, data, args = cli.build(TYPES, flags)
    assert recipe == RECIPE
    assert lines == [f"recipe {path}: kfac_mup, tuned at width 64 and 128"]
    assert (model.width, model.model_type) == (512, "llama")
    assert parse_overrides(model.config_overrides) == RECIPE.model["config_overrides"]
    assert (data.max_seq_length, data.vocab_size) == (64, 300)
    for section in (RECIPE.optimizer, RECIPE.base, RECIPE.training):
        for name, value in section.items():
            assert getattr(getattr(args, name), "value", getattr(args, name)) == value, name


def test_settings_that_others_switch_on_are_part_of_the_recipe() -> None:
    given = {
        "precondition_embeddings": True,
        "embedding_damping": 0.3,
        "precondition_head": True,
        "head_output_factor": "diagonal",
        "norm_control": "kl_clip",
        "kl_clip": 0.5,
    }
    proxy = Proxy(32, LlamaConfig(), {"optim": "kfac", "model_type": "llama", "use_cpu": True, **given})
    recipe = make_recipe(proxy, {}, RECIPE.transfer, {})
    assert recipe.optimizer.items() >= given.items()


def test_flags_override_and_are_told(path: Path) -> None:
    argv = ["--recipe", str(path), "--learning_rate=0.06", "--seed=3", "--max_grad_norm=2", "--output_dir=out"]
    flags, _, lines = read_flags_and_recipe(TYPES, argv)
    assert (flags["learning_rate"], flags["damping"]) == (0.06, 1e-5)
    assert lines[1:] == [
        "override: learning_rate: 0.06 (recipe: 0.12)",
        "override: max_grad_norm: 2.0 (recipe: its default)",
    ]


def test_another_base_replaces_the_recipes(path: Path) -> None:
    flags, _, _ = read_flags_and_recipe(TYPES, ["--recipe", str(path), "--mup_base_config=base.json"])
    assert "mup_base_width" not in flags


def test_an_unconfirmed_recipe_warns(path: Path) -> None:
    name = changed(path, lambda content: content["transfer"].update(confirmed=False, verdict="Not confirmed: edge."))
    _, _, lines = read_flags_and_recipe(TYPES, ["--recipe", name])
    assert lines[1] == "beware: Not confirmed: edge."


def test_a_depth_that_the_base_does_not_follow_warns(path: Path) -> None:
    changed(path, lambda content: content["model"]["config_overrides"].update(num_hidden_layers=2))

    def warnings(*argv: str) -> list[str]:
        _, _, lines = read_flags_and_recipe(TYPES, ["--recipe", str(path), *argv])
        return [line for line in lines if "mup_base_depth, that of the proxies" in line]

    assert not warnings("--config_overrides=hidden_size=64,num_hidden_layers=6")
    assert not warnings("--depth", "6")
    changed(path, lambda content: content["base"].pop("mup_base_depth"))  # as earlier versions wrote it

    deeper = "--config_overrides=hidden_size=64,num_hidden_layers=6"
    assert len(warnings(deeper)) == len(warnings("--config_overrides=hidden_size=64")) == 1
    assert warnings(deeper)[0].startswith("beware: num_hidden_layers is 6, 2 on the proxies")
    assert warnings("--depth", "6")[0].startswith("beware: depth is 6")
    assert not warnings()
    assert not warnings("--config_overrides=hidden_size=64,num_hidden_layers=2")
    assert not warnings(deeper, "--mup_base_config=base.json")
    changed(path, lambda content: content.update(base={}))
    assert not warnings(deeper)


def test_a_checkpoint_brings_its_own_model_and_takes_the_proxys_base(path: Path, tmp_path: Path) -> None:
    wide = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4)
    wide.save_pretrained(tmp_path / "wide")
    base = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1)

    def finetuning(content: dict[str, Any]) -> None:
        content["model"] = {"model_type": "llama"}
        content["base"] = {"mup_base_config": base.to_diff_dict()}

    name = changed(path, finetuning)
    argv = ["--recipe", name, "--model_name_or_path", str(tmp_path / "wide"), "--use_cpu"]
    flags, _, _ = read_flags_and_recipe(TYPES, argv)
    model, _, args = cli.build(TYPES, flags)
    assert model.model_type is None
    assert args.base_config(wide).hidden_size == 64
    with pytest.raises(ConfigurationError, match="give --model_name_or_path"):
        read_flags_and_recipe(TYPES, ["--recipe", name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(optimiser={}), r"unknown key optimiser \(did you mean 'optimizer'\?\)"),
        (lambda c: c["optimizer"].update(dampin=1), r"unknown key optimizer\.dampin \(did you mean 'damping'\?\)"),
        (lambda c: c["data"].update(vocab=1), r"unknown key data\.vocab"),
        (lambda c: c.update(recipe=2), "recipe=2: is another version of the format; must be 1"),
        (lambda c: c.pop("recipe"), "must be a recipe.yaml"),
        (lambda c: c["optimizer"].pop("learning_rate"), r"lacks optimizer\.learning_rate"),
        (lambda c: c.update(data=[1]), "mapping in its section data"),
        (lambda c: c["optimizer"].update(optim="kfacc"), "did you mean 'kfac'"),
    ],
)
def test_a_bad_recipe_is_one_line_and_code_2(
    change: Callable[[dict[str, Any]], object],
    message: str,
    path: Path,
    run_script: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_script("train.py", ["--recipe", changed(path, change), "--width", "512"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ConfigurationError, match=message):
        read_flags_and_recipe(TYPES, ["--recipe", str(path), "--width", "512"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--width", "32"], "width=32: must be at least as wide as the recipe's proxy, 64"),
        (["--model_type", "gpt2"], "model_type='gpt2': must be of the recipe's model family, llama"),
        (["--model_name_or_path", "GPT2"], "is of the family gpt2; must be of the recipe's model family, llama"),
        (["--model_name_or_path", "NARROW"], "at least as wide as the recipe's proxy, 64"),
        (["--model_name_or_path", "missing"], "model_name_or_path='missing': cannot be loaded"),
        (["--widht", "512"], "did you mean 'width'"),
        (["--width", "512", "--depth", "0"], "depth=0: must be a positive number"),
    ],
)
def test_a_model_that_the_recipe_is_not_for_is_one_line_and_code_2(
    argv: list[str],
    message: str,
    path: Path,
    tmp_path: Path,
    run_script: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    GPT2Config(n_embd=64, n_layer=1).save_pretrained(tmp_path / "GPT2")
    LlamaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "NARROW")
    argv = [str(tmp_path / word) if word in ("GPT2", "NARROW") else word for word in argv]
    assert run_script("train.py", ["--recipe", str(path), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="must be an existing file"):
        read_recipe(str(tmp_path / "missing.yaml"))
    (tmp_path / "broken.yaml").write_text("a: b: c", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_recipe(str(tmp_path / "broken.yaml"))


def test_the_batch_is_shared_among_processes() -> None:
    args = SimpleNamespace(world_size=2, per_device_train_batch_size=8)
    share_batch(args, RECIPE, [])
    assert args.per_device_train_batch_size == 4
    with pytest.raises(ConfigurationError, match="cannot be divided among 3 processes"):
        share_batch(SimpleNamespace(world_size=3, per_device_train_batch_size=8), RECIPE, [])
    own = SimpleNamespace(world_size=2, per_device_train_batch_size=3)
    share_batch(own, RECIPE, ["override: per_device_train_batch_size: 3 (recipe: 8)"])
    assert own.per_device_train_batch_size == 3


def test_the_wide_loss_is_shown_beside_the_forecast() -> None:
    line = comparison(RECIPE, 512, 2.95)
    assert line == "eval_loss 2.9500 at width 512; the proxy of width 128 had 3.1000, predicted were 2.900 to 3.100"


@pytest.mark.parametrize(
    "name", ["learning_rate", "max_steps", "max_eval_samples", "bf16", "per_device_train_batch_size"]
)
def test_flags_that_shape_training_belong_into_a_recipe(name: str) -> None:
    assert shapes_training(name)


@pytest.mark.parametrize("name", ["output_dir", "width", "logging_steps", "save_steps", "eval_strategy", "use_cpu"])
def test_flags_about_the_machine_and_the_logs_do_not(name: str) -> None:
    assert not shapes_training(name)
