"""The numbers that describe curvature, against NumPy, and that taking them changes no step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from shared.helpers import SMALL, assert_same_parameters, gpt2, llama, numpy_damping, token_rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM

import hf_so2

LR = 0.05


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, 20)).double()


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    (model(torch.randn(50, 30, generator=generator, dtype=torch.float64)) - 1).square().mean().backward()


def observed(optim: str, steps: int = 1, **settings: Any) -> tuple[nn.Module, hf_so2.SecondOrderOptimizer, nn.Module]:
    """(model, optimizer, the model before its last step) with the last step observed."""
    model, before = mlp(), mlp()
    optimizer = hf_so2.build_optimizer(optim, model, lr=LR, **settings)
    for step in range(steps):
        before.load_state_dict(model.state_dict())
        backward(model, step)
        if step == steps - 1:
            optimizer.observe_next_step()
        optimizer.step()
    return model, optimizer, before


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral", "pi", "constant"])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_factors_of_kfac_equal_numpy(rule: str, exponent: float) -> None:
    """Right after a refresh; the condition number is 1 % off at most, the rest exact."""
    _, optimizer, _ = observed(
        "kfac", 2, damping_rule=rule, damping=1e-3, exponent_a=exponent, exponent_b=exponent, norm_control="none"
    )
    numbers = optimizer.telemetry("layer")
    for name, layer in optimizer.curvature.layers.items():
        factors = {side: (layer.state[side] / layer.state["weight"]).numpy() for side in "AB"}
        damping = dict(zip("AB", numpy_damping(rule, 1e-3, factors["A"], factors["B"]), strict=True))
        for side, factor in factors.items():
            damped = factor + damping[side] * np.eye(len(factor))
            assert numbers[f"curvature/{name}/trace_{side}"] == pytest.approx(np.trace(factor), rel=1e-10)
            assert numbers[f"curvature/{name}/damping_{side}"] == pytest.approx(damping[side], rel=1e-10)
            assert numbers[f"curvature/{name}/condition_{side}"] == pytest.approx(np.linalg.cond(damped), rel=1e-2)


@pytest.mark.parametrize(
    ("optim", "settings"),
    [("shampoo", {}), ("shampoo", {"shampoo_exponent": 0.5}), ("kl_shampoo", {})],
)
def test_factors_of_shampoo_equal_numpy(optim: str, settings: dict[str, Any]) -> None:
    _, optimizer, _ = observed(optim, 2, damping=1e-3, **settings)
    numbers = optimizer.telemetry("layer")
    for name, layer in optimizer.curvature.layers.items():
        for side in "LR":
            factor = (layer.state[side] / layer.state["weight"]).numpy()
            rho = 1e-3 * np.trace(factor)
            assert numbers[f"curvature/{name}/trace_{side}"] == pytest.approx(np.trace(factor), rel=1e-10)
            assert numbers[f"curvature/{name}/damping_{side}"] == pytest.approx(rho, rel=1e-10)
            expected = np.linalg.cond(factor + rho * np.eye(len(factor)))
            assert numbers[f"curvature/{name}/condition_{side}"] == pytest.approx(expected, rel=1e-2)


def test_factors_of_soap_equal_numpy() -> None:
    """After the first step the kept bases are those of the factors; one without full rank is at the resolution."""
    _, optimizer, _ = observed("soap")
    numbers = optimizer.telemetry("layer")
    for name, layer in optimizer.curvature.layers.items():
        factors = {side: (layer.state[side] / layer.state["weight"]).numpy() for side in "LR"}
        for side, factor in factors.items():
            assert numbers[f"curvature/{name}/trace_{side}"] == pytest.approx(np.trace(factor), rel=1e-10)
        largest = 1 / (8 * np.finfo(np.float64).eps)
        assert np.linalg.matrix_rank(factors["R"]) < len(factors["R"])  # fan_in is the longer side
        assert numbers[f"curvature/{name}/condition_R"] == pytest.approx(largest)
        assert numbers[f"curvature/{name}/condition_L"] == pytest.approx(np.linalg.cond(factors["L"]), rel=1e-6)
        assert not any("damping" in key for key in numbers)


def test_muon_has_an_update_and_no_factors() -> None:
    _, optimizer, _ = observed("muon")
    found = {key.rpartition("/")[2] for key in optimizer.telemetry("layer") if key.count("/") == 2}
    assert found == {"update_rms"}


def test_blocks_of_a_weight_are_summed_up_against_numpy() -> None:
    """The traces add up to that of the whole weight's factor; condition numbers are of the worst block."""
    _, optimizer, _ = observed("shampoo", 2, damping=1e-3, block_size=16)
    _, whole, _ = observed("shampoo", damping=1e-3)
    _, first, _ = observed("shampoo", damping=1e-3, block_size=16)
    numbers, parts = optimizer.telemetry("layer"), [first.telemetry("layer"), whole.telemetry("layer")]
    for name, layer in optimizer.curvature.layers.items():
        state = {key: value.numpy() for key, value in layer.state.items()}
        prefixes = sorted({key.split("/")[0] for key in state if "/" in key})
        assert len(prefixes) == 4
        for side in "LR":
            factors = [state[f"{prefix}/{side}"] / state["weight"] for prefix in prefixes]
            rhos = [1e-3 * np.trace(factor) for factor in factors]
            worst = max(np.linalg.cond(f + rho * np.eye(len(f))) for f, rho in zip(factors, rhos, strict=True))
            trace = sum(np.trace(factor) for factor in factors)
            assert numbers[f"curvature/{name}/trace_{side}"] == pytest.approx(trace, rel=1e-10)
            assert numbers[f"curvature/{name}/damping_{side}"] == pytest.approx(np.mean(rhos), rel=1e-10)
            assert numbers[f"curvature/{name}/condition_{side}"] == pytest.approx(worst, rel=1e-2)
            cut, uncut = (each[f"curvature/{name}/trace_{side}"] for each in parts)
            assert cut == pytest.approx(uncut, rel=1e-10)


