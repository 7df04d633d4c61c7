"""The one table of muP: how every hyperparameter of every method scales with width and depth.

A weight matrix `W` of shape `(fan_out, fan_in)` computes `u = W h`. `m_in = fan_in / base fan_in` where that dimension
is a width, else 1; `m_out` likewise. A role says which of the two are widths:

====== ============================= ============ ============
role   example                       fan_in width fan_out width
====== ============================= ============ ============
input  token embedding               no           yes
hidden attention and MLP projections yes          yes
output LM head, MoE router           yes          no
vector norm gain, bias               no           yes (or no)
scalar what has no width in it       no           no
====== ============================= ============ ============

Every multiplier is `m_in^a * m_out^b`. The exponents `(a, b)`:

============================================== ================= ================= =================
multiplier of                                  input             hidden            output
============================================== ================= ================= =================
initial standard deviation                     (0, 0)            (-1/2, 0)         (-1, 0)
learning rate: SGD                             (-1, 1) in every role
learning rate: Adam(W)                         (-1, 0) in every role
learning rate: two-sided `(e_A, e_B)`          (e_A - 1, 1 - e_B) in every role
learning rate: Shampoo, exponent p per side    (2p - 1, 1 - 2p) in every role
learning rate: Shampoo 1/4, Muon and the like  (-1/2, 1/2) in every role
learning rate: SOAP                            (0, 1/2)          (-1/2, 0)         (-1/2, 0)
learning rate: under a spectral norm target    (0, 0), the target sqrt(fan_out/fan_in) holds it
damping: rho_A on A                            (1, 0) in every role
damping: rho_B on B                            (0, -1) in every role
damping: rho on S (EKFAC), lambda (TKFAC)      (1, -1) in every role
damping: rho_L, rho_R on Shampoo's L, R        (1, -1) in every role
damping: Adam's epsilon                        (0, -1) in every role
damping: rho_L, rho_R on KL-Shampoo's L, R     (0, -1) in every role
damping: rho_A rho_B under the rule `pi`       (0, 0), which is wrong outside of hidden weights
weight decay                                   1 / learning rate
============================================== ================= ================= =================

Because `m_in = 1` for input and `m_out = 1` for output roles, one pair of exponents gives all three columns of the
usual tables. Vectors follow the input column with their own growth as `m_out`; scalars never scale with the width.

**A factor between the stored weight and the layer.** Some models compute `u = nu * W_stored h` with a factor `nu` that
the base model does not have (Gemma multiplies embeddings by `sqrt(hidden_size)`, MiniCPM divides the head's input by
the width), and `apply_mup` folds the tied head's multiplier into the last norm. The table speaks of the product `nu *
W_stored`; what is stored is divided by `nu`, so the learning rate takes another power of `nu`
(`ParameterWidth.scale_in` when the factor multiplies the layer's input, `scale_out` when it multiplies its output). For
a method with `P(c G) = c^{1-k} P(G)` per side that power is `k - 2`: Adam `-1`, SGD `-2`, two-sided `2 e - 2`.

**Depth.** A model `m_L` times as deep as its base adds `1 / m_L` of every residual branch to the stream (CompleteP with
alpha = 1). Then the stream and its gradient are free of the depth, so inside a branch inputs are, too, while output
gradients and gradients go as `1 / m_L`; and each branch's weights shall change as much as the base's do. Where the
method itself gives `P(G / m_L) = m_L^-q P(G)`, its rate takes `m_L^q`:

======================================= ============ =======================================
multiplier of, inside a branch          power of m_L
======================================= ============ =======================================
initial standard deviation              0
learning rate: SGD                      1
learning rate: Adam(W), SOAP            0            updates free of the gradient's size
learning rate: two-sided `(e_A, e_B)`   1 - 2 e_B    K-FAC -1, FOOF 1
learning rate: Shampoo, exponent p      1 - 4 p      0 at p = 1/4
learning rate: Muon, spectral target    0
damping: rho_A on A                     0            follows the inputs
damping: rho_B, S, lambda, rho_L, rho_R -2           squares of gradients
damping: rho_A rho_B under `pi`         -2           likewise; Shampoo's rho_L rho_R -4
damping: Adam's epsilon, KL-Shampoo's   -1           like a gradient's entry
weight decay                            1 / learning rate
======================================= ============ =======================================

This is `ParameterWidth.depth`. If the branch's `1 / m_L` is folded into its last weight, that weight also has
`scale_out = m_L`, and both powers together are what its own gradient, which is free of the depth, asks for: `1 / m_L`
of the base's change in every method, constant damping unchanged. Weights outside of branches know no depth.

Sources: Yang & Hu 2020, arXiv 2011.14522 (abc-parametrizations, the SGD column); Yang et al. 2022, arXiv 2203.03466,
    table 8 (Adam,
decay, epsilon); Ishikawa & Karakida 2023, arXiv 2312.12226 (K-FAC, Shampoo and their damping); Qiu et al. 2025,
arXiv 2512.05620 (spectrally normalised methods, SOAP); Dey et al. 2025, arXiv 2505.01618, table 1 (depth: AdamW); the
other methods' powers of the depth are derived above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["input", "hidden", "output", "vector", "scalar"]
DampingKind: TypeAlias = Literal["rho_A", "rho_B", "S", "lambda", "rho_L", "rho_R", "adam_eps", "pi"]
Exponents: TypeAlias = tuple[float, float]

ROLES: tuple[Role, ...] = ("input", "hidden", "output", "vector", "scalar")


@dataclass(frozen=True)
class ParameterWidth:
    """What muP knows of one parameter.

    Args:
        role: which of the parameter's dimensions are widths.
        m_in: growth of fan_in over the base model, 1.0 where fan_in is not a width.
        m_out: growth of fan_out over the base model, 1.0 where fan_out is not a width.
        tied: the matrix serves as embedding and as LM head. It keeps the input role; the head's share of the scaling is
            a multiplier on the logits.
        scale_in: factor the model puts on this layer's input and its base does not (`nu` in the module docstring).
        scale_out: the same on the layer's output, or on a vector's effect.
        depth: growth of the number of layers over the base model, for what is inside a residual branch; 1.0 elsewhere.
    """

    role: Role
    m_in: float
    m_out: float
    tied: bool = False
    scale_in: float = 1.0
    scale_out: float = 1.0
    depth: float = 1.0


def tied_ends(width: ParameterWidth) -> tuple[ParameterWidth, ParameterWidth]:
    """What a tied matrix is as the weight of the embedding, and as that of the head.

    `apply_mup` divides what the head is fed by the growth of the width, unless the weights were pretrained: then the
    matrix has the role of a head. Where the model's own config puts that factor on the logits instead, it is the
    *outputs* of the head that are scaled, and a constant damping of its factors one by one is not right.
    """
    growth = width.m_in * width.m_out
    fed = width.scale_in * width.scale_out / growth if width.role == "input" else 1.0
    as_embedding = ParameterWidth("input", 1.0, growth, True, width.scale_in, width.scale_out)
    return as_embedding, ParameterWidth("output", growth, 1.0, True, scale_in=fed)


@dataclass(frozen=True)
class LearningRateRule:
    """Exponents of one method's learning-rate multiplier.

    Args:
        name: for tables and messages.
        exponents: `(a, b)` of `m_in^a m_out^b` per role; vectors use the input entry.
        scale_exponents: exponents of `scale_in` and `scale_out`.
        depth_exponent: exponent of `depth`.
    """

    name: str
    exponents: Mapping[Role, Exponents]
    scale_exponents: Exponents
    depth_exponent: float = 0.0


def _everywhere(
    name: str, a: float, b: float, scale_in: float, scale_out: float, depth: float = 0.0
) -> LearningRateRule:
    roles: tuple[Role, ...] = ("input", "hidden", "output")
    return LearningRateRule(name, dict.fromkeys(roles, (a, b)), (scale_in, scale_out), depth)


def two_sided(e_a: float, e_b: float) -> LearningRateRule:
    """`(B + rho_B)^-e_B G (A + rho_A)^-e_A`: K-FAC `(1, 1)`, FOOF `(1, 0)`, square root `(1/2, 1/2)`."""
    return _everywhere(f"two-sided({e_a:g}, {e_b:g})", e_a - 1, 1 - e_b, 2 * e_a - 2, 2 * e_b - 2, 1 - 2 * e_b)


def shampoo(p: float) -> LearningRateRule:
    """`(L + rho_L)^-p G (R + rho_R)^-p` without any normalisation of the update."""
    return _everywhere(f"shampoo({p:g})", 2 * p - 1, 1 - 2 * p, 4 * p - 2, 4 * p - 2, 1 - 4 * p)


SGD = _everywhere("sgd", -1, 1, -2, -2, 1)
ADAM = _everywhere("adam", -1, 0, -1, -1)
SPECTRAL = _everywhere("spectral", -0.5, 0.5, -1, -1)
SOAP = LearningRateRule("soap", {"input": (0, 0.5), "hidden": (-0.5, 0), "output": (-0.5, 0)}, (-1, -1))
NONE = _everywhere("none", 0, 0, -1, -1)
KFAC = two_sided(1, 1)
FOOF = two_sided(1, 0)

INIT_EXPONENTS: Mapping[Role, Exponents] = {"input": (0, 0), "hidden": (-0.5, 0), "output": (-1, 0)}

# (a, b) for m_in and m_out, then the exponents of scale_in, scale_out and depth.
DAMPING_EXPONENTS: Mapping[DampingKind, tuple[float, float, float, float, float]] = {
    "rho_A": (1, 0, 2, 0, 0),
    "rho_B": (0, -1, 0, 2, -2),
    "S": (1, -1, 2, 2, -2),
    "lambda": (1, -1, 2, 2, -2),
    "rho_L": (1, -1, 2, 2, -2),
    "rho_R": (1, -1, 2, 2, -2),
    "adam_eps": (0, -1, 1, 1, -1),
    # The product of both factors' dampings. The rule takes no multiplier for the width, to stay what it was.
    "pi": (0, 0, 2, 2, -2),
}


def _product(*powers: tuple[float, float]) -> float:
    result = 1.0
    for ratio, exponent in powers:
        # Ratios of exactly 1 are skipped so that base-width multipliers are exactly 1.0, not nearly.
        if ratio != 1.0 and exponent != 0:
            result *= ratio**exponent
    return result


def _multiplier(width: ParameterWidth, exponents: tuple[float, float, float, float, float]) -> float:
    """By the exponents of m_in, m_out, scale_in, scale_out and depth; a scalar knows of the depth only."""
    a, b, scale_in, scale_out, depth = exponents
    by_depth = (width.depth, depth)
    if width.role == "scalar":
        return _product(by_depth)
    scales = (width.scale_in, scale_in), (width.scale_out, scale_out)
    return _product((width.m_in, a), (width.m_out, b), *scales, by_depth)


def _column(role: Role) -> Role:
    return "input" if role == "vector" else role


def init_multiplier(width: ParameterWidth) -> float:
    """Factor on the standard deviation of the base model's initial weights; vectors and scalars keep theirs.

    A tied matrix, a vector or a scalar is divided by its `scale_*` too, since the table speaks of the effective weight.
    """
    if width.role == "scalar":
        return 1.0
    a, b = INIT_EXPONENTS[_column(width.role)]
    return _product((width.m_in, a), (width.m_out, b), (width.scale_in, -1), (width.scale_out, -1))


def learning_rate_multiplier(rule: LearningRateRule, width: ParameterWidth) -> float:
    """Factor on the base learning rate for a parameter of this width under this method."""
    a, b = (0.0, 0.0) if width.role == "scalar" else rule.exponents[_column(width.role)]
    return _multiplier(width, (a, b, *rule.scale_exponents, rule.depth_exponent))


def weight_decay_multiplier(rule: LearningRateRule, width: ParameterWidth) -> float:
    """Factor on decoupled weight decay: the inverse of the learning rate's, so that `lr * weight_decay` is free of
    width and depth."""
    multiplier = learning_rate_multiplier(rule, width)
    return 1.0 if multiplier == 1.0 else 1.0 / multiplier


def damping_multiplier(kind: DampingKind, width: ParameterWidth) -> float:
    """Factor on a constant added to a factor matrix (`rho_A`, ..., `rho_R`), to `S`, `lambda` or Adam's denominator."""
    return _multiplier(width, DAMPING_EXPONENTS[kind])
