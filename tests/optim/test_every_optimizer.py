"""What every optimizer name has to pass, whatever its method: one suite, run for each row of the table."""

from __future__ import annotations

import copy
import io
from dataclasses import fields
from typing import Any

import pytest
import torch
from shared.helpers import BOTH_ENDS, VOCABULARY, assert_same_parameters, gpt2, llama, relative_error
from torch import Tensor, nn

import hf_so2
from hf_so2.methods.settings import Settings
from hf_so2.methods.table import METHODS

NAMES = tuple(METHODS)
DEFAULT = METHODS["kfac"].settings({})
SECOND_ORDER = tuple(name for name, method in METHODS.items() if method.block is not None)
NORM_CONTROLS = ("none", "kl_clip", "graft_adam", "graft_sgd", "spectral")
# Far below the rates tuned under spectral norm control: without it they are in another unit.
SMALL = {"lr": 1e-3, "fallback_learning_rate": 1e-3}


def batch(seed: int, rows: int = 8) -> Tensor:
    return torch.randint(1, 32, (rows, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def loss(model: nn.Module, tokens: Tensor) -> float:
    return float(model(input_ids=tokens, labels=tokens).loss)


def step(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer, tokens: Tensor, parts: int = 1) -> None:
    """One update on the mean loss of equally long rows, in one backward pass or several."""
    optimizer.zero_grad()
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    for part in tokens.chunk(parts):
        optimizer.announce(part.shape[0] * (part.shape[1] - 1), 1 / count)
        (model(input_ids=part, labels=part).loss / parts).backward()
    optimizer.step()


def trained(
    name: str, model: nn.Module, steps: int = 8, parts: int = 1, **settings: Any
) -> hf_so2.SecondOrderOptimizer:
    optimizer = hf_so2.build_optimizer(name, model, **settings)
    for seed in range(steps):
        step(model, optimizer, batch(seed), parts)
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_mup_at_the_base_width_is_the_plain_method_bit_for_bit(name: str) -> None:
    plain, mup = llama(), llama()
    trained(name, plain, weight_decay=0.1)
    trained(f"{name}_mup", mup, weight_decay=0.1, base_config=llama().config)
    assert_same_parameters(mup, plain)


@pytest.mark.parametrize("norm_control", ["none", "graft_adam"])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_mup_at_the_base_width_holds_under_other_norm_controls(name: str, norm_control: str) -> None:
    plain, mup = llama(), llama()
    trained(name, plain, 3, norm_control=norm_control, **SMALL)
    trained(f"{name}_mup", mup, 3, norm_control=norm_control, base_config=llama().config, **SMALL)
    assert_same_parameters(mup, plain)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_the_loss_falls_at_the_defaults(name: str) -> None:
    model, tokens = llama(), batch(0)
    optimizer = hf_so2.build_optimizer(name, model)
    first = loss(model, tokens)
    for _ in range(15):
        step(model, optimizer, tokens)
    assert loss(model, tokens) < first / 2


@pytest.mark.parametrize("norm_control", ["spectral", "graft_adam"])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_going_on_from_a_saved_state_is_going_on(name: str, norm_control: str) -> None:
    settings = {"norm_control": norm_control, **SMALL}
    straight, resumed = llama(), llama()
    trained(name, straight, 9, **settings)
    first = trained(name, resumed, 5, **settings)
    file = io.BytesIO()
    torch.save({"model": resumed.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = llama(intermediate_size=24)
    fresh.load_state_dict(saved["model"])
    second = hf_so2.build_optimizer(name, fresh, **settings)
    second.load_state_dict(saved["optimizer"])
    for seed in range(5, 9):
        step(fresh, second, batch(seed))
    assert_same_parameters(fresh, straight)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_the_split_into_micro_batches_does_not_matter(name: str) -> None:
    """In float64; Muon orthogonalises in bfloat16, where round-off can turn into a unit in the last place of that."""
    whole, parts = llama().double(), llama().double()
    trained(name, whole, 3)
    trained(name, parts, 3, parts=4)
    tolerance = 2e-3 if name == "muon" else 1e-6  # Llama's RMSNorm computes in float32 whatever it is given
    for (key, expected), (_, actual) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert relative_error(actual, expected) < tolerance, key


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_checkpointing_changes_nothing(name: str) -> None:
    plain, recomputed = llama(), llama()
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    trained(name, plain, 3)
    trained(name, recomputed, 3)
    assert_same_parameters(recomputed, plain)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_low_precision_weights_keep_float32_statistics(name: str) -> None:
    model, tokens = llama().to(torch.bfloat16), batch(0)
    optimizer = hf_so2.build_optimizer(name, model)
    for _ in range(8):
        step(model, optimizer, tokens)
    assert optimizer.curvature is not None
    for layer in optimizer.curvature.layers.values():
        assert layer.refreshes
        for key, value in layer.state.items():
            assert value.dtype == torch.float32, key
            assert torch.isfinite(value).all(), key
    assert loss(model, tokens) < loss(llama(), tokens) - 0.5


@pytest.mark.parametrize("name", SECOND_ORDER)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-18, 1e30])
def test_extreme_gradients_poison_nothing(name: str, scale: float) -> None:
    """A few such steps, then ordinary ones: all that is kept stays finite, and the weights still move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    optimizer = hf_so2.build_optimizer(name, model)
    inputs, targets = torch.randn(20, 6), torch.randn(20, 4)
    for turn in range(6):
        optimizer.zero_grad()
        factor = scale if turn < 2 else 1.0
        ((model(inputs) - targets).square().mean() * factor).backward()
        before = copy.deepcopy(model.state_dict())
        optimizer.step()
    assert optimizer.curvature is not None
    for layer in optimizer.curvature.layers.values():
        assert all(torch.isfinite(value).all() for value in layer.state.values()), layer.name
    for key, value in model.state_dict().items():
        assert torch.isfinite(value).all(), key
        assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["shampoo", "soap", "kl_shampoo"])
def test_large_weights_are_cut_into_blocks_or_preconditioned_on_one_side(name: str) -> None:
    blocked, one_sided = llama(), llama()
    with_blocks = trained(name, blocked, 3, block_size=16)
    with_sides = trained(name, one_sided, 3, max_preconditioner_dim=16)
    mlp = "model.layers.0.mlp.down_proj.weight"  # (16, 24)
    assert with_blocks.curvature is not None
    assert with_sides.curvature is not None
    shapes = {key: tuple(value.shape) for key, value in with_blocks.curvature.layers[mlp].state.items()}
    assert (shapes["0.0/R"], shapes["0.1/R"]) == ((12, 12), (12, 12))
    assert {"L", "R"} & with_sides.curvature.layers[mlp].state.keys() == {"L"}
    for model in (blocked, one_sided):
        assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("norm_control", NORM_CONTROLS)
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_one_huge_gradient_among_ordinary_ones_leaves_no_trace_that_is_not_finite(
    name: str, norm_control: str, order: str
) -> None:
    """Finite, so that the step is made, but too large for products in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    optimizer = hf_so2.build_optimizer(
        name, model, norm_control=norm_control, momentum_order=order, lr=1e-3, fallback_learning_rate=1e-3
    )
    inputs, targets = torch.randn(20, 6), torch.randn(20, 4)
    for turn in range(6):
        optimizer.zero_grad()
        ((model(inputs) - targets).square().mean() * (1e36 if turn == 3 else 1e-4)).backward()
        optimizer.step()
    # Where a step follows the gradient's size it throws the weights so far off that later gradients overflow.
    assert optimizer.steps == 6 or norm_control in ("none", "kl_clip", "graft_sgd")
    assert optimizer.steps + optimizer.skipped_steps == 6
    assert optimizer.curvature is not None
    for layer in optimizer.curvature.layers.values():
        assert all(torch.isfinite(value).all() for value in layer.state.values()), layer.name
    for key, value in model.state_dict().items():
        assert torch.isfinite(value).all(), key


def test_hidden_matrices_in_the_fallback_have_a_rate_of_their_own() -> None:
    """The fallback's rate suits embeddings and heads and is forty times too high for hidden matrices."""
    model = llama()
    optimizer = hf_so2.build_optimizer(
        "kfac", model, fallback_learning_rate=0.08, hidden_fallback_learning_rate=0.003, skip_modules=["down_proj"]
    )
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"] if g["algorithm"] == "adamw"}
    assert rates.pop("model.layers.0.mlp.down_proj.weight") == rates.pop("model.layers.1.mlp.down_proj.weight") == 0.003
    assert set(rates.values()) == {0.08}


def test_the_biases_of_a_recurrent_layer_are_biases() -> None:
    """torch names them `bias_ih_l0`."""
    model = torch.nn.ModuleDict({"mix": torch.nn.LSTM(8, 8), "out": torch.nn.Linear(8, 8)})
    optimizer = hf_so2.build_optimizer("kfac", model)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert rates["mix.bias_ih_l0"] == rates["mix.bias_hh_l0"] == rates["out.bias"] == DEFAULT.bias_learning_rate


@pytest.mark.parametrize(
    ("given", "added", "rest"),
    [
        ({}, DEFAULT.bias_learning_rate, DEFAULT.fallback_learning_rate),
        ({"bias_learning_rate": 0.02}, 0.02, DEFAULT.fallback_learning_rate),
        ({"fallback_learning_rate": 0.03}, DEFAULT.bias_learning_rate, 0.03),
        ({"fallback_learning_rate": 0.01, "bias_learning_rate": 0.02}, 0.02, 0.01),
    ],
)
def test_biases_and_positions_have_a_rate_of_their_own(given: dict[str, Any], added: float, rest: float) -> None:
    """A step of 0.08 suits the rare token and a gain of 1, not what is added to every token's activations."""
    optimizer = hf_so2.build_optimizer("kfac", gpt2(), **given)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"] if g["algorithm"] == "adamw"}
    slow = {name for name, rate in rates.items() if rate == added}
    assert slow == {name for name in rates if name.endswith(".bias") or "wpe" in name}
    assert {rates[name] for name in rates.keys() - slow} == {rest}
    slow_all = hf_so2.build_optimizer("kfac", gpt2(), fallback_learning_rate=1e-4)
    assert {g["lr"] for g in slow_all.param_groups if g["algorithm"] == "adamw"} == {1e-4}
    plain = hf_so2.build_optimizer("adamw", gpt2(), lr=0.01)
    assert {g["lr"] for g in plain.param_groups} == {0.01}


@pytest.mark.parametrize("flag", ["precondition_embeddings", "precondition_head"])
@pytest.mark.parametrize("name", ["shampoo", "soap", "kl_shampoo"])
def test_a_vocabulary_within_the_limit_costs_two_matrices_of_its_size(name: str, flag: str) -> None:
    """In float32 as many megabytes as the help of `precondition_head` says."""
    optimizer = hf_so2.build_optimizer(name, llama(), max_preconditioner_dim=VOCABULARY, **{flag: True})
    assert optimizer.curvature is not None
    key = "lm_head.weight" if flag == "precondition_head" else "model.embed_tokens.weight"
    shapes = [tuple(value.shape) for value in optimizer.curvature.layers[key].state.values()]
    assert shapes.count((VOCABULARY, VOCABULARY)) == 2
    text = next(entry.metadata["help"] for entry in fields(Settings) if entry.name == "precondition_head")
    sizes = [round(2 * n**2 * 4 / 1e6) for n in (2048, 8192)]
    assert f"({sizes[0]} MB at 2,048 entries, {sizes[1]} MB at 8,192)" in text


@pytest.mark.parametrize("name", ["shampoo", "soap", "kl_shampoo"])
def test_a_vocabulary_above_the_limit_leaves_embedding_and_head_with_one_side(name: str) -> None:
    model, mup = llama(), llama()
    settings = {**BOTH_ENDS, "max_preconditioner_dim": 24}
    optimizer = trained(name, model, 4, **settings)
    assert optimizer.curvature is not None
    states = {key: layer.state.keys() for key, layer in optimizer.curvature.layers.items()}
    assert {"L", "R"} & states["model.embed_tokens.weight"] == {"L"}  # (16, 32): the vocabulary is fan_in
    assert {"L", "R"} & states["lm_head.weight"] == {"R"}  # (32, 16): here it is fan_out
    assert {"L", "R"} <= states["model.layers.0.mlp.down_proj.weight"]
    for key, entry in ((p.name, p) for p in optimizer.coverage().parameters):
        assert entry.algorithm == ("adamw" if key.endswith("norm.weight") else name), key
    trained(f"{name}_mup", mup, 4, base_config=llama().config, **settings)
    assert_same_parameters(mup, model)