@pytest.mark.parametrize("optim", ["ekfac", "tekfac"])
def test_corrected_diagonal_equals_numpy(optim: str) -> None:
    _, optimizer, _ = observed(optim, 2, damping=1e-3)
    numbers = optimizer.telemetry("layer")
    for name, layer in optimizer.curvature.layers.items():
        s = layer.state["S"].numpy()
        rho = 1e-3 * s.sum()
        assert numbers[f"curvature/{name}/trace"] == pytest.approx(s.sum(), rel=1e-10)
        assert numbers[f"curvature/{name}/damping"] == pytest.approx(rho, rel=1e-10)
        assert numbers[f"curvature/{name}/condition"] == pytest.approx((s.max() + rho) / (s.min() + rho), rel=1e-10)


@pytest.mark.parametrize("optim", ["kfac", "foof", "ekfac", "tkfac", "tekfac"])
@pytest.mark.parametrize("norm_control", ["none", "kl_clip", "graft_adam", "spectral"])
def test_update_rms_is_that_of_the_change(optim: str, norm_control: str) -> None:
    model, optimizer, before = observed(optim, 3, norm_control=norm_control)
    numbers = optimizer.telemetry("layer")
    old = dict(before.named_parameters())
    for name, layer in optimizer.curvature.layers.items():
        change = (model.get_parameter(name) - old[name]).detach().numpy()
        assert numbers[f"curvature/{name}/update_rms"] == pytest.approx(np.sqrt((change**2).mean()), rel=1e-7)
        sides = ("",) if "S" in layer.state else ("_A",) if optim == "foof" else ("_A", "_B")
        assert {key.rpartition("/")[2] for key in numbers if f"/{name}/" in key} == {
            "update_rms",
            *(f"{quantity}{side}" for quantity in ("trace", "damping", "condition") for side in sides),
        }
    assert ("curvature/kl_clip_factor" in numbers) == (norm_control == "kl_clip")


@pytest.mark.parametrize("kappa", [1e-6, 1e6])
def test_kl_clip_factor_is_the_ratio_to_the_unclipped_step(kappa: float) -> None:
    model, optimizer, before = observed("kfac", norm_control="kl_clip", kl_clip=kappa)
    free, _, _ = observed("kfac", norm_control="none")
    lengths = [
        float((m.get_parameter("0.weight") - before.get_parameter("0.weight")).detach().norm()) for m in (model, free)
    ]
    factor = optimizer.telemetry()["curvature/kl_clip_factor"]
    assert factor == pytest.approx(lengths[0] / lengths[1], rel=1e-7)
    assert (factor == pytest.approx(1.0, rel=1e-12)) == (kappa == 1e6)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_roles_sum_up_their_layers(build: Any) -> None:
    """Means, but of condition numbers the largest and of update sizes the root mean square."""
    model = build().train()
    optimizer = hf_so2.build_optimizer("kfac", model)
    tokens = torch.stack([row["input_ids"] for row in token_rows(4)])
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.observe_next_step()
    optimizer.step()
    roles, layers = optimizer.telemetry("role"), optimizer.telemetry("layer")
    gathered: dict[str, list[float]] = {}
    for key, value in layers.items():
        if key.count("/") == 2:
            _, name, quantity = key.split("/")
            role = "attention" if "attn" in name else "mlp"
            gathered.setdefault(f"curvature/{role}/{quantity}", []).append(value)
    assert len(gathered) == 2 * 7
    for key, values in gathered.items():
        quantity = key.rpartition("/")[2]
        expected = np.mean(values)
        if quantity.startswith("condition"):
            expected = np.max(values)
        elif quantity == "update_rms":
            expected = np.sqrt(np.mean(np.square(values)))
        assert roles[key] == pytest.approx(expected, rel=1e-12)
    assert {key for key in roles if key.count("/") == 2} == gathered.keys()


