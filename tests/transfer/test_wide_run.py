"""A run that is longer, or has a larger batch, than the proxies of its recipe says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_so2 import cli
from hf_so2.transfer.recipe import Recipe, write_recipe
from hf_so2.transfer.runner import TYPES
from hf_so2.transfer.wide_run import KNOWN, Extent, beyond_proxies, extents

BASE = {"optim": "kfac_mup", "learning_rate": 0.12}


def recipe(training: dict[str, Any], **data: Any) -> Recipe:
    training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2} | training
    overrides = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Recipe(
        transfer={"confirmed": True, "verdict": "It transfers.", "losses": {16: 3.2}},
        optimizer=BASE,
        base={"mup_base_width": 16, "mup_base_depth": 1},
        model={"model_type": "llama", "config_overrides": {**overrides, "num_key_value_heads": 2}},
        data={"max_seq_length": 64} | data,
        training=training,
    )


def extents_of(made: Recipe, blocks: int, **flags: Any) -> tuple[Extent, Extent]:
    given = cli.read_flags(TYPES, [], made.settings({})) | {"use_cpu": True, "output_dir": "out"} | flags
    _, data, args = cli.build(TYPES, given)
    return extents(made, args, data, blocks)


def test_the_proxies_own_run_is_as_long() -> None:
    proxies, run = extents_of(recipe({"max_steps": 200}), 1000)
    assert proxies == run == Extent(200, 8 * 2 * 64)
    assert beyond_proxies(proxies, run) == ""


def test_epochs_become_steps_of_the_same_data() -> None:
    # 1,000 sequences in batches of 16: 63 steps an epoch.
    proxies, run = extents_of(recipe({"num_train_epochs": 2.0}), 1000, num_train_epochs=5.0)
    assert (proxies.steps, run.steps) == (126, 315)
    proxies, run = extents_of(recipe({"num_train_epochs": 2.0}), 1000, max_seq_length=128)
    assert (proxies.steps, run.steps) == (None, 126)
    assert (proxies.tokens, run.tokens) == (1024, 2048)


def test_numbers_that_a_person_wrote_as_text_are_numbers() -> None:
    written = recipe({"max_steps": "200", "per_device_train_batch_size": "8"}, max_seq_length="64")
    proxies, run = extents_of(written, 1000, max_steps=400)
    assert (proxies, run) == (Extent(200, 1024), Extent(400, 1024))


@pytest.mark.parametrize(
    ("proxies", "run", "words"),
    [
        (Extent(200, 1024), Extent(800, 1024), "4 times the proxies' steps (800, 200 there): "),
        (Extent(200, 1024), Extent(200, 4096), "4 times their tokens a step (4096, 1024): "),
        (
            Extent(200, 1024),
            Extent(300, 2048),
            "1.5 times the proxies' steps (300, 200 there) and 2 times their tokens",
        ),
        (Extent(None, 1024), Extent(300, 1024), ""),
        (Extent(200, 1024), Extent(None, 1024), ""),
        (Extent(200, 1024), Extent(205, 1024), ""),  # epochs are rounded
        (Extent(200, 1024), Extent(100, 512), ""),
    ],
)
def test_a_longer_run_or_a_larger_batch_is_one_line(proxies: Extent, run: Extent, words: str) -> None:
    line = beyond_proxies(proxies, run)
    assert line.startswith(words)
    assert bool(line) == bool(words)
    assert "\n" not in line
    assert not line or line.endswith(KNOWN)


def test_the_command_warns(
    run_script: Callable[..., int], workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe({"max_steps": 1}, train_file=str(workspace / "train.jsonl"), vocab_size=300, max_eval_samples=4)
    write_recipe(made, tmp_path / "recipe.yaml")
    argv = ["--recipe", str(tmp_path / "recipe.yaml"), "--max_steps=2", "--per_device_train_batch_size=32", "--use_cpu"]
    argv += ["--report_to=none", f"--cache_dir={workspace / 'cache'}", f"--output_dir={tmp_path / 'run'}"]
    assert run_script("train.py", argv) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("beware: 2 times")]
    assert line.startswith(
        "beware: 2 times the proxies' steps (2, 1 there) and 4 times their tokens a step (4096, 1024)"
    )
