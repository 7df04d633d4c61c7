"""What faults once did to a step, each as a test: overflow of a second moment, LAPACK in mid-step, a torn step."""

from __future__ import annotations

import copy
import gc
import os
import signal
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_so2

# Finite in float32, and its square is not.
HUGE = 2e19


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    (model(torch.randn(20, 6, generator=generator)) - 1).square().mean().backward()


def values(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    tree = {"model": model.state_dict(), "state": state["state"], "curvature": state["curvature"]["curvature"]}
    return copy.deepcopy(tree)


def assert_equal(first: Any, second: Any, path: str = "") -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}/{key}")
    else:
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second)), path


@pytest.mark.parametrize("name", ["adamw", "kfac", "shampoo", "muon"])
def test_a_gradient_whose_square_overflows_skips_the_step(name: str) -> None:
    """The bias is AdamW's; its second moment would be infinite from here on and nothing would ever move it again."""
    model = mlp()
    optimizer = hf_so2.build_optimizer(name, model)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
    before = values(model, optimizer)
    backward(model, 3)
    model.get_parameter("2.bias").grad[1] = HUGE
    optimizer.step()
    assert_equal(values(model, optimizer), before)
    assert (optimizer.steps, optimizer.skipped_steps) == (3, 1)
    bias = model.get_parameter("2.bias").detach().clone()
    backward(model, 4)
    optimizer.step()
    assert (model.get_parameter("2.bias") != bias).all()


def test_a_gradient_just_in_range_is_stepped_on_as_in_torch() -> None:
    model, reference = mlp(), mlp()
    optimizer = hf_so2.build_optimizer("adamw", model, lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.999)
        group["weight_decay"] = 0.1
    for seed in range(3):
        for trained, stepper in ((model, optimizer), (reference, adamw)):
            backward(trained, seed)
            if seed == 1:
                trained.get_parameter("2.bias").grad[1] = 1.8e19
            stepper.step()
    assert optimizer.skipped_steps == 0
    for (key, value), expected in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_sum_of_momentum_never_overflows(momentum: float) -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = hf_so2.build_optimizer("sgd", model, lr=1.0, momentum=momentum)
    for _ in range(15):
        model.weight.grad = torch.full_like(model.weight, 1e38)
        optimizer.step()
        assert all(
            torch.isfinite(x).all() for state in optimizer.state.values() for x in state.values() if x is not None
        )
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 15)


def no_convergence(*_: Any, **__: Any) -> Tensor:
    raise torch.linalg.LinAlgError("made to fail")


@pytest.mark.parametrize("routine", ["qr", "eigvalsh"])
@pytest.mark.parametrize("name", ["kfac", "shampoo", "soap"])
def test_lapack_failing_in_norm_control_leaves_that_update_out(
    name: str, routine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = hf_so2.build_optimizer(name, model, norm_control="spectral", fallback_learning_rate=0.01)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
    weight, bias = (model.get_parameter(key).detach().clone() for key in ("0.weight", "0.bias"))
    backward(model, 3)
    monkeypatch.setattr(torch.linalg, routine, no_convergence)
    optimizer.step()
    monkeypatch.undo()
    assert torch.equal(model.get_parameter("0.weight"), weight)
    assert not torch.equal(model.get_parameter("0.bias"), bias)
    layers = optimizer.curvature.layers
    assert [int(layer.overflows) for layer in layers.values()] == [1, 1]
    assert (optimizer.steps, optimizer.skipped_steps) == (4, 0)
    backward(model, 4)
    optimizer.step()
    assert not torch.equal(model.get_parameter("0.weight"), weight)


def test_what_is_logged_of_a_failure_keeps_no_weights_alive(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that keeps its records, as one with a queue does, would keep what an error's frames refer to."""
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, norm_control="spectral")
    backward(model)
    monkeypatch.setattr(torch.linalg, "qr", no_convergence)
    optimizer.step()
    monkeypatch.undo()
    assert caplog.records
    gone = [weakref.ref(weight) for weight in model.parameters()]
    del model, optimizer
    gc.collect()
    assert [weight() for weight in gone] == [None] * 4


def test_lapack_failing_once_is_made_good_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [mlp(), mlp()]
    optimizers = [hf_so2.build_optimizer("kfac", model, norm_control="spectral") for model in models]
    qr = torch.linalg.qr

    def in_float64_only(matrix: Tensor) -> Any:
        return no_convergence() if matrix.dtype == torch.float32 else qr(matrix)

    for model, optimizer in zip(models, optimizers, strict=True):
        backward(model)
        optimizer.step()
        monkeypatch.setattr(torch.linalg, "qr", in_float64_only)
    for (key, value), expected in zip(models[1].state_dict().items(), models[0].state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=key)


@pytest.fixture
def _listens_to_ctrl_c() -> Iterator[None]:
    """Processes that a shell starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_listens_to_ctrl_c")
def test_ctrl_c_in_a_step_is_raised_once_the_step_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [mlp(), mlp()]
    optimizers = [hf_so2.build_optimizer("kfac", model, fallback_learning_rate=0.01) for model in models]
    backward(models[0])
    optimizers[0].step()
    eigvalsh = torch.linalg.eigvalsh

    def interrupted(matrix: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.undo()
        return eigvalsh(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", interrupted)
    backward(models[1])
    with pytest.raises(KeyboardInterrupt):
        optimizers[1].step()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_equal(values(models[1], optimizers[1]), values(models[0], optimizers[0]))


def test_an_error_after_weights_have_moved_says_so_and_nothing_goes_on_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model, fallback_learning_rate=0.01)
    backward(model)
    optimizer.step()
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("made to fail")

    backward(model, 1)
    monkeypatch.setattr("hf_so2.engine.fallback.adamw", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        optimizer.step()
    monkeypatch.undo()
    assert "step 2 was broken off when some weights had moved" in caught.value.__notes__[0]
    backward(model, 2)
    for go_on in (optimizer.step, optimizer.state_dict, optimizer.curvature_state_dict):
        with pytest.raises(hf_so2.BrokenStepError, match="load a checkpoint"):
            go_on()

    reference = mlp()
    straight = hf_so2.build_optimizer("kfac", reference, fallback_learning_rate=0.01)
    for trained, stepper in ((model, optimizer), (reference, straight)):
        trained.load_state_dict(copy.deepcopy(saved["model"]))
        stepper.load_state_dict(copy.deepcopy(saved["optimizer"]))
        backward(trained, 1)
        stepper.step()
    assert_equal(values(model, optimizer), values(reference, straight))


def test_an_error_before_any_weight_moved_lets_training_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model)
    before = copy.deepcopy(model.state_dict())

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("made to fail")

    backward(model)
    monkeypatch.setattr(optimizer.curvature, "refresh", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        optimizer.step()
    monkeypatch.undo()
    assert "training can go on" in caught.value.__notes__[0]
    assert_equal(dict(model.state_dict()), dict(before))
    assert optimizer.steps == 0
    backward(model, 1)
    optimizer.step()
    assert optimizer.steps == 1


def test_a_step_that_one_of_several_processes_breaks_off_is_not_said_to_be_harmless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others may have made it, so that what is left is of two steps."""
    model = mlp()
    optimizer = hf_so2.build_optimizer("kfac", model)
    backward(model)
    monkeypatch.setattr("hf_so2.optim.whole.world", lambda: (0, 2))
    monkeypatch.setattr(optimizer.curvature, "refresh", no_convergence)
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        optimizer.step()
    (note,) = caught.value.__notes__
    assert "training can go on" not in note
    assert "start all of them anew from a checkpoint" in note
