"""The batch split changes neither factors nor updates: one global batch of 16, cut up in different ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import (
    captured_factors,
    dense_factors,
    gpt2,
    in_float64,
    llama,
    optimizer_of,
    relative_error,
    rows_that_count,
    token_rows,
    trained,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_so2
from hf_so2.layers.sums import Captured, Readers

MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2}
WHOLE = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


def assert_same_training(
    first: hf_so2.SecondOrderTrainer, second: hf_so2.SecondOrderTrainer, *, tolerance: float
) -> None:
    """Factors and parameters agree in the Frobenius norm, one by one.

    The bias of keys shifts all scores of a query alike, so its gradient is zero but for round-off, which AdamW would
    blow up: it is left out of comparisons in low precision.
    """
    factors = captured_factors(optimizer_of(first))
    for name, expected in captured_factors(optimizer_of(second)).items():
        for key in expected:
            assert relative_error(factors[name][key], expected[key]) < tolerance, (name, key)
    parameters = dict(first.model.named_parameters())
    for name, expected_parameter in second.model.named_parameters():
        if tolerance < 1e-9 or not name.endswith("c_attn.bias"):
            assert relative_error(parameters[name], expected_parameter) < tolerance, name


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", MODELS)
def test_accumulation_equals_one_batch(family: str, padded: bool, tmp_path: Path) -> None:
    """In float32, with a damping that multiplies round-off by a hundred rather than a thousand."""
    rows = token_rows(padded=padded)
    runs = [trained(MODELS[family](), rows, tmp_path, damping=1e-2, **split) for split in (WHOLE, SPLIT)]
    assert optimizer_of(runs[0]).steps == optimizer_of(runs[1]).steps == 3
    assert_same_training(*runs, tolerance=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_accumulation_in_float64_agrees_to_round_off(family: str, tmp_path: Path) -> None:
    """With the default damping, and no tolerance of float32 to hide a small wrong factor."""
    rows = token_rows(padded=True)
    runs = [trained(in_float64(MODELS[family]()), rows, tmp_path, **split) for split in (WHOLE, SPLIT)]
    assert_same_training(*runs, tolerance=1e-12)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool, tmp_path: Path) -> None:
    rows = token_rows(padded=True)
    plain = trained(MODELS[family](), rows, tmp_path, **SPLIT)
    checkpointed = trained(
        MODELS[family](),
        rows,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        **SPLIT,
    )
    assert checkpointed.model.is_gradient_checkpointing
    assert_same_training(checkpointed, plain, tolerance=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_trainer_factors_are_the_dense_ones(family: str, tmp_path: Path) -> None:
    """One step of 4 micro-batches: `B` averages over tokens with a label, `A` over those that a loss depends on."""
    rows = token_rows(16, padded=True)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    reference = in_float64(MODELS[family]()).train()

    class WithMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = reference

        def forward(self, tokens: torch.Tensor) -> Any:
            return self.model(input_ids=tokens, attention_mask=batch["attention_mask"]).logits

    def loss_sum(logits: torch.Tensor, data: Any) -> torch.Tensor:
        shifted, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        return nn.functional.cross_entropy(shifted, labels, ignore_index=-100, reduction="sum")

    wrapped = WithMask()
    layers = {
        f"{name.removeprefix('model.')}.weight": module
        for name, module in wrapped.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lm_head" not in name
    }
    dense = dense_factors(wrapped, layers, loss_sum, (batch["input_ids"],))
    counted, present = rows_that_count(dense), batch["attention_mask"].flatten().bool()
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    assert tokens < int(present.sum()) < present.numel()

    trainer = trained(in_float64(MODELS[family]()), rows, tmp_path, max_steps=1, **SPLIT)
    captured = captured_factors(optimizer_of(trainer))
    for name, expected in dense.items():
        assert not bool((counted[name] & ~present).any())
        h, delta = expected.inputs[counted[name]], expected.deltas
        assert relative_error(captured[name]["A"], h.T @ h / len(h)) < 1e-10, name
        # The Trainer's loss of float64 logits is computed in float32.
        assert relative_error(captured[name]["B"], delta.T @ delta / tokens) < 1e-5, name


@pytest.mark.parametrize("family", MODELS)
def test_bf16_is_close_to_fp32(family: str, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits: factors of the first step agree within 2 %, and statistics stay in float32."""
    rows = token_rows(16)
    full, low = (trained(MODELS[family](), rows, tmp_path, max_steps=1, bf16=bf16) for bf16 in (False, True))
    expected = captured_factors(optimizer_of(full))
    for name, factors in captured_factors(optimizer_of(low)).items():
        for key, value in factors.items():
            assert value.dtype == torch.float32
            assert relative_error(value, expected[name][key]) < 2e-2, (name, key)


def test_bf16_parameters_end_near_fp32(tmp_path: Path) -> None:
    rows = token_rows()
    full, low = (trained(llama(), rows, tmp_path, bf16=bf16, **SPLIT) for bf16 in (False, True))
    expected = dict(full.model.named_parameters())
    for name, parameter in low.model.named_parameters():
        assert parameter.dtype == torch.float32
        start = dict(llama().named_parameters())[name]
        moved = torch.linalg.vector_norm(expected[name] - start)
        assert torch.linalg.vector_norm(parameter - expected[name]) < 0.3 * moved, name


def count_captures(optimizer: hf_so2.SecondOrderOptimizer) -> list[str]:
    """Names of the layers whose statistics are summed from now on, one entry per call."""
    assert optimizer.curvature is not None
    seen: list[str] = []
    summation = optimizer.curvature.capture.summation
    total = summation.sum

    def counting(readers: Readers, into: Captured) -> None:
        seen.extend(readers.gradients)
        total(readers, into)

    summation.sum = counting  # type: ignore[method-assign]
    return seen


def test_nothing_is_captured_without_a_backward_pass_and_off_update_steps() -> None:
    model = llama().train()
    optimizer = hf_so2.build_optimizer("kfac", model, factor_update_steps=5, preconditioner_update_steps=5)
    seen = count_captures(optimizer)
    tokens = torch.stack([row["input_ids"] for row in token_rows(2)])

    model.eval()
    model(input_ids=tokens, labels=tokens)
    model.generate(tokens[:, :3], max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        model.train()(input_ids=tokens)
    assert not seen
    assert not optimizer.curvature.capture.take().layers

    captured: dict[int, set[str]] = {}
    for step in range(1, 19):
        optimizer.zero_grad()
        seen.clear()
        model(input_ids=tokens, labels=tokens).loss.backward()
        captured[step] = set(seen)
        assert len(seen) == len(captured[step])
        optimizer.step()
    layers = set(optimizer.curvature.layers)
    assert [step for step in range(1, 8) if captured[step] == layers] == [1, 2, 4, 7]
    # Each has its turn within five steps, and no step is all of them.
    assert sorted(name for step in range(14, 19) for name in captured[step]) == sorted(layers)
    assert all(captured[step] != layers for step in range(14, 19))
