"""A tiny Llama whose embedding is its head, in a plain loop with both preconditioned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from curvature.test_plain_loop import batches, distance, train, trained
from shared.helpers import BOTH_ENDS, assert_same_parameters, in_float64, tied_llama

import hf_so2

METHODS = ("kfac", "ekfac", "tkfac", "tekfac")
RATES = {"lr": 0.01, "fallback_learning_rate": 0.01}


@pytest.mark.parametrize("settings", [{}, {"head_output_factor": "diagonal"}, {"weight_sharing": "reduce"}], ids=str)
def test_the_split_of_a_batch_changes_nothing(settings: dict[str, str]) -> None:
    data, start = batches(), in_float64(tied_llama())
    options = {**BOTH_ENDS, **RATES, **settings}
    whole, _ = trained("kfac", data, model=in_float64(tied_llama()), **options)
    halves, _ = trained("kfac", data, 2, model=in_float64(tied_llama()), **options)
    assert distance(halves, whole, start) < 1e-8


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    data, recomputed = batches(), tied_llama()
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        recomputed.enable_input_require_grads()
    trained("kfac", data, model=recomputed, **BOTH_ENDS)
    assert_same_parameters(recomputed, trained("kfac", data, model=tied_llama(), **BOTH_ENDS)[0])


@pytest.mark.parametrize(("name", "damping_rule"), [*((name, "trace") for name in METHODS), ("kfac", "constant")])
def test_mup_at_the_base_width_is_the_standard_parametrization_bit_for_bit(name: str, damping_rule: str) -> None:
    data, settings = batches(count=3), {**BOTH_ENDS, "damping_rule": damping_rule}
    plain, _ = trained(name, data, model=tied_llama(), **settings)
    mup, _ = trained(f"{name}_mup", data, model=tied_llama(), base_config=tied_llama().config, **settings)
    assert_same_parameters(mup, plain)


def test_state_dict_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = batches(count=6)
    model, optimizer = trained("kfac", data[:3], model=tied_llama(), **BOTH_ENDS)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, data[3:])
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = tied_llama()
    other = hf_so2.build_optimizer("kfac", resumed, **BOTH_ENDS)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, data[3:])
    assert_same_parameters(resumed, model)


# Under other norm controls than spectral the default rates are safe rather than tuned, and lower.
@pytest.mark.parametrize(
    ("name", "norm_control", "share"),
    [*((name, "spectral", 0.8) for name in METHODS), ("kfac", "kl_clip", 0.9), ("kfac", "graft_adam", 0.9)],
)
def test_the_loss_falls_at_the_defaults(name: str, norm_control: str, share: float) -> None:
    model, (tokens,) = tied_llama(), batches(count=1)
    optimizer = hf_so2.build_optimizer(name, model, norm_control=norm_control, **BOTH_ENDS)
    with torch.no_grad():
        first = float(model(input_ids=tokens, labels=tokens).loss)
    train(model, optimizer, [tokens] * 15)
    assert optimizer.curvature.layers["model.embed_tokens.weight"].steps == 15
    with torch.no_grad():
        assert float(model(input_ids=tokens, labels=tokens).loss) < share * first


def test_damping_adapts() -> None:
    model, (tokens,) = tied_llama(), batches(count=1)
    optimizer = hf_so2.build_optimizer("kfac", model, adaptive_damping=True, norm_control="kl_clip", **BOTH_ENDS)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.reevaluate_with(lambda: model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.telemetry()["curvature/reduction_ratio"] > 0
