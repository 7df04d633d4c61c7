"""The table's cells, measured on gradients of a small Llama in muP at two widths, one of them four times the other.

One step's `dW x` is what must not depend on the width. The methods are written out densely here, so that nothing but
the multipliers comes from the package.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_so2.mup import ParameterWidth, apply_mup, rules, scale_width
from hf_so2.mup.coord_run import synthetic_batches
from hf_so2.mup.roles import pattern_of

GROWTH, SEEDS = 4, 3
TOLERANCE = 0.25
BASE = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


@dataclass
class Layer:
    """One matrix in one run: `inputs` (N, fan_in), `deltas` (N, fan_out) of single tokens' losses, `gradient` of the
    mean loss (fan_out, fan_in)."""

    width: ParameterWidth
    inputs: Tensor
    deltas: Tensor
    gradient: Tensor

    @property
    def a(self) -> Tensor:
        return self.inputs.mT @ self.inputs / len(self.inputs)

    @property
    def b(self) -> Tensor:
        return self.deltas.mT @ self.deltas / len(self.deltas)


def layers_of(multiplier: int, seed: int) -> dict[str, Layer]:
    config = scale_width(BASE, multiplier=multiplier)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    report = apply_mup(model, BASE)
    tokens = synthetic_batches(config, 1, 8, 32, seed)[0]
    inputs: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            output.register_hook(lambda delta: deltas.__setitem__(name, delta))

        module.register_forward_hook(record)

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            watch(name, module)
    model(input_ids=tokens, labels=tokens).loss.backward()
    found = {}
    for name, h in inputs.items():
        module = model.get_submodule(name)
        gradient = module.weight.grad.double()
        if isinstance(module, nn.Embedding):
            h, gradient = nn.functional.one_hot(h, config.vocab_size), gradient.mT  # the matrix acts on one-hot rows
        # Autograd hands out the mean loss's derivatives; the last token of each sequence has no loss.
        count = tokens.shape[0] * (tokens.shape[1] - 1)
        rows = h.reshape(-1, h.shape[-1]).double(), count * deltas[name].reshape(len(tokens.view(-1)), -1).double()
        found[name] = Layer(report[f"{name}.weight"], *rows, gradient)
    return found


Runs: TypeAlias = list[tuple[dict[str, Layer], dict[str, Layer]]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """For each seed the layers of the base and of the wide model."""
    return [(layers_of(1, seed), layers_of(GROWTH, seed)) for seed in range(SEEDS)]


def exponents(runs: Runs, quantity: Callable[[Layer], float]) -> dict[str, float]:
    """The power of the width that `quantity` follows, by kind of layer; mean over layers of a kind and seeds."""
    logs: dict[str, list[float]] = defaultdict(list)
    for base, wide in runs:
        for name in base:
            logs[pattern_of(name)].append(math.log(quantity(wide[name]) / quantity(base[name])) / math.log(GROWTH))
    return {pattern: sum(values) / len(values) for pattern, values in logs.items()}


def roles(runs: Runs) -> dict[str, str]:
    return {pattern_of(name): layer.width.role for name, layer in runs[0][1].items()}


def trace(matrix: Tensor) -> float:
    return float(matrix.diagonal().sum())


def test_the_second_moment_of_inputs_behind_a_norm_is_the_width(runs: Runs) -> None:
    behind_a_norm = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    for layers in (layer for pair in runs for layer in pair):
        for name, layer in layers.items():
            if name.endswith(behind_a_norm):
                # Exact but for the norm's epsilon.
                assert trace(layer.a) == pytest.approx(layer.gradient.shape[1], rel=5e-3), name
            elif name.endswith("embed_tokens"):
                assert trace(layer.a) == pytest.approx(1.0, rel=1e-12)


def test_gradients_scale_as_the_table_assumes(runs: Runs) -> None:
    expected = {"input": -0.5, "hidden": 0.0, "output": 0.5}
    measured = exponents(runs, lambda layer: float(layer.gradient.norm()))
    for pattern, role in roles(runs).items():
        assert measured[pattern] == pytest.approx(expected[role], abs=TOLERANCE), pattern


# What each kind of damping is added to, by a scalar of the same dimension.
DAMPED: dict[rules.DampingKind, Callable[[Layer], float]] = {
    "rho_A": lambda layer: trace(layer.a),
    "rho_B": lambda layer: trace(layer.b),
    "S": lambda layer: float((layer.inputs.square().sum(1) * layer.deltas.square().sum(1)).mean()),
    "lambda": lambda layer: float((layer.inputs.square().sum(1) * layer.deltas.square().sum(1)).mean()),
    "rho_L": lambda layer: trace(layer.gradient @ layer.gradient.mT),
    "rho_R": lambda layer: trace(layer.gradient.mT @ layer.gradient),
    "adam_eps": lambda layer: float(layer.gradient.square().mean().sqrt()),
}


@pytest.mark.parametrize("kind", DAMPED)
def test_damping_scales_like_what_it_is_added_to(kind: rules.DampingKind, runs: Runs) -> None:
    measured = exponents(runs, DAMPED[kind])
    multiplier = exponents(runs, lambda layer: rules.damping_multiplier(kind, layer.width))
    for pattern in measured:
        assert measured[pattern] == pytest.approx(multiplier[pattern], abs=TOLERANCE), pattern


def power(matrix: Tensor, exponent: float, damping: float = 0.1) -> Tensor:
    """`(X + damping * tr X * I)^exponent` of a symmetric positive semi-definite `X`."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values.clamp(min=0) + damping * values.sum()) ** exponent) @ vectors.mT


