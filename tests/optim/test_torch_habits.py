"""What users of torch do with models and optimizers beside training them: copy, save, rebuild, compile, extend."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from shared.helpers import assert_same_parameters, llama
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import hf_so2
from hf_so2.errors import ConfigurationError

TOKENS = torch.arange(40).reshape(4, 10) * 7 % 17
INPUTS = torch.linspace(-1, 1, 60).reshape(10, 6).cos()


def train(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def captured_rows(optimizer: hf_so2.SecondOrderOptimizer) -> set[int]:
    assert optimizer.curvature is not None
    return {int(sums.rows) for sums in optimizer.curvature.capture.take().layers.values()}


class Mlp(nn.Module):
    """Calls its layers by position or by keyword."""

    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.by_keyword = by_keyword
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_keyword:
            return self.second(input=torch.tanh(self.first(input=x)))
        return self.second(torch.tanh(self.first(x)))


def mlp(*, by_keyword: bool = False) -> Mlp:
    torch.manual_seed(0)
    return Mlp(by_keyword)


def fit(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model(INPUTS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_so2")]


def test_layers_called_by_keyword_are_captured_all_the_same() -> None:
    models = mlp(), mlp(by_keyword=True)
    for model in models:
        fit(model, hf_so2.build_optimizer("kfac", model))
    assert_same_parameters(*models)


def test_a_model_in_evaluation_mode_trains_as_one_in_training_mode() -> None:
    """`from_pretrained` returns it that way, and nothing else differs where there is no dropout."""
    models = llama().train(), llama().eval()
    for model in models:
        train(model, hf_so2.build_optimizer("kfac", model))
    assert_same_parameters(*models)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: AveragedModel(model).module], ids=["deepcopy", "ema"])
def test_what_a_copy_of_the_model_sees_is_not_captured(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = llama()
    optimizer = hf_so2.build_optimizer("kfac", model)
    other = copied(model)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    other(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert max(captured_rows(optimizer)) == TOKENS[:, 1:].numel()


def test_a_model_can_be_saved_whole() -> None:
    model = llama()
    optimizer = hf_so2.build_optimizer("kfac", model)
    train(model, optimizer)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same_parameters(model, loaded)
    train(loaded, hf_so2.build_optimizer("kfac", loaded), steps=1)


def test_the_hooks_of_an_optimizer_go_with_it() -> None:
    model = llama()

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    optimizer = hf_so2.build_optimizer("kfac", model)
    count = hooks()
    assert optimizer.curvature is not None
    assert count == len(optimizer.curvature.layers) + 4  # the decoder, the head, the model before and after a call
    optimizer = hf_so2.build_optimizer("kfac", model)
    gc.collect()
    assert hooks() == count
    del optimizer
    gc.collect()
    assert hooks() == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_an_optimizer_refuses_to_be_copied(copied: Callable[[object], object]) -> None:
    """Torch's own copies hold groups and state alone, and would fail at their first step."""
    optimizer = hf_so2.build_optimizer("kfac", llama())
    with pytest.raises(TypeError, match="state_dict"):
        copied(optimizer)


def test_further_groups_are_refused_when_they_are_added() -> None:
    model = mlp()
    model.first.requires_grad_(False)
    optimizer = hf_so2.build_optimizer("kfac", model)
    with pytest.raises(ConfigurationError, match=r"param_group=\['first.weight'\]: .*build_optimizer"):
        optimizer.add_param_group({"params": [("first.weight", model.first.weight)]})
    with pytest.raises(ConfigurationError, match="build_optimizer"):
        optimizer.add_param_group({"params": model.first.weight})
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == 2


@pytest.mark.parametrize("not_a_model", [list(nn.Linear(2, 2).parameters()), None])
def test_parameters_are_no_model(not_a_model: object) -> None:
    with pytest.raises(ConfigurationError, match=r"model='(list|NoneType)': must be a torch.nn.Module"):
        hf_so2.build_optimizer("kfac", not_a_model)  # type: ignore[arg-type]


class SavedWhole(nn.Module):
    """What PEFT puts in the place of a module of `modules_to_save`: the frozen original beside a copy to be trained."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original)})
        self.original_module = original.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_to_save["default"](x)


@pytest.mark.parametrize("extent", [{}, {"precondition_embeddings": True, "precondition_head": True}])
def test_a_head_and_an_embedding_that_peft_has_wrapped_are_still_those(extent: dict[str, bool]) -> None:
    model = llama()
    model.lm_head, model.model.embed_tokens = SavedWhole(model.lm_head), SavedWhole(model.model.embed_tokens)
    optimizer = hf_so2.build_optimizer("kfac", model, **extent)
    train(model, optimizer, steps=1)
    rows = {entry.name: entry for entry in optimizer.coverage().parameters}
    head, embedding = (rows[f"{name}.modules_to_save.default.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert {head.algorithm, embedding.algorithm} == {"kfac" if extent else "adamw"}
    if not extent:
        assert (head.reason, embedding.reason) == ("the output head", "an embedding")
        return
    assert optimizer.curvature is not None
    assert "B" not in optimizer.curvature.layers[head.name].state  # nothing of the size of the vocabulary squared
    assert optimizer.curvature.layers[embedding.name].state["A"].ndim == 1


def test_compiled_after_the_optimizer_was_built_it_trains_as_before() -> None:
    torch._dynamo.reset()
    models = mlp(), mlp()
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = hf_so2.build_optimizer("kfac", model)
        fit(torch.compile(model, backend="eager") if compiled else model, optimizer)
    assert_same_parameters(*models)


def test_weights_that_are_not_captured_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    compiled(INPUTS).square().mean().backward()
    model.zero_grad()
    optimizer = hf_so2.build_optimizer("kfac", model)  # too late: what has been compiled calls no hooks
    fit(compiled, optimizer)
    (message,) = warnings_of(caplog)
    assert "2 weights" in message
    assert "compiled before" in message
    assert "first.weight" in message
    assert "kfac" not in {entry.algorithm for entry in optimizer.coverage().parameters}


def test_nobody_is_warned_of_weights_that_have_no_gradient(caplog: pytest.LogCaptureFixture) -> None:
    """Idle experts; and a step with gradients of zero, as FSDP2's way of saving makes."""
    model = mlp()
    for zero_gradients in (False, True):
        optimizer = hf_so2.build_optimizer("kfac", model)
        model.first.weight.grad = torch.zeros_like(model.first.weight) if zero_gradients else None
        optimizer.step()
    assert not warnings_of(caplog)
