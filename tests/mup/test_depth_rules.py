"""What follows from the depth: for rates, damping and decay of every method, exactly; and for the stream's change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_so2 import build_optimizer, scale_depth
from hf_so2.mup import MupReport, ParameterWidth, rules
from hf_so2.mup.coord_run import synthetic_batches
from hf_so2.mup.patch import _APPLIED

CONSTANT = {"damping_rule": "constant", "damping": 0.1}
PI = {"damping_rule": "pi", "damping": 0.01}
PLAIN = {"norm_control": "none", "lr": 0.05}
# Adam's epsilon is far from negligible, and so is the decay.
COMMON = {"adam_epsilon": 0.02, "weight_decay": 0.1, "fallback_learning_rate": 0.01}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw_mup", {"lr": 0.01, "adam_epsilon": 0.02, "weight_decay": 0.1}),
    "sgd": ("sgd_mup", {"lr": 0.1, "weight_decay": 0.1}),
    "muon": ("muon_mup", {"lr": 0.02, **COMMON}),
    "soap": ("soap_mup", {"lr": 0.02, **COMMON}),
    "kl_shampoo": ("kl_shampoo_mup", {"lr": 0.02, **CONSTANT, **COMMON}),
    "kfac, a side's root": ("kfac_mup", {**PLAIN, **CONSTANT, **COMMON, "exponent_a": 0.5, "exponent_b": 0.5}),
    "kfac, trace": ("kfac_mup", {**PLAIN, "damping_rule": "trace", "damping": 0.1, **COMMON}),
    "kfac, spectral": ("kfac_mup", {"lr": 0.05, **CONSTANT, **COMMON}),
    "kfac, grafted": ("kfac_mup", {"lr": 0.01, "norm_control": "graft_sgd", **CONSTANT, **COMMON}),
    **{name: (f"{name}_mup", {**PLAIN, **CONSTANT, **COMMON}) for name in ("kfac", "ekfac", "tkfac", "tekfac", "foof")},
    **{f"{name}, pi": (f"{name}_mup", {**PLAIN, **PI, **COMMON}) for name in ("kfac", "tkfac", "ekfac", "shampoo")},
    "kl_shampoo, pi": ("kl_shampoo_mup", {"lr": 0.02, **PI, **COMMON}),
    "shampoo": ("shampoo_mup", {**PLAIN, **CONSTANT, **COMMON}),
}
DEPTH = 4.0


def trained(name: str, depth: float, settings: dict[str, Any]) -> list[Tensor]:
    """Two steps of a model that is all inside of a branch, where gradients are `1 / depth` of the base's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    widths = {
        n: ParameterWidth("hidden" if p.ndim > 1 else "vector", 1, 1, depth=depth) for n, p in model.named_parameters()
    }
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    vars(model)[_APPLIED] = MupReport(widths, shapes, base_width=0, width=0).to_dict()
    optimizer = build_optimizer(name, model, **settings)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = (torch.randn(12, size, generator=generator, dtype=torch.float64) for size in (5, 3))
        optimizer.zero_grad()
        ((model(inputs) - targets).square().mean() / depth).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("case", METHODS)
def test_gradients_inside_a_branch_that_shrink_with_the_depth_make_the_same_steps(case: str) -> None:
    name, settings = METHODS[case]
    for deep, base in zip(trained(name, DEPTH, settings), trained(name, 1.0, settings), strict=True):
        torch.testing.assert_close(deep, base, rtol=1e-8, atol=1e-10)


def test_the_table_of_completep() -> None:
    """Dey et al. 2025, table 1, alpha = 1: in blocks rates, decay and initial weights know no depth, epsilon does."""
    inside = ParameterWidth("hidden", 4.0, 4.0, depth=8.0)
    assert rules.learning_rate_multiplier(rules.ADAM, inside) == 1 / 4
    assert rules.weight_decay_multiplier(rules.ADAM, inside) == 4
    assert rules.damping_multiplier("adam_eps", inside) == 1 / (4 * 8)
    assert rules.init_multiplier(inside) == 4**-0.5