def test_roles_of_bert_are_those_of_its_parts() -> None:
    """Its names say little: `output.dense` is the second half of the MLP, and the head is called `decoder`."""
    config = BertConfig(**SMALL, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = BertForMaskedLM(config).train()
    optimizer = hf_so2.build_optimizer("kfac", model, precondition_embeddings=True, precondition_head=True)
    tokens = torch.stack([row["input_ids"] for row in token_rows(4)])
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    numbers = optimizer.telemetry("role")
    parts = {
        "attention": ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
        "mlp": ["intermediate.dense", "output.dense"],
    }
    names = {role: [f"bert.encoder.layer.0.{part}" for part in found] for role, found in parts.items()}
    names |= {"embedding": ["bert.embeddings.word_embeddings"], "head": ["cls.predictions.decoder"]}
    names["other"] = ["cls.predictions.transform.dense"]
    preconditioned = {entry.name for entry in optimizer.coverage().parameters if entry.algorithm == "kfac"}
    assert preconditioned == {f"{name}.weight" for found in names.values() for name in found}
    for role, found in names.items():
        states = [optimizer.curvature.layers[f"{name}.weight"].state for name in found]
        totals = [s["A"].sum() if role == "embedding" else s["A"].trace() for s in states]
        traces = [float(total / s["weight"]) for total, s in zip(totals, states, strict=True)]
        assert numbers[f"curvature/{role}/trace_A"] == pytest.approx(np.mean(traces), rel=1e-6)
    assert {key.split("/")[1] for key in numbers if key.count("/") == 2} == names.keys()


def test_counts_of_what_went_wrong_and_the_time_of_a_refresh() -> None:
    model, optimizer, _ = observed("kfac", 2)
    backward(model)
    model[0].weight.grad.fill_(math.nan)
    optimizer.observe_next_step()
    optimizer.step()
    numbers = optimizer.telemetry()
    assert numbers["curvature/skipped_steps"] == 1
    assert numbers["curvature/failed_refreshes"] == numbers["curvature/dropped_statistics"] == 0
    assert numbers["curvature/refresh_seconds"] > 0


def test_sizes_of_another_step_are_not_passed_off_as_those_of_the_last() -> None:
    model, optimizer, _ = observed("kfac", 2)
    assert "curvature/other/update_rms" in optimizer.telemetry()
    backward(model)
    optimizer.step()
    assert "curvature/other/update_rms" not in optimizer.telemetry()


def test_before_the_first_step_and_without_curvature_there_is_nothing_to_tell() -> None:
    keys = hf_so2.build_optimizer("kfac", mlp()).telemetry().keys()
    assert {key.count("/") for key in keys} == {1}
    assert hf_so2.build_optimizer("adamw", mlp()).telemetry() == {}
    with pytest.raises(hf_so2.ConfigurationError, match=r"^by='layers': must be one of role, layer"):
        hf_so2.build_optimizer("kfac", mlp()).telemetry("layers")


class Operations(TorchDispatchMode):
    """Every operation of torch by name, reads by the host (`_local_scalar_dense`) among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm_control", ["none", "kl_clip", "spectral"])
def test_an_observed_step_reads_nothing_back_and_changes_nothing(norm_control: str) -> None:
    """It computes a few norms more and hands none of them to the host; the step after it is an ordinary one again."""
    models, operations = (mlp(), mlp()), []
    for model, watched in zip(models, (False, True), strict=True):
        optimizer = hf_so2.build_optimizer("kfac", model, norm_control=norm_control)
        for step in range(4):
            backward(model, step)
            if watched and step == 2:
                optimizer.observe_next_step()
            with Operations() as mode:
                optimizer.step()
            operations.append(mode.names)
            if watched:
                optimizer.telemetry("layer")
    assert_same_parameters(*models)
    plain, observed_steps = operations[:4], operations[4:]
    assert [a == b for a, b in zip(plain, observed_steps, strict=True)] == [True, True, False, True]
    reads = [[name for name in names if "_local_scalar_dense" in name] for names in (plain[2], observed_steps[2])]
    assert reads[0] == reads[1]
