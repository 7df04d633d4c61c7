"""Every hyperparameter's illegal values, unknown names, and settings that a method would ignore."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import hf_so2
from hf_so2.commands.settings_table import page
from hf_so2.optim import Settings

NAN, INF = float("nan"), float("inf")
NOT_A_NUMBER = ["0.1", NAN, INF, -INF, True, [1.0]]
POSITIVE = [0, 0.0, -1e-3, *NOT_A_NUMBER]
NOT_NEGATIVE = [-1e-9, *NOT_A_NUMBER]
FRACTION = [-0.1, 1, 1.0, 2.5, *NOT_A_NUMBER]
COUNT = [0, -1, 1.5, 2.0, "3", True, NAN]
ILLEGAL: dict[str, list[Any]] = {
    "lr": POSITIVE,
    "fallback_learning_rate": POSITIVE,
    "bias_learning_rate": POSITIVE,
    "hidden_fallback_learning_rate": POSITIVE,
    "fallback_warmup_steps": COUNT,
    "weight_decay": NOT_NEGATIVE,
    "momentum": FRACTION,
    "momentum_order": ["", "Before", "then", 1, None],
    "nesterov": [0, 1, "yes", None],
    "split_heads": [0, 1, "yes", None],
    "beta2": FRACTION,
    "exponent_a": POSITIVE,
    "exponent_b": POSITIVE,
    "damping": POSITIVE,
    "damping_rule": ["", "Trace", "traces", 1, None],
    "damping_overrides": [
        "q_proj=0.1",
        3,
        {"q_proj": 1},
        [None],
        [("q_proj", 0.1)],
        *([text] for text in ("", "q_proj", "=0.1", "q_proj=", "q_proj=big", "q_proj=0", "q_proj=-1", "q_proj=nan")),
        *([text] for text in ("q_proj=inf", "(=0.1", "q_proj=trace", "q_proj=trace:", "q_proj=traces:0.1")),
    ],
    "adaptive_damping": [0, 1, "yes", None],
    "factor_update_steps": COUNT,
    "factor_token_sketch": COUNT,
    "moment_token_stride": COUNT,
    "preconditioner_update_steps": COUNT,
    "fisher": ["", "MC", "exact", 1, None],
    "weight_sharing": ["", "Reduce", "sum", 1, None],
    "precondition_embeddings": [0, 1, "yes", None],
    "embedding_damping": POSITIVE,
    "precondition_head": [0, 1, "yes", None],
    "head_output_factor": ["", "full", 1, None],
    "precondition_biases": [0, 1, "yes", None],
    "norm_control": ["", "Spectral", "clip", 0, None, ["spectral"]],
    "kl_clip": POSITIVE,
    "shampoo_exponent": [0.3, 1.0, "0.25", None],
    "shampoo_accumulation": ["", "mean", None],
    "shampoo_root": ["", "svd", None],
    "basis_tolerance": NOT_NEGATIVE,
    "max_preconditioner_dim": COUNT,
    "block_size": COUNT,
    "expert_method": ["sgd", "kfac", "", None],
    "curvature_matmul_precision": ["high", "bf16", None],
    "gradient_worker_fraction": [-0.1, 1.01, *NOT_A_NUMBER],
    "skip_modules": ["q_proj", 3, (1, 2), [None], {"q_proj": 1}],
    "adam_beta1": FRACTION,
    "adam_beta2": FRACTION,
    "adam_epsilon": NOT_NEGATIVE,
}
ALLOWED = {
    "damping_rule": "trace, trace_mean, spectral, pi, constant",
    "fisher": "empirical, mc",
    "weight_sharing": "expand, reduce",
    "head_output_factor": "identity, diagonal",
    "norm_control": "none, kl_clip, graft_adam, graft_sgd, spectral",
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


def test_no_setting_goes_untested() -> None:
    assert ILLEGAL.keys() == {entry.name for entry in dataclasses.fields(Settings)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ILLEGAL.items() for value in values])
def test_illegal_value_is_refused_in_one_sentence(name: str, value: Any) -> None:
    """The sentence names the field, the value and what is allowed; the error carries all three."""
    with pytest.raises(hf_so2.ConfigurationError) as caught:
        Settings(**{name: value})
    error, text = caught.value, str(caught.value)
    assert error.field == name
    assert text.startswith(f"{name}={value!r}: must be ")
    assert ALLOWED.get(name, "") in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in ILLEGAL.items() for value in values if value is not None and name != "kl_clip"],
)
def test_build_optimizer_refuses_it_too(name: str, value: Any) -> None:
    """None is the one exception: there it means "the method's default"."""
    with pytest.raises(hf_so2.ConfigurationError, match=f"^{name}="):
        hf_so2.build_optimizer("kfac", mlp(), **{name: value})


@pytest.mark.parametrize("name", ILLEGAL)
def test_none_takes_the_default(name: str) -> None:
    given = hf_so2.build_optimizer("kfac", mlp(), **{name: None}).settings
    assert given == hf_so2.build_optimizer("kfac", mlp()).settings


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("dampening", "damping"),
        ("dampingrule", "damping_rule"),
        ("fallback_lr", "fallback_learning_rate"),
        ("learning_rat", "learning_rate"),
        ("weight_decy", "weight_decay"),
        ("norm_contrl", "norm_control"),
    ],
)
def test_unknown_setting_gets_a_hint(wrong: str, right: str) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=f"(?s)^{wrong}=.*did you mean '{right}'"):
        hf_so2.build_optimizer("kfac", mlp(), **{wrong: 0.1})


@pytest.mark.parametrize(("wrong", "right"), [("kfca", "kfac"), ("adamww", "adamw"), ("kfac_mpu", "kfac_mup")])
def test_unknown_optimizer_gets_a_hint(wrong: str, right: str) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=f"^optim='{wrong}'.*did you mean '{right}'") as caught:
        hf_so2.build_optimizer(wrong, mlp())
    assert all(name in str(caught.value) for name in hf_so2.OPTIMIZERS)


@pytest.mark.parametrize(
    ("optim", "settings"),
    [
        ("adamw", {"damping": 0.1}),
        ("adamw", {"momentum": 0.5}),
        ("sgd", {"norm_control": "spectral"}),
        ("sgd", {"beta2": 0.9}),
        ("kfac", {"head_output_factor": "diagonal"}),
        ("foof", {"head_output_factor": "diagonal", "precondition_head": True}),
        ("kfac", {"embedding_damping": 0.5}),
        ("kfac", {"moment_token_stride": 2}),
        ("kfac", {"factor_token_sketch": 2, "weight_sharing": "reduce"}),
        ("soap", {"factor_token_sketch": 2}),
        ("shampoo", {"fisher": "mc"}),
        ("muon", {"precondition_head": True}),
        ("shampoo", {"embedding_damping": 0.5, "precondition_embeddings": True}),
        ("soap", {"head_output_factor": "diagonal", "precondition_head": True}),
        ("kfac", {"kl_clip": 0.1}),
        ("kfac", {"kl_clip": 0.1, "norm_control": "none"}),
        ("adamw", {"kl_clip": 0.1}),
        ("kfac", {"nesterov": True, "momentum": 0.0}),
        ("soap", {"momentum_order": "after", "momentum": 0.0}),
        ("shampoo", {"beta2": 0.9, "shampoo_accumulation": "sum"}),
        ("muon", {"max_preconditioner_dim": 64, "block_size": 32}),
        ("sgd", {"damping_overrides": ["0=0.1"]}),
        ("adamw", {"adaptive_damping": True}),
    ],
)
def test_setting_without_effect_is_refused(optim: str, settings: dict[str, Any]) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=rf"^{next(iter(settings))}=.*has no effect on {optim}"):
        hf_so2.build_optimizer(optim, mlp(), **settings)


def test_both_spellings_of_the_learning_rate() -> None:
    assert hf_so2.build_optimizer("kfac", mlp(), learning_rate=0.2).settings.lr == 0.2
    with pytest.raises(hf_so2.ConfigurationError, match=r"^learning_rate=0\.2: .*lr"):
        hf_so2.build_optimizer("kfac", mlp(), lr=0.1, learning_rate=0.2)


@pytest.mark.parametrize("pattern", ["(", "[a-", "no_such_module"])
def test_skip_pattern_that_cannot_match_is_refused(pattern: str) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^skip_modules="):
        hf_so2.build_optimizer("kfac", mlp(), skip_modules=[pattern])


def test_damping_is_overridden_by_module_pattern() -> None:
    """The first pattern that matches counts, without a rule for the strength alone; the coverage table shows it."""
    entries = ["^0$=spectral:0.5", "0|2=0.25", "(?=2)2=0.125"]
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = hf_so2.build_optimizer("kfac", model, damping=0.01, damping_rule="pi", damping_overrides=entries)
    dampings = {name: layer.damping for name, layer in optimizer.curvature.layers.items()}
    assert [(d.rule, d.epsilon) for d in dampings.values()] == [("spectral", 0.5), ("pi", 0.01), ("pi", 0.25)]
    header, *rows = optimizer.coverage().rows()
    assert {row[header.index("damping")] for row in rows} == {"spectral 0.5", "pi 0.01", "pi 0.25", "-"}


@pytest.mark.parametrize(("pattern", "skip"), [("no_such_module", ()), ("^1$", ["^1$"])])
def test_override_that_matches_no_preconditioned_weight_is_refused(pattern: str, skip: Any) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^damping_overrides=.*must match"):
        hf_so2.build_optimizer("kfac", mlp(), damping_overrides=["0=0.1", f"{pattern}=0.1"], skip_modules=skip)


def test_skipped_and_large_modules_fall_back_and_the_table_says_why() -> None:
    skipped = hf_so2.build_optimizer("kfac", mlp(), skip_modules=["^1$"]).coverage().parameters
    assert [entry.algorithm for entry in skipped] == ["kfac", "adamw", "adamw", "adamw"]
    assert "skip_modules" in skipped[2].reason
    large = hf_so2.build_optimizer("kfac", mlp(), max_preconditioner_dim=4).coverage().parameters
    assert [entry.algorithm for entry in large] == ["adamw"] * 4
    assert "max_preconditioner_dim 4" in large[0].reason


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(hf_so2.ConfigurationError, match="requires a gradient"):
        hf_so2.build_optimizer("kfac", mlp().requires_grad_(False))


def test_mup_name_without_a_base_is_refused() -> None:
    with pytest.raises(hf_so2.ConfigurationError, match="base_config"):
        hf_so2.build_optimizer("kfac_mup", mlp())


def test_settings_cannot_be_changed_and_errors_can_be_pickled() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().lr = 1.0  # type: ignore[misc]
    error = pickle.loads(pickle.dumps(hf_so2.ConfigurationError("damping", -1, "must be a number above 0")))
    assert str(error) == "damping=-1: must be a number above 0"


def test_the_page_of_settings_is_up_to_date() -> None:
    root = Path(__file__).parents[2]
    expected = (root / "docs" / "settings.md").read_text("utf-8")
    assert expected == page() + "\n", "hf-so2 settings-table > docs/settings.md"
