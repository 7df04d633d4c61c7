"""The natural gradient of a small classifier, exact: what K-FAC and its relatives approximate.

The Fisher matrix of N examples is `F = (1/N) Σ_n J_nᵀ (diag(p_n) - p_n p_nᵀ) J_n` with `J_n` (classes, parameters) the
Jacobian of the logits (Amari 1998; Martens 2014, arXiv 1412.1193). It is kept as a square root: rows `R` with
`F = Rᵀ R`, one row per example and class, or one per example where labels are drawn or given. Then `(F + ρI)⁻¹ g` is a
solve in the number of parameters, or by the kernel trick in the number of rows:
`(g - Rᵀ (R Rᵀ + ρI)⁻¹ R g) / ρ`, as in Benzing 2022 (arXiv 2201.12250).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy

from hf_so2.errors import ConfigurationError

Kind: TypeAlias = Literal["exact", "mc", "empirical"]
Blocks: TypeAlias = Literal["network", "layer"]
Form: TypeAlias = Literal["kernel", "dense"]
Named: TypeAlias = Mapping[str, Tensor]

MAX_DIMENSION = 8192
"""Of the matrix that is solved with: 0.5 GB in float64, and minutes on one core."""
MAX_ENTRIES = 2**27
"""Of the rows R: 1 GB in float64."""


@dataclass(frozen=True)
class Fisher:
    """A Fisher matrix as rows `R` with `F = Rᵀ R`.

    Args:
        rows: by the name of a parameter: (rows, *shape of the parameter), in the parameters' dtype.
    """

    rows: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor | None = None,
        kind: Kind = "exact",
        generator: torch.Generator | None = None,
    ) -> Fisher:
        """The Fisher matrix of a batch.

        Args:
            model: maps `inputs` to logits (N, classes), each example by itself (no batch norm) and without randomness.
            inputs: (N, ...), floating point or indices.
            labels: (N,) of integers, for `empirical` only.
            kind: `exact` sums over all labels, `mc` draws one from the model's own prediction, `empirical` takes those
                of the data, which gives another matrix.
            generator: of the draws.

        Raises:
            ConfigurationError: an unknown kind, labels missing or superfluous, logits of another shape, or too large.
        """
        if kind not in get_args(Kind):
            raise ConfigurationError("fisher", kind, f"must be one of {', '.join(get_args(Kind))}")
        if (labels is None) == (kind == "empirical"):
            raise ConfigurationError("labels", None if labels is None else "given", "go with fisher empirical only")
        with torch.no_grad():
            logits = model(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
            raise ConfigurationError("model", type(model).__name__, "must map N inputs to logits (N, classes)")
        parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        _refuse_large(logits.numel() if kind == "exact" else len(inputs), parameters)
        buffers = dict(model.named_buffers())
        frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

        def logits_of(weights: Named, example: Tensor) -> Tensor:
            return functional_call(model, {**weights, **frozen, **buffers}, (example.unsqueeze(0),)).squeeze(0)

        if kind == "exact":
            jacobians = vmap(jacrev(logits_of), in_dims=(None, 0))(parameters, inputs)
            probabilities = logits.softmax(dim=1)
            return cls({name: _centred(jacobian, probabilities) for name, jacobian in jacobians.items()})
        if labels is None:
            labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)

        def loss_of(weights: Named, example: Tensor, label: Tensor) -> Tensor:
            return cross_entropy(logits_of(weights, example), label)

        gradients = vmap(grad(loss_of), in_dims=(None, 0, 0))(parameters, inputs, labels)
        return cls({name: gradient / len(inputs) ** 0.5 for name, gradient in gradients.items()})

    def of_layers(self) -> list[Fisher]:
        """The diagonal blocks of layers: the parameters of one module (a weight and its bias) belong together."""
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self.rows)
        return [
            Fisher({name: rows for name, rows in self.rows.items() if name.rpartition(".")[0] == module})
            for module in modules
        ]

    @property
    def matrix(self) -> Tensor:
        """`R`, (rows, parameters): parameters in the order of `rows`, each flattened."""
        return torch.cat([rows.flatten(1) for rows in self.rows.values()], dim=1)

    def solve(self, gradients: Named, damping: float, form: Form = "kernel") -> dict[str, Tensor]:
        """`(F + ρI)⁻¹ g` for the parameters of this matrix.

        Args:
            gradients: by name, of at least those parameters, each of the parameter's shape.
            damping: ρ > 0.
            form: `kernel` solves in the number of rows, `dense` in the number of parameters.

        Raises:
            ConfigurationError: ρ ≤ 0, an unknown form, or a matrix that is too large to be solved with.
        """
        if not damping > 0:
            raise ConfigurationError("damping", damping, "must be a positive number")
        if form not in get_args(Form):
            raise ConfigurationError("form", form, f"must be one of {', '.join(get_args(Form))}")
        matrix = self.matrix
        size = matrix.shape[0 if form == "kernel" else 1]
        if size > MAX_DIMENSION:
            other = "fewer examples, or fisher mc" if form == "kernel" else "form kernel"
            raise ConfigurationError("natural_gradient", f"{size} x {size}", f"is above {MAX_DIMENSION}; take {other}")
        g = torch.cat([gradients[name].reshape(-1) for name in self.rows]).to(matrix.dtype)
        if form == "kernel":
            solution = (g - matrix.mT @ _damped_solve(matrix @ matrix.mT, damping, matrix @ g)) / damping
        else:
            solution = _damped_solve(matrix.mT @ matrix, damping, g)
        sizes = [rows[0].numel() for rows in self.rows.values()]
        parts = solution.split(sizes)
        return {name: part.reshape(rows.shape[1:]) for (name, rows), part in zip(self.rows.items(), parts, strict=True)}


def natural_gradient(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    damping: float,
    fisher: Kind = "exact",
    blocks: Blocks = "network",
    form: Form = "kernel",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """`(F + ρI)⁻¹ ∇L` of the mean cross-entropy `L`, for small classifiers.

    Args:
        model: see `Fisher.of`.
        inputs: (N, ...).
        labels: (N,) of integers.
        damping: ρ > 0.
        fisher: whose labels F is of, see `Fisher.of`.
        blocks: `network` inverts the whole matrix, `layer` its diagonal blocks.
        form: see `Fisher.solve`; both give the same.
        generator: of the draws of `mc`.

    Returns:
        By name of the parameter, its shape and dtype: to be subtracted, times a learning rate.

    Raises:
        ConfigurationError: a wrong argument, or a model or batch that is too large.
    """
    if blocks not in get_args(Blocks):
        raise ConfigurationError("blocks", blocks, f"must be one of {', '.join(get_args(Blocks))}")
    whole = Fisher.of(model, inputs, labels if fisher == "empirical" else None, fisher, generator)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = cross_entropy(model(inputs), labels)
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    updates: dict[str, Tensor] = {}
    for block in [whole] if blocks == "network" else whole.of_layers():
        updates |= block.solve(gradients, damping, form)
    return updates


def _refuse_large(rows: int, parameters: Named) -> None:
    size = sum(parameter.numel() for parameter in parameters.values())
    if not size:
        raise ConfigurationError("model", "no parameter", "must have a parameter that requires a gradient")
    if rows * size > MAX_ENTRIES:
        raise ConfigurationError(
            "natural_gradient",
            f"{rows} rows of {size} parameters",
            f"is for small networks: at most {MAX_ENTRIES} entries; take fewer examples, or fisher mc",
        )


def _centred(jacobian: Tensor, probabilities: Tensor) -> Tensor:
    """Rows `√(p_c / N) (J_c - Σ_k p_k J_k)`, (N · classes, *shape), of a Jacobian (N, classes, *shape).

    `Σ_c p_c (e_c - p)(e_c - p)ᵀ = diag(p) - p pᵀ`, and every term is a square.
    """
    p = probabilities.reshape(*probabilities.shape, *[1] * (jacobian.ndim - 2))
    centred = jacobian - (p * jacobian).sum(dim=1, keepdim=True)
    return ((p / len(p)).sqrt() * centred).flatten(0, 1)


def _damped_solve(matrix: Tensor, damping: float, right: Tensor) -> Tensor:
    matrix.diagonal().add_(damping)
    return torch.cholesky_solve(right.unsqueeze(1), torch.linalg.cholesky(matrix)).squeeze(1)
