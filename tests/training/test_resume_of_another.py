"""A checkpoint of another optimizer or model is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared.helpers import arguments, llama, token_rows

import hf_so2


@pytest.mark.parametrize(("optim", "width"), [("shampoo", 16), ("adamw_torch", 16), ("kfac", 32)])
def test_a_checkpoint_that_does_not_fit_is_refused(optim: str, width: int, tmp_path: Path) -> None:
    rows = token_rows(16)
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    first = hf_so2.SecondOrderTrainer(
        model=llama(), args=arguments(tmp_path / "first", optim="kfac", **saving), train_dataset=rows
    )
    first.train()
    other = hf_so2.SecondOrderTrainer(
        model=llama(width), args=arguments(tmp_path / "other", optim=optim, max_steps=2), train_dataset=rows
    )
    with pytest.raises(hf_so2.ConfigurationError, match=r"^resume_from_checkpoint=.*is of another") as refused:
        other.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert "\n" not in str(refused.value)
