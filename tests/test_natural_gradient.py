"""The exact natural gradient against the definition, written out example by example in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_so2 import natural_gradient as module
from hf_so2.errors import ConfigurationError
from hf_so2.natural_gradient import Fisher, natural_gradient

NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(5, 3)),
    "tanh": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
    "without biases": lambda: nn.Sequential(nn.Linear(20, 40, bias=False), nn.ReLU(), nn.Linear(40, 29, bias=False)),
}


def case(name: str, examples: int = 17) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = NETS[name]().double()
    generator = torch.Generator().manual_seed(1)
    first, last = model[0].in_features, model[-1].out_features
    inputs = torch.randn(examples, first, generator=generator, dtype=torch.float64)
    return model, inputs, torch.randint(0, last, (examples,), generator=generator)


def flat(values: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([value.reshape(-1) for value in values.values()]).detach().numpy()


def log_gradient(model: nn.Module, example: Tensor, label: int) -> np.ndarray:
    """`∇ log p(label | example)`, by plain autograd."""
    model.zero_grad()
    model(example.unsqueeze(0)).log_softmax(dim=1)[0, label].backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()]).numpy().copy()


def dense_fisher(model: nn.Module, inputs: Tensor, labels: Tensor | None = None) -> np.ndarray:
    """`E_n E_{y ~ p} ∇ log p(y) ∇ log p(y)ᵀ`, or with the labels of the data."""
    vectors = []
    for index, example in enumerate(inputs):
        p = model(example.unsqueeze(0)).softmax(dim=1)[0].detach().numpy()
        if labels is not None:
            vectors.append(log_gradient(model, example, int(labels[index])))
        else:
            vectors += [np.sqrt(p[label]) * log_gradient(model, example, label) for label in range(len(p))]
    rows = np.stack(vectors)
    return rows.T @ rows / len(inputs)


def dense_gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> np.ndarray:
    return -np.mean([log_gradient(model, x, int(y)) for x, y in zip(inputs, labels, strict=True)], axis=0)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("form", ["kernel", "dense"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", NETS)
def test_equals_a_dense_solve(name: str, kind: str, form: str) -> None:
    """Nets of up to 2,000 parameters, to 1e-8."""
    model, inputs, labels = case(name)
    fisher = dense_fisher(model, inputs, labels if kind == "empirical" else None)
    assert len(fisher) <= 2000
    for damping in (1e-4, 1e-1):
        expected = np.linalg.solve(fisher + damping * np.eye(len(fisher)), dense_gradient(model, inputs, labels))
        actual = natural_gradient(model, inputs, labels, damping=damping, fisher=kind, form=form)
        assert error(flat(actual), expected) < 1e-8


@pytest.mark.parametrize("form", ["kernel", "dense"])
def test_layers_are_solved_by_themselves(form: str) -> None:
    model, inputs, labels = case("tanh")
    fisher, gradient = dense_fisher(model, inputs), dense_gradient(model, inputs, labels)
    first = sum(parameter.numel() for parameter in model[0].parameters())
    parts = [slice(0, first), slice(first, None)]
    expected = [np.linalg.solve(fisher[p, p] + 1e-3 * np.eye(len(fisher[p, p])), gradient[p]) for p in parts]
    actual = natural_gradient(model, inputs, labels, damping=1e-3, blocks="layer", form=form)
    assert error(flat(actual), np.concatenate(expected)) < 1e-8


def test_drawn_labels_average_to_the_exact_matrix() -> None:
    model, inputs, _ = case("linear", examples=4)
    generator = torch.Generator().manual_seed(0)
    repeated = inputs.repeat(5000, 1)
    rows = Fisher.of(model, repeated, kind="mc", generator=generator).matrix
    assert error((rows.mT @ rows).numpy(), dense_fisher(model, inputs)) < 0.05


def test_frozen_parameters_are_left_out() -> None:
    model, inputs, labels = case("tanh")
    model[0].requires_grad_(False)
    assert set(natural_gradient(model, inputs, labels, damping=1e-2)) == {"2.weight", "2.bias"}


def test_what_is_too_large_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, labels = case("tanh")
    huge = nn.Linear(10_000, 10_000, bias=False, device="meta")
    with pytest.raises(ConfigurationError, match="small networks"):
        module._refuse_large(2, dict(huge.named_parameters()))
    monkeypatch.setattr(module, "MAX_DIMENSION", 20)
    with pytest.raises(ConfigurationError, match="form kernel"):
        natural_gradient(model, inputs, labels, damping=1e-2, fisher="empirical", form="dense")
    with pytest.raises(ConfigurationError, match="fewer examples"):
        natural_gradient(model, inputs, labels, damping=1e-2, form="kernel")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [({"damping": 0.0}, "damping"), ({"fisher": "hessian"}, "fisher"), ({"blocks": "unit"}, "blocks"),
     ({"form": "cg"}, "form")],
)  # fmt: skip
def test_wrong_arguments_are_named(wrong: dict[str, object], field: str) -> None:
    model, inputs, labels = case("tanh")
    with pytest.raises(ConfigurationError, match=field):
        natural_gradient(model, inputs, labels, **{"damping": 1e-2, **wrong})


def test_a_model_that_is_no_classifier_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="logits"):
        Fisher.of(nn.Flatten(0), torch.zeros(3, 2))
    with pytest.raises(ConfigurationError, match="labels"):
        Fisher.of(nn.Linear(2, 2), torch.zeros(3, 2), kind="empirical")
