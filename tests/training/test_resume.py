"""Training goes on from a checkpoint bit for bit, curvature included."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import arguments, assert_same_parameters, gpt2, llama, optimizer_of, token_rows, trained
from torch import Tensor, nn
from transformers import Trainer

import hf_so2

SCHEDULE = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 20,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "save_strategy": "steps",
    "save_steps": 10,
    "save_total_limit": 2,
}


def curvature_tensors(optimizer: hf_so2.SecondOrderOptimizer) -> dict[str, Tensor]:
    assert optimizer.curvature is not None
    return {f"{name}/{key}": x for name, layer in optimizer.curvature.layers.items() for key, x in layer.state.items()}


def assert_same_optimizer(first: hf_so2.SecondOrderOptimizer, second: hf_so2.SecondOrderOptimizer) -> None:
    """Counters, curvature and per-parameter state, bit for bit."""
    assert (first.steps, first.skipped_steps) == (second.steps, second.skipped_steps)
    expected = curvature_tensors(second)
    actual = curvature_tensors(first)
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []
    pairs = zip(first.state_dict()["state"].items(), second.state_dict()["state"].items(), strict=True)
    for (index, mine), (other, theirs) in pairs:
        assert index == other
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in mine)


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (llama, {"optim": "kfac"}),
        (gpt2, {"optim": "kfac", "factor_update_steps": 3, "preconditioner_update_steps": 6}),
        (lambda: llama(32), {"optim": "kfac_mup", "mup_base_width": 16, "weight_decay": 0.1}),
    ],
    ids=["llama", "gpt2-intervals", "mup-wide"],
)
def test_twenty_steps_are_ten_and_ten(build: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path) -> None:
    rows = token_rows(48, padded=True)
    whole = trained(build(), rows, tmp_path, **SCHEDULE, **settings)
    checkpoint = tmp_path / "checkpoint-10"
    assert (checkpoint / "curvature-0-of-1.pt").is_file()
    torch.manual_seed(1234)  # the resumed run must not live on the state of this process
    resumed = trained(build(), rows, tmp_path / "again", resume=str(checkpoint), **SCHEDULE, **settings)
    assert resumed.state.global_step == 20
    assert_same_parameters(resumed.model, whole.model)
    assert_same_optimizer(optimizer_of(resumed), optimizer_of(whole))


def test_checkpoint_reloads_as_a_model_that_resumes(tmp_path: Path) -> None:
    """Resuming from weights read by `from_pretrained` must not apply μP a second time."""
    settings = {"optim": "kfac_mup", "mup_base_width": 16}
    rows = token_rows(48)
    whole = trained(llama(32), rows, tmp_path, **SCHEDULE, **settings)
    checkpoint = str(tmp_path / "checkpoint-10")
    reloaded = type(llama()).from_pretrained(checkpoint)
    resumed = trained(reloaded, rows, tmp_path / "again", resume=checkpoint, **SCHEDULE, **settings)
    assert_same_parameters(resumed.model, whole.model)


def test_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    """transformers' own Trainer saves an optimizer, but no curvature."""
    rows = token_rows(16)
    short = SCHEDULE | {"max_steps": 2, "save_steps": 2}
    Trainer(model=llama(), args=arguments(tmp_path, **short, optim="adamw_torch"), train_dataset=rows).train()
    with pytest.raises(hf_so2.ConfigurationError, match=r"resume_from_checkpoint.*curvature"):
        trained(llama(), rows, tmp_path / "again", resume=str(tmp_path / "checkpoint-2"), **short)


def test_curvature_of_another_model_is_refused(tmp_path: Path) -> None:
    narrow, wide = (hf_so2.build_optimizer("kfac", llama(width)) for width in (16, 32))
    with pytest.raises(ValueError, match=r"shape|size"):
        wide.load_state_dict(narrow.state_dict())
    with pytest.raises(ValueError, match="other layers"):
        hf_so2.build_optimizer("kfac", gpt2()).load_curvature_state_dict(narrow.curvature_state_dict())
    with pytest.raises(ValueError, match="curvature"):
        narrow.load_state_dict({k: v for k, v in narrow.state_dict().items() if k != "curvature"})


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[dict[str, Tensor]], steps: range) -> None:
    for step in steps:
        tokens = torch.stack([row["input_ids"] for row in rows[step % 8 * 4 : step % 8 * 4 + 4]])
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("cut", "intervals"), [(1, (2, 3)), (5, (2, 3)), (9, (2, 3)), (9, (4, 8))])
def test_plain_loop_continues_from_torch_save(cut: int, intervals: tuple[int, int]) -> None:
    """`state_dict` goes through a file that is read with `weights_only=True`; the cuts lie between layers' turns."""
    rows = token_rows(32)
    settings = {"lr": 0.05, **dict(zip(("factor_update_steps", "preconditioner_update_steps"), intervals, strict=True))}
    model = llama().train()
    optimizer = hf_so2.build_optimizer("kfac", model, **settings)
    plain_loop(model, optimizer, rows, range(cut))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    plain_loop(model, optimizer, rows, range(cut, 13))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = llama().train()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(saved["model"])
    fresh = hf_so2.build_optimizer("kfac", again, **settings)
    fresh.load_state_dict(saved["optimizer"])
    plain_loop(again, fresh, rows, range(cut, 13))
    assert_same_parameters(again, model)
    assert_same_optimizer(fresh, optimizer)


def test_saved_state_does_not_move_with_later_steps() -> None:
    """A loaded optimizer owns its tensors: steps after loading leave the loaded dictionary's curvature alone."""
    rows = token_rows(32)
    model = llama().train()
    optimizer = hf_so2.build_optimizer("kfac", model)
    plain_loop(model, optimizer, rows, range(2))
    saved = optimizer.state_dict()
    name = next(iter(saved["curvature"]["curvature"]["layers"]))
    snapshot = saved["curvature"]["curvature"]["layers"][name]["state"]["A"].clone()
    other_model = llama().train()
    other = hf_so2.build_optimizer("kfac", other_model)
    other.load_state_dict(saved)
    plain_loop(other_model, other, rows, range(2, 4))
    assert torch.equal(saved["curvature"]["curvature"]["layers"][name]["state"]["A"], snapshot)
