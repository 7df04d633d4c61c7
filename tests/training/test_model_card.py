"""The model card: what README.md says of optimizer, μP base, recipe and versions, also when it is pushed."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from shared.helpers import arguments, llama, token_rows
from transformers import trainer as transformers_trainer

import hf_so2

SECTION = "## Second-order optimizer"


def made(folder: Path, **changes: Any) -> hf_so2.SecondOrderTrainer:
    model = llama(32 if changes.get("optim", "kfac").endswith("_mup") else 16)
    return hf_so2.SecondOrderTrainer(model=model, args=arguments(folder, **changes), train_dataset=token_rows())


def section(folder: Path) -> str:
    text = (folder / "README.md").read_text("utf-8")
    assert text.count(SECTION) == 1
    return text.partition(SECTION)[2]


def table(folder: Path) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ", 1) for line in section(folder).splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def settings(folder: Path) -> dict[str, Any]:
    return yaml.safe_load(section(folder).partition("```yaml")[2].partition("```")[0])


def test_it_names_optimizer_base_recipe_and_versions(tmp_path: Path) -> None:
    trainer = made(tmp_path, optim="kfac_mup", mup_base_width=16, damping=0.02)
    trainer.train()
    trainer.card_notes["recipe"] = "recipe.yaml: kfac_mup, tuned\nat width 16 | 24"
    trainer.create_model_card(model_name="small")
    rows = table(tmp_path)
    assert rows["optimizer"] == "`kfac_mup`"
    assert rows["muP base"] == "width 16; this model has width 32, trained from scratch"
    assert rows["weights"] == trainer.coverage().summary()
    assert rows["recipe"] == "recipe.yaml: kfac_mup, tuned at width 16 / 24"
    for name in ("torch", "transformers", "accelerate"):
        assert f"{name} {importlib.metadata.version(name)}" in rows["versions"]
    assert "hf_so2 " in rows["versions"]
    written = settings(tmp_path)
    assert (written["damping"], written["mup_base_width"], written["max_steps"]) == (0.02, 16, 3)


def test_it_names_the_depth_of_a_base_that_is_less_deep(tmp_path: Path) -> None:
    base = llama(16).config
    base.num_hidden_layers = 1
    trainer = made(tmp_path, optim="kfac_mup", mup_base_config=base.to_dict())
    trainer.create_model_card()
    layers = trainer.model.config.num_hidden_layers
    assert layers > 1
    expected = f"width 16, 1 layers; this model has width 32, {layers} layers, trained from scratch"
    assert table(tmp_path)["muP base"] == expected


@pytest.mark.parametrize("optim", sorted(hf_so2.OPTIMIZERS))
def test_its_settings_make_the_same_optimizer_again(optim: str, tmp_path: Path) -> None:
    base = {"mup_base_width": 16} if optim.endswith("_mup") else {}
    trainer = made(tmp_path, optim=optim, **base, learning_rate=0.007, optim_args="weight_decay=0.03")
    trainer.create_model_card()
    again = hf_so2.SecondOrderTrainingArguments(str(tmp_path / "again"), use_cpu=True, **settings(tmp_path))
    assert again.optim == trainer.args.optim
    assert again.optimizer_settings() == trainer.args.optimizer_settings()
    assert (again.mup_base_width, again.max_steps, again.seed) == (trainer.args.mup_base_width, 3, 0)


def test_a_second_card_has_one_section_and_one_tag(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    trainer.create_model_card(tags="mine")
    trainer.create_model_card(tags=["theirs"])
    assert table(tmp_path)["muP base"] == "none: standard parametrization"
    tags = ModelCard.load(tmp_path / "README.md").data.tags
    assert tags.count("hf_so2") == 1
    assert {"mine", "theirs"} <= set(tags)


def test_transformers_own_optimizers_have_their_own_card(tmp_path: Path) -> None:
    trainer = made(tmp_path, optim="adamw_torch")
    trainer.create_model_card()
    assert SECTION not in (tmp_path / "README.md").read_text("utf-8")


def test_what_is_pushed_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: what would be uploaded is copied."""
    pushed = tmp_path / "pushed"

    def upload_folder(*, folder_path: str, **_: Any) -> None:
        shutil.copytree(folder_path, pushed)

    hub = SimpleNamespace(
        upload_folder=upload_folder, create_repo=lambda name, **_: SimpleNamespace(repo_id=f"someone/{name}")
    )
    monkeypatch.setattr(transformers_trainer, "hf_api", lambda: hub)
    trainer = made(tmp_path / "out")
    trainer.train()
    trainer.push_to_hub()
    assert table(pushed)["optimizer"] == "`kfac`"
    assert (pushed / "model.safetensors").is_file()


def test_cards_of_trl_and_adapters_have_it_in_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")
    peft = pytest.importorskip("peft", reason="needs peft")
    from shared import trl_trainers

    monkeypatch.setenv("CI", "1")
    trainer = hf_so2.second_order(trl.SFTTrainer)(
        model=llama(),
        args=trl_trainers.arguments(trl.SFTConfig, tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=trl_trainers.completions(),
        processing_class=trl_trainers.tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules=["v_proj"]),
    )
    trainer.train()
    assert {"trl", "hf_so2"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)
    rows = table(tmp_path)
    assert f"trl {trl.__version__}" in rows["versions"]
    assert f"peft {peft.__version__}" in rows["versions"]
    trainer.save_model()
    trainer.create_model_card()
    assert table(tmp_path)["optimizer"] == "`kfac`"