@pytest.mark.parametrize("kind", ["rho_A", "rho_B", "S", "lambda", "rho_L", "rho_R", "adam_eps"])
def test_damping_of_a_weight_that_carries_the_factor_knows_no_depth(kind: Any) -> None:
    assert rules.damping_multiplier(kind, ParameterWidth("hidden", 1, 1, scale_out=8.0, depth=8.0)) == 1.0


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def losses(
    base: LlamaConfig | GraniteConfig, model: PreTrainedModel, name: str, settings: dict[str, Any]
) -> list[float]:
    optimizer = build_optimizer(name, model, base_config=base, **settings)
    found = []
    for batch in synthetic_batches(base, 3, 2, 12, seed=0):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("case", METHODS)
def test_a_folded_factor_trains_as_one_outside(case: str) -> None:
    """Granite with multipliers of 1 is Llama, with a residual multiplier for the factor that Llama's weights take."""
    name, settings = METHODS[case]
    llama = LlamaConfig(num_hidden_layers=1, **SIZES)
    granite = GraniteConfig(num_hidden_layers=1, attention_multiplier=8**-0.5, **SIZES)
    deep = [
        type_(scale_depth(base, 2)).double()
        for type_, base in zip((LlamaForCausalLM, GraniteForCausalLM), (llama, granite), strict=True)
    ]
    deep[1].load_state_dict(deep[0].state_dict())
    folded, outside = (losses(base, m, name, settings) for base, m in zip((llama, granite), deep, strict=True))
    assert deep[1].config.residual_multiplier == 0.5
    assert folded == pytest.approx(outside, rel=1e-7)
    assert folded[-1] != pytest.approx(folded[0], rel=1e-3)


def stream_change(depth: int, name: str, settings: dict[str, Any], seed: int = 0) -> float:
    """How much eight steps change the stream behind the last layer, root mean square."""
    base = LlamaConfig(
        num_hidden_layers=2, **{**SIZES, "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.1}
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(scale_depth(base, depth))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10)  # of about the stream's own size at every depth
    optimizer = build_optimizer(name, model, **settings, **({"base_config": base} if name.endswith("_mup") else {}))
    batches = synthetic_batches(base, 8, 8, 32, seed)
    stream: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda *inner: stream.append(inner[2].detach().double()))
    with torch.no_grad():
        model(input_ids=batches[0])
    before = stream[-1]
    for batch in batches:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        model(input_ids=batches[0])
    return float((stream[-1] - before).square().mean().sqrt())


def slope(depths: tuple[int, ...], name: str, settings: dict[str, Any], seeds: int) -> float:
    """The exponent of the depth in the stream's change, by least squares on logarithms."""
    logs = [sum(math.log(stream_change(d, name, settings, s)) for s in range(seeds)) / seeds for d in depths]
    x = torch.tensor([math.log(depth) for depth in depths], dtype=torch.float64)
    x = x - x.mean()
    return float(x @ torch.tensor(logs, dtype=torch.float64) / (x @ x))


RUNS: dict[str, dict[str, Any]] = {
    "kfac": {"lr": 0.05, "fallback_learning_rate": 0.005},
    "muon": {"lr": 0.02, "fallback_learning_rate": 0.005},
    "kl_shampoo": {"lr": 0.02, "fallback_learning_rate": 0.005},
    "adamw": {"lr": 0.005},
}


def test_the_streams_change_is_level_over_the_depth() -> None:
    assert abs(slope((2, 8), "kfac_mup", RUNS["kfac"], seeds=1)) < 0.1
    assert slope((2, 8), "kfac", RUNS["kfac"], seeds=1) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_streams_change_is_level_from_2_to_16_layers(name: str) -> None:
    depths = (2, 4, 8, 16)
    assert abs(slope(depths, f"{name}_mup", RUNS[name], seeds=2)) < 0.1
    assert slope(depths, name, RUNS[name], seeds=2) > 0.3
