"""Every hyperparameter of every optimizer: one frozen dataclass, checked when it is built.

Keywords of `build_optimizer` and fields of `SecondOrderTrainingArguments` are generated from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from hf_so2.damping import RULES
from hf_so2.engine.norm_control import NORM_CONTROLS
from hf_so2.errors import ConfigurationError
from hf_so2.layers import WEIGHT_SHARING
from hf_so2.linalg import MATMUL_PRECISIONS
from hf_so2.methods.damping_overrides import ALLOWED as OVERRIDES_ALLOWED
from hf_so2.methods.damping_overrides import are_overrides

Check = tuple[Callable[[Any], bool], str]

POSITIVE: Check = (lambda x: _is_number(x) and x > 0, "must be a number above 0")
NOT_NEGATIVE: Check = (lambda x: _is_number(x) and x >= 0, "must be a number of at least 0")
FRACTION: Check = (lambda x: _is_number(x) and 0 <= x < 1, "must be a number in [0, 1)")
SHARE: Check = (lambda x: _is_number(x) and 0 <= x <= 1, "must be a number in [0, 1]")
FLAG: Check = (lambda x: isinstance(x, bool), "must be true or false")
COUNT: Check = (lambda x: _is_integer(x) and x >= 1, "must be a whole number of at least 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(choices: Iterable[Any]) -> Check:
    allowed = tuple(choices)
    return (lambda x: x in allowed, f"must be one of {', '.join(map(str, allowed))}")


def optional(check: Check) -> Check:
    accepts, allowed = check
    return (lambda x: x is None or accepts(x), f"{allowed}, or none")


def setting(default: Any, check: Check, text: str, needs: str = "") -> Any:
    """A field of `Settings`. `needs` names a part of a method; without this part the setting has no effect."""
    return field(default=default, metadata={"help": text, "check": check, "needs": needs})


def _are_patterns(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(pattern, str) for pattern in value)


# Settings that are lists of strings. A user may give any sequence; the dataclass keeps a tuple.
LIST_SETTINGS = ("damping_overrides", "skip_modules")


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of one optimizer.

    Raises:
        ConfigurationError: a value out of range, or a setting that the chosen combination would ignore.
    """

    lr: float = setting(
        1e-3, POSITIVE, "Learning rate of preconditioned weights, at the base width. Under spectral norm control its"
        " unit is the spectral norm of a step relative to sqrt(fan_out/fan_in)."
    )  # fmt: skip
    fallback_learning_rate: float | None = setting(
        None, optional(POSITIVE), "AdamW learning rate of everything that is not preconditioned: embeddings, head,"
        " norms and biases; lr where it is none."
    )  # fmt: skip
    bias_learning_rate: float | None = setting(
        None, optional(POSITIVE), "AdamW learning rate of what is added to activations at every token: biases, and"
        " embeddings of positions or segments. Left out, it is at most fallback_learning_rate, and that where it is"
        " none."
    )  # fmt: skip
    hidden_fallback_learning_rate: float | None = setting(
        None, optional(POSITIVE), "AdamW learning rate of hidden matrices that are not preconditioned: skipped"
        " modules, dimensions that are too large, experts under expert_method adamw; fallback_learning_rate where it is"
        " none.", "curvature"
    )  # fmt: skip
    fallback_warmup_steps: int | None = setting(
        None, optional(COUNT), "In the first so many steps of a parameter that AdamW updates beside curvature, its rate"
        " is at most the share of them that is done. A schedule that warms up as long is followed as it is; 1, or none,"
        " for no limit.", "curvature"
    )  # fmt: skip
    weight_decay: float = setting(
        0.0, NOT_NEGATIVE, "Decoupled weight decay, at the base width; norm gains and biases are not decayed."
    )
    momentum: float = setting(
        0.9, FRACTION, "Decay of the moving average of gradients that is preconditioned.", "momentum"
    )
    momentum_order: str = setting(
        "before", one_of(("before", "after")), "Whether gradients are averaged before they are preconditioned, or what"
        " comes out of it.", "moving momentum"
    )  # fmt: skip
    nesterov: bool = setting(
        False, FLAG, "Nesterov's momentum: preconditions the average one step ahead.", "moving momentum"
    )
    beta2: float = setting(0.95, FRACTION, "Decay of the moving average of curvature statistics.", "average")
    exponent_a: float = setting(
        1.0, POSITIVE, "Exponent of the inverse of the damped input factor A; 1 is K-FAC, 0.5 its square root.",
        "exponents"
    )  # fmt: skip
    exponent_b: float = setting(1.0, POSITIVE, "Exponent of the inverse of the damped output factor B.", "exponents")
    damping: float = setting(
        1e-3,
        POSITIVE,
        "Damping strength ε, at the base width; its unit depends on `damping_rule`. In ekfac and tekfac it damps the"
        " product of two factors; for a head without output factor, or tied to the embedding, √ε takes its place under"
        " trace, trace_mean and spectral.",
        "damping",
    )
    damping_rule: str = setting(
        "trace", one_of(RULES), "How damping follows the factors: trace (ε·tr X), trace_mean (ε·tr X/dim), spectral"
        " (ε·λ_max), pi (Martens and Grosse), constant (ε times the width multiplier).", "damping"
    )  # fmt: skip
    damping_overrides: tuple[str, ...] = setting(
        (), (are_overrides, OVERRIDES_ALLOWED), "Another damping for some modules: pattern=strength or"
        " pattern=rule:strength, with a regular expression on module names; the first that matches counts.", "damping"
    )  # fmt: skip
    adaptive_damping: bool = setting(
        False, FLAG, "Levenberg-Marquardt: damping falls while the curvature predicts how the loss changes, and rises"
        " where it does not. Measured with two more forward passes every preconditioner_update_steps.", "damping"
    )  # fmt: skip
    factor_update_steps: int = setting(
        1,
        COUNT,
        "Steps between updates of a layer's curvature statistics: 5 in place of 2 saves K-FAC a tenth of a step's time"
        " and costs some loss (docs/speed.md). Layers take turns (all besides at steps 1, 2, 4, 7), each at its own"
        " refreshes where this divides preconditioner_update_steps. With fisher mc, all at once.",
        "statistics",
    )
    preconditioner_update_steps: int = setting(
        10,
        COUNT,
        "Steps between refreshes of a preconditioner; layers take turns, so that steps cost alike. Early refreshes are"
        " closer: all at steps 1, 2, 4, 7, then each at 1.5 times the step of its last, up to this interval.",
        "statistics",
    )
    fisher: str = setting(
        "empirical", one_of(("empirical", "mc")), "Whose labels the output gradients are of: empirical (the training"
        " labels, at no extra cost) or mc (drawn from the model's own predictions, one more backward pass on the steps"
        " that update statistics).", "tokens"
    )  # fmt: skip
    weight_sharing: str = setting(
        "expand", one_of(WEIGHT_SHARING), "What counts as an example of a layer: expand (every position of a sequence)"
        " or reduce (a sequence: its mean input, its summed output gradient).", "tokens"
    )  # fmt: skip
    factor_token_sketch: int | None = setting(
        None, optional(COUNT), "Factors from sums over so many tokens of a sequence with random signs (a count sketch):"
        " the same mean at a fraction of the products; 1 takes every token by itself. Where it is none: as many as"
        " leave a quarter as many rows as the factor has dimensions, and 256 (docs/speed.md).", "expanded tokens"
    )  # fmt: skip
    moment_token_stride: int | None = setting(
        None, optional(COUNT), "The second moments in the eigenbasis from one of so many tokens; 1 takes every token."
        " Where it is none: as many as leave about 128 tokens (docs/speed.md).", "token moments"
    )  # fmt: skip
    precondition_embeddings: bool = setting(
        False, FLAG, "Precondition the token embedding. The K-FAC family's input factor is a diagonal there: the"
        " frequencies of the tokens. One that is tied to the head needs precondition_head as well.", "statistics"
    )  # fmt: skip
    embedding_damping: float | None = setting(
        None, optional(POSITIVE), "Damping of both factors of a preconditioned embedding, in place of damping. Under"
        " trace the input side's is relative to the mean frequency of a token. Where it is none: 1, with which what is"
        " much rarer is not magnified further, or the head's where the two are tied, whose curvature 1 would swamp.",
        "embedding_damping"
    )  # fmt: skip
    precondition_head: bool = setting(
        False, FLAG, "Precondition the output head; the K-FAC family with the output factor that head_output_factor"
        " says, the Shampoo family on the sides of at most max_preconditioner_dim. A vocabulary within that limit costs"
        " it two matrices of vocabulary times vocabulary, here as for an embedding (34 MB at 2,048 entries, 537 MB at"
        " 8,192), and a decomposition of one at every refresh; a lower limit leaves it out.", "statistics"
    )  # fmt: skip
    head_output_factor: str = setting(
        "identity", one_of(("identity", "diagonal")), "Output factor of a preconditioned head, which has the size of"
        " the vocabulary: identity (the input side alone; times the mean of the diagonal where the head is tied to the"
        " embedding), or diagonal.", "head_output_factor"
    )  # fmt: skip
    precondition_biases: bool = setting(
        False, FLAG, "Precondition the biases of preconditioned weights, as one more column with an input of 1.",
        "tokens"
    )  # fmt: skip
    norm_control: str = setting(
        "spectral", one_of(NORM_CONTROLS), "What fixes the size of a"
        " preconditioned update: none, kl_clip (one factor for the whole model), graft_adam and graft_sgd (the norm of"
        " Adam's or SGD's update per layer) or spectral (spectral norm sqrt(fan_out/fan_in) per layer).", "curvature"
    )  # fmt: skip
    kl_clip: float = setting(
        1e-2,
        POSITIVE,
        "Bound κ on the estimated KL divergence of a step, for norm_control kl_clip.",
        "kl_clip",
    )
    shampoo_exponent: float = setting(
        0.25, one_of((0.25, 0.5)), "Exponent of the inverse of each of Shampoo's factors: 0.25 as published, or 0.5"
        " with the trace normalised.", "shampoo"
    )  # fmt: skip
    shampoo_accumulation: str = setting(
        "ema", one_of(("ema", "sum")), "Whether Shampoo averages its factors with `beta2` or sums them up.", "shampoo"
    )
    shampoo_root: str = setting(
        "eigen", one_of(("eigen", "newton")), "How Shampoo takes inverse roots: eigendecomposition or coupled Newton"
        " iteration.", "shampoo"
    )  # fmt: skip
    basis_tolerance: float = setting(
        0.0,
        NOT_NEGATIVE,
        "SOAP's basis stays while the off-diagonal share of its factor in it is at most this.",
        "basis",
    )
    expert_method: str = setting(
        "muon", one_of(("shampoo", "soap", "kl_shampoo", "muon", "adamw")), "Method of experts that are stored as"
        " one 3-D weight, whose tokens no module hands over: each by its own gradient, or adamw to leave them to the"
        " fallback. Methods that see gradients (shampoo, soap, kl_shampoo, muon) are their own.", "tokens"
    )  # fmt: skip
    split_heads: bool = setting(
        False, FLAG, "Precondition query, key and value projections by attention head, each as a matrix of its own; a"
        " fused projection, whose layout has to be known, also by kind. The coverage table says what is left whole.",
        "gradient alone"
    )  # fmt: skip
    max_preconditioner_dim: int = setting(
        8192, COUNT, "Larger dimensions are not preconditioned: weights with one fall back to AdamW, in the Shampoo"
        " family those with two; with one they are preconditioned on the other side.", "whole weights"
    )  # fmt: skip
    block_size: int | None = setting(
        None,
        optional(COUNT),
        "Larger dimensions are cut into blocks of at most this size: the Shampoo family's weights"
        " into tiles, the K-FAC family's factors into diagonal blocks. Each is damped by itself.",
        "factors",
    )
    curvature_matmul_precision: str = setting(
        "highest", one_of(MATMUL_PRECISIONS), "Products of the statistics and of preconditioning: highest (as torch is"
        " set) or medium (float32 inputs are rounded, to bfloat16 on a CPU and TF32 on a GPU; sums are float32).",
        "curvature"
    )  # fmt: skip
    gradient_worker_fraction: float = setting(
        1.0, SHARE, "Share of the ranks that hold a layer's statistics and preconditioner, rounded up to a number that"
        " divides the ranks: 1 (all) sends fresh preconditioners to all, less sends preconditioned gradients at every"
        " step instead, and 0 leaves each layer to one rank. Memory and traffic of either end: docs/scaling.md.",
        "curvature"
    )  # fmt: skip
    skip_modules: tuple[str, ...] = setting(
        (), (_are_patterns, "must be a list of regular expressions"), "Regular expressions: modules whose names match"
        " fall back to AdamW.", "curvature"
    )  # fmt: skip
    adam_beta1: float = setting(0.9, FRACTION, "First beta of AdamW.")
    adam_beta2: float = setting(0.95, FRACTION, "Second beta of AdamW.")
    adam_epsilon: float = setting(1e-8, NOT_NEGATIVE, "Epsilon of AdamW, at the base width.")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            accepts, allowed = entry.metadata["check"]
            if not accepts(value):
                raise ConfigurationError(entry.name, value, allowed)
        for name in LIST_SETTINGS:
            object.__setattr__(self, name, tuple(getattr(self, name)))


SETTING_NAMES = tuple(entry.name for entry in fields(Settings))