def two_sided(e_a: float, e_b: float) -> Callable[[Layer], Tensor]:
    return lambda layer: power(layer.b, -e_b) @ layer.gradient @ power(layer.a, -e_a)


def shampoo(p: float) -> Callable[[Layer], Tensor]:
    def update(layer: Layer) -> Tensor:
        gradient = layer.gradient
        return power(gradient @ gradient.mT, -p) @ gradient @ power(gradient.mT @ gradient, -p)

    return update


def orthogonalised(layer: Layer) -> Tensor:
    u, values, v = torch.linalg.svd(layer.gradient, full_matrices=False)
    return (u * (values > 1e-6 * values[0])) @ v


def spectral_target(layer: Layer) -> Tensor:
    update = two_sided(1, 1)(layer)
    fan_out, fan_in = update.shape
    return update / torch.linalg.matrix_norm(update, 2) * (fan_out / fan_in) ** 0.5


METHODS: dict[str, tuple[rules.LearningRateRule, Callable[[Layer], Tensor]]] = {
    "sgd": (rules.SGD, lambda layer: layer.gradient),
    "adam": (rules.ADAM, lambda layer: layer.gradient.sign()),
    "muon": (rules.SPECTRAL, orthogonalised),
    "shampoo_quarter": (rules.SPECTRAL, shampoo(0.25)),
    "shampoo_third": (rules.shampoo(1 / 3), shampoo(1 / 3)),
    "shampoo_half": (rules.shampoo(0.5), shampoo(0.5)),
    "kfac": (rules.KFAC, two_sided(1, 1)),
    "foof": (rules.FOOF, two_sided(1, 0)),
    "square_root": (rules.two_sided(0.5, 0.5), two_sided(0.5, 0.5)),
    "spectral_norm_control": (rules.NONE, spectral_target),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_step_changes_a_layer_alike_at_both_widths(method: str, runs: Runs) -> None:
    rule, update = METHODS[method]
    measured = exponents(runs, lambda layer: float((layer.inputs @ update(layer).mT).square().mean().sqrt()))
    multiplier = exponents(runs, lambda layer: rules.learning_rate_multiplier(rule, layer.width))
    level = {pattern: measured[pattern] + multiplier[pattern] for pattern in measured}
    assert all(abs(slope) <= TOLERANCE for slope in level.values()), level
    needed = {pattern: measured[pattern] for pattern in measured if abs(multiplier[pattern]) >= 0.5}
    assert all(abs(slope) > TOLERANCE for slope in needed.values()), needed
    decay = exponents(runs, lambda layer: rules.weight_decay_multiplier(rule, layer.width))
    assert decay == pytest.approx({pattern: -slope for pattern, slope in multiplier.items()})


def test_gains_of_norms_take_the_input_column() -> None:
    """The change of a gain is the change of its output per entry, which is of order 1 behind the norm."""
    size: dict[int, float] = {}
    widths: dict[int, ParameterWidth] = {}
    for multiplier in (1, GROWTH):
        config = scale_width(BASE, multiplier=multiplier)
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        widths[multiplier] = apply_mup(model, BASE)["model.norm.weight"]
        tokens = synthetic_batches(config, 1, 8, 32, 0)[0]
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradient = model.model.norm.weight.grad
        assert gradient is not None
        size[multiplier] = float(gradient.square().mean().sqrt())
    plain = math.log(size[GROWTH] / size[1], GROWTH)
    sgd = math.log(rules.learning_rate_multiplier(rules.SGD, widths[GROWTH]), GROWTH)
    assert abs(plain + sgd) <= TOLERANCE < abs(plain)
    assert rules.learning_rate_multiplier(rules.ADAM, widths[GROWTH]) == 1.0  # Adam's first step is the sign
