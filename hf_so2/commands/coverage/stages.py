"""The stages that a family goes through, from its tiny base to a model that was trained, saved and loaded."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_so2.errors import ConfigurationError
from hf_so2.mup import MupReport, apply_mup, infer_widths, read_mup, scale_depth, scale_width
from hf_so2.mup.rules import init_multiplier
from hf_so2.optim import build_optimizer

from .tasks import Task

STAGES = ("built", "scales", "classifies", "patches", "initialises", "trains", "reloads")
MULTIPLIER = 2


@dataclass
class Family:
    """How far one model type got.

    Args:
        model_type: key of the task's mapping.
        passed: stages passed, in order.
        outcome: `ok`, `refused` (a ConfigurationError), `transformers` (the unpatched model fails alike) or `crash`.
        reason: the message that ended it.
        roles: number of parameters by role.
        notes: what apply_mup did beside rescaling.
        depth: `yes` if the same stages go well at twice the depth, or why not; empty if that was not tried.
    """

    model_type: str
    passed: list[str] = field(default_factory=list)
    outcome: str = "ok"
    reason: str = ""
    roles: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    depth: str = ""


def examine(task: Task, model_type: str) -> Family:
    """Takes one type through all stages; never raises for what a family does."""
    family = Family(model_type)
    try:
        base_model = task.build(task.config(model_type))
    except Exception as error:  # noqa: BLE001 - whatever a family's own code raises is its outcome
        family.outcome, family.reason = "transformers", _one_line(error)
        return family
    family.passed.append("built")
    try:
        _examine(task, family, base_model.config, type(base_model))
    except ConfigurationError as error:
        family.outcome, family.reason = "refused", _one_line(error)
    except Exception as error:  # noqa: BLE001 - a crash is what this script looks for
        family.outcome, family.reason = "crash", _one_line(error)
    if family.outcome != "ok" and _fails_unpatched(task, base_model, family.passed[-1]):
        family.outcome = "transformers"
    if family.outcome == "ok":
        _examine_depth(task, family, base_model.config, type(base_model))
    return family


def _examine_depth(task: Task, family: Family, base: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
    try:
        torch.manual_seed(0)
        model = model_class(scale_depth(base, multiplier=MULTIPLIER))
        report = apply_mup(model, base)
        train_one_step(task, model, base)
        check_reload(task, model)
    except ConfigurationError as error:
        family.depth = _one_line(error)
    except Exception as error:  # noqa: BLE001 - as above
        family.outcome, family.reason = "crash", f"at twice the depth: {_one_line(error)}"
    else:
        family.depth = "yes" if report.depth else "not deeper"


def _examine(task: Task, family: Family, base: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
    config = scale_width(base, multiplier=MULTIPLIER)
    family.passed.append("scales")
    torch.manual_seed(0)
    model = model_class(config)
    family.roles = dict(Counter(width.role for width in infer_widths(model, base).values()))
    if not family.roles.get("hidden"):
        raise ConfigurationError("model_type", family.model_type, "has no hidden weight that grows with the width")
    family.passed.append("classifies")
    report = apply_mup(model, base)
    family.notes = list(report.notes)
    family.passed.append("patches")
    check_initialisation(model, base, report)
    family.passed.append("initialises")
    train_one_step(task, model, base)
    family.passed.append("trains")
    check_reload(task, model)
    family.passed.append("reloads")


def check_initialisation(model: PreTrainedModel, base: PretrainedConfig, report: MupReport) -> None:
    """Compares standard deviations with those of a freshly drawn base model, times the table's factor."""
    torch.manual_seed(1)
    base_weights = dict(type(model)(base).named_parameters())
    for name, parameter in model.named_parameters():
        width, before = report[name], base_weights[name]
        if width.role not in ("input", "hidden", "output") or parameter.ndim < 2:
            continue
        wanted = _deviation(before) * init_multiplier(width)
        sampling = 5 * math.sqrt(0.5 / parameter.numel() + 0.5 / before.numel())
        if wanted > 0 and abs(math.log(max(_deviation(parameter), 1e-30) / wanted)) > sampling + 0.02:
            raise AssertionError(f"{name} has standard deviation {_deviation(parameter):.4g} instead of {wanted:.4g}")


def _deviation(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def train_one_step(task: Task, model: PreTrainedModel, base: PretrainedConfig | None) -> None:
    """One step on random inputs; without a base in the standard parametrization."""
    optimizer = build_optimizer("adamw" if base is None else "adamw_mup", model, base_config=base, lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    loss = task.loss(model)
    loss.backward()
    optimizer.step()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    if not torch.isfinite(loss) or not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise AssertionError(f"loss {float(loss):.4g}, or a parameter, is not finite after one step")
    if not moved:
        raise AssertionError("no parameter moved in one step")


def check_reload(task: Task, model: PreTrainedModel) -> None:
    """Saves, loads with plain transformers and compares logits; the record must come along."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = task.loader(model).from_pretrained(folder)
    saved_logits, loaded_logits = _logits(task, model), _logits(task, loaded)
    difference = float((saved_logits - loaded_logits).abs().max())
    if difference > 1e-6 * float(saved_logits.abs().max()):
        raise AssertionError(f"logits differ by {difference:.3g} after a reload")
    if "so2_mup" in vars(model.config) and read_mup(loaded) != read_mup(model):
        raise AssertionError("the record is lost in a reload")


def _logits(task: Task, model: PreTrainedModel) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        return task.outputs(model)[0]


def _fails_unpatched(task: Task, model: PreTrainedModel, last_passed: str) -> bool:
    """Whether the family's own model fails where the patched one did."""
    try:
        if last_passed in ("patches", "initialises"):
            train_one_step(task, model, None)
        elif last_passed == "trains":
            check_reload(task, model)
        elif last_passed == "classifies":
            _logits(task, model)
        else:
            return False
    except Exception:  # noqa: BLE001 - the question is only whether it fails
        return True
    return False


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {text}"[:200]
