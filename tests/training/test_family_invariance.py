"""Every method of the K-FAC family trains alike however a batch is cut up, recomputed, compiled or rounded.

`test_split_invariance.py` looks at K-FAC and at the captured factors more closely; here all five are compared with
their plain run, statistics, bases and parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import in_float64, llama, optimizer_of, relative_error, token_rows, trained
from torch import nn

import hf_so2

METHODS = ["kfac", "foof", "ekfac", "tkfac", "tekfac"]
WHOLE: dict[str, Any] = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
SPLIT: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
EVERY_STEP: dict[str, Any] = {"max_steps": 3, "factor_update_steps": 1}


def tiny() -> nn.Module:
    return in_float64(llama(num_hidden_layers=1))


def run(optim: str, folder: Path, model: nn.Module | None = None, **changes: Any) -> hf_so2.SecondOrderTrainer:
    model = tiny() if model is None else model
    return trained(model, token_rows(48, padded=True), folder, optim=optim, **(SPLIT | EVERY_STEP | changes))


def assert_same_training(
    first: hf_so2.SecondOrderTrainer, second: hf_so2.SecondOrderTrainer, *, tolerance: float
) -> None:
    """Running averages and parameters, in the Frobenius norm, one by one."""
    mine, theirs = (optimizer_of(trainer).curvature.layers for trainer in (first, second))
    assert mine.keys() == theirs.keys()
    for name, layer in mine.items():
        assert layer.updates == theirs[name].updates == 3
        for key in layer.block.statistics:
            assert relative_error(layer.state[key], theirs[name].state[key]) < tolerance, (name, key)
    expected = dict(second.model.named_parameters())
    for name, parameter in first.model.named_parameters():
        assert relative_error(parameter, expected[name]) < tolerance, name


@pytest.fixture(scope="module", params=METHODS)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """(method, its run on four micro-batches of four)."""
    return request.param, run(request.param, tmp_path_factory.mktemp(request.param))


def test_accumulation_equals_one_batch(plain: tuple[str, Any], tmp_path: Path) -> None:
    optim, trainer = plain
    assert_same_training(run(optim, tmp_path, **WHOLE), trainer, tolerance=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, plain: tuple[str, Any], tmp_path: Path) -> None:
    optim, trainer = plain
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = run(optim, tmp_path, **options)
    assert checkpointed.model.is_gradient_checkpointing
    assert_same_training(checkpointed, trainer, tolerance=1e-12)


def test_bf16_stays_near(plain: tuple[str, Any], tmp_path: Path) -> None:
    """After three steps under autocast: the change of every matrix is 0.3 of its length off at most."""
    optim, _ = plain
    full, low = (run(optim, tmp_path, llama(num_hidden_layers=1), damping=1e-2, bf16=bf16) for bf16 in (False, True))
    start, expected = dict(llama(num_hidden_layers=1).named_parameters()), dict(full.model.named_parameters())
    for name, parameter in low.model.named_parameters():
        assert parameter.dtype == torch.float32
        moved = torch.linalg.vector_norm(expected[name] - start[name])
        assert torch.linalg.vector_norm(parameter - expected[name]) < 0.3 * moved, name


@pytest.mark.slow  # compiles the model once per method
def test_compiled_model_trains_alike(plain: tuple[str, Any], tmp_path: Path) -> None:
    optim, trainer = plain
    torch._dynamo.reset()
    compiled = run(optim, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert_same_training(compiled, trainer, tolerance=1e-9)
