"""Wrong uses of a newcomer, each answered by one line with field, value and what is allowed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_so2
from hf_so2 import commands

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
)  # fmt: skip
LAYERS = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "quickstart", "--lr", "0.1"], "unknown argument '--lr' (did you mean 'learning_rate'?)"),
        (["train", "quickstart", "--optim", "KFAC"], "(did you mean 'kfac'?)"),
        (["train", "quickstart", "--batch_size", "8"], "(did you mean 'per_device_train_batch_size'?)"),
        (["train", "quickstart", "--report_to", "wanbd"], "report_to='wanbd': must be one of none, all"),
        (["train", "quickstart", "--lr_scheduler_kwargs", "{a"], "lr_scheduler_kwargs='{a': must be valid JSON"),
        (["train", "quickstart", "--mup_base_width", "0"], "mup_base_width=0: must be a whole number of at least 1"),
        (["grid", "quickstart", "--optim=kfac", "--grid=seed=0", "--output=."], "output='.': must be a file"),
        (["benchmark", "--num_attention_heads", "0"], "num_attention_heads=0: must be at least 1"),
        (["benchmark", "--tokens", "100"], "tokens=100: must be a multiple of sequence_length"),
        (["sweep", "quickstart", "--trials", "8"], "widths=[]: must be given, or checkpoints"),
    ],
)
def test_on_the_command_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf-so2", *argv])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: hf_so2.build_optimizer(LAYERS, "kfac"), "optim=Sequential( (0): Linear"),
        (
            lambda: hf_so2.build_optimizer("kfac", LAYERS, base_config=CONFIG),
            "base_config='LlamaConfig': has no effect on kfac; kfac_mup scales",
        ),
        (lambda: hf_so2.build_optimizer("kfac", LAYERS.parameters()), "model='generator': must be a torch.nn.Module"),
        (lambda: hf_so2.scale_width(LlamaForCausalLM(CONFIG), width=64), "config='LlamaForCausalLM': must be a"),
        (lambda: hf_so2.scale_width(64, width=64), "config='int': must be a transformers configuration"),
        (lambda: hf_so2.coordinate_check(LlamaForCausalLM(CONFIG), "kfac", [32, 64]), "base_config='LlamaForCausalLM'"),
        (
            lambda: hf_so2.SecondOrderTrainingArguments(output_dir="out", mup_base_width="64"),
            "mup_base_width='64': must be a whole number",
        ),
    ],
)
def test_in_python(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(hf_so2.ConfigurationError) as refused:
        call()
    message = str(refused.value)
    assert said in message
    assert "\n" not in message
    assert len(message) < 1000
