"""`apply_mup`: what it does to a model, that plain transformers reloads it, and that refusals leave the model alone."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from hf_so2 import ConfigurationError, build_optimizer, scale_width
from hf_so2.mup import MupReport, apply_mup, infer_widths, read_mup, rules
from hf_so2.mup.tiny import tiny_config

TOKENS = torch.arange(3, 35).view(2, 16)


def fresh(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logits(model: PreTrainedModel) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral", "mamba", "granite", "opt", "falcon_h1"])
def test_at_the_base_width_nothing_changes(family: str) -> None:
    base = tiny_config(family)
    model = fresh(base)
    before, expected = weights(model), logits(model)
    report = apply_mup(model, base)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(logits(model), expected)
    assert not report.notes
    for width in report.values():
        assert rules.init_multiplier(width) == 1.0
        for rule in (rules.SGD, rules.ADAM, rules.KFAC, rules.FOOF, rules.SPECTRAL, rules.SOAP, rules.shampoo(0.5)):
            assert rules.learning_rate_multiplier(rule, width) == 1.0
        assert {rules.damping_multiplier(kind, width) for kind in rules.DAMPING_EXPONENTS} == {1.0}


def test_initial_weights_of_an_untied_model() -> None:
    base = tiny_config("llama")
    model = fresh(scale_width(base, multiplier=4))
    before = weights(model)
    report = apply_mup(model, base)
    for name, parameter in model.named_parameters():
        expected = {"input": 1.0, "hidden": 0.5, "output": 0.25, "vector": 1.0}[report[name].role]
        assert torch.equal(parameter, before[name] * expected), name


@pytest.mark.parametrize("family", ["mamba", "rwkv", "recurrent_gemma", "xlstm", "modernbert-decoder"])
def test_a_width_that_the_family_divides_by_is_not_divided_by_again(family: str) -> None:
    base, multiplier = tiny_config(family), 4
    model = fresh(scale_width(base, multiplier=multiplier))
    report = apply_mup(model, base)
    of_base = weights(fresh(base, seed=1))
    for name, parameter in model.named_parameters():
        if report[name].role in ("input", "hidden", "output") and of_base[name].std() > 0:
            ratio = float(parameter.detach().std() / of_base[name].std())
            assert ratio == pytest.approx(rules.init_multiplier(report[name]), rel=0.15), name


def test_a_tied_head_sees_the_width_once() -> None:
    base = tiny_config("gpt2")
    model = fresh(scale_width(base, multiplier=4))
    plain = copy.deepcopy(model)
    report = apply_mup(model, base)
    assert len(report.notes) == 1
    assert "0.25" in report.notes[0]
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.mul_(0.5 if report[name].role == "hidden" else 1.0)
    torch.testing.assert_close(logits(model), logits(plain) / 4)


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> list[Tensor]:
    """Logits of four steps, times `factor`, on which the loss is computed."""
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        output = factor * model(input_ids=TOKENS, use_cache=False).logits
        nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
        seen.append(output.detach())
    return seen


def without_scales(model: PreTrainedModel, report: MupReport, names: set[str]) -> None:
    """Rewrites the model's record as if these parameters carried no factor."""
    widths = {
        name: replace(width, scale_in=1.0, scale_out=1.0) if name in names else width for name, width in report.items()
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    bare = MupReport(widths, shapes, base_width=report.base_width, width=report.width)
    model.config.so2_mup = bare.record()


NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
SETTINGS = {
    "adamw_mup": {"lr": 1e-2},
    "sgd_mup": {"lr": 0.3},
    "kfac_mup": {"lr": 0.05, "damping": 0.1, "norm_control": "none", "factor_update_steps": 1},
    "foof_mup": {"lr": 0.05, "damping": 0.1, "norm_control": "none", "factor_update_steps": 1},
}


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
@pytest.mark.parametrize("optim", SETTINGS)
def test_training_with_folded_logits_is_training_with_the_factor_outside(family: str, optim: str) -> None:
    base = tiny_config(family, **NO_DROPOUT.get(family, {}))
    folded = fresh(scale_width(base, multiplier=4)).double()
    report = apply_mup(folded, base)
    carriers = {name for name, width in report.items() if width.role == "vector" and width.scale_out != 1}
    factor = 1 / report[min(carriers)].scale_out
    outside = copy.deepcopy(folded)
    with torch.no_grad():
        for name in carriers:
            offset = 1.0 if family == "gemma" and name.endswith("weight") else 0.0
            carrier = outside.get_parameter(name)
            carrier.copy_((carrier + offset) / factor - offset)
    without_scales(outside, report, carriers)
    one = train(folded, build_optimizer(optim, folded, **SETTINGS[optim]))
    other = train(outside, build_optimizer(optim, outside, **SETTINGS[optim]), factor)
    tolerance = 1e-5 if family == "gemma" else 1e-9  # its norms compute in float32
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("optim", SETTINGS)
def test_training_with_a_folded_attention_scale_is_training_with_the_scale(family: str, optim: str) -> None:
    base = tiny_config(family)
    folded = fresh(scale_width(base, multiplier=4, head="size")).double()
    scaled = copy.deepcopy(folded)
    report = apply_mup(folded, base)
    folds = {name: w for name, w in report.items() if (w.scale_in, w.scale_out) != (1.0, 1.0)}
    assert folds
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            # Undo the fold: what is stored over what is meant is 1 / scale.
            width = report[name]
            parameter.copy_(folded.get_parameter(name) * width.scale_in * width.scale_out)
    for module in scaled.modules():
        if isinstance(getattr(module, "scaling", None), float):
            module.scaling /= 2  # sqrt(base head size / head size)
    scaled.config.so2_mup = folded.config.so2_mup
    vars(scaled)["_so2_mup"] = vars(folded)["_so2_mup"]
    without_scales(scaled, report, set(folds))
    one = train(folded, build_optimizer(optim, folded, **SETTINGS[optim]))
    other = train(scaled, build_optimizer(optim, scaled, **SETTINGS[optim]))
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 35).view(2, 16), use_cache=False).logits
torch.save(logits, sys.argv[2])
assert "hf_so2" not in sys.modules
"""


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("llama", "size"),
        ("gpt2", "count"),
        # A process each: the patches that these add to the two above are few.
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", "count"), ("gpt2", "size"))),
        pytest.param("gemma3_text", "size", marks=pytest.mark.slow),
    ],
)
def test_plain_transformers_in_another_process_computes_the_same_logits(family: str, head: str, tmp_path: Path) -> None:
    base = tiny_config(family)
    model = fresh(scale_width(base, multiplier=4, head=head))
    report = apply_mup(model, base)
    assert bool(report.notes) == ((family, head) != ("llama", "count"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "c_attn" in name:
                parameter.mul_(20)  # scores large enough that their scale shows
    expected = logits(model)
    model.save_pretrained(tmp_path / "model")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path / "model"), str(tmp_path / "logits")], check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_a_reloaded_model_is_in_mup_and_stays_as_it_is(tmp_path: Path) -> None:
    base = tiny_config("gpt2")
    model = fresh(scale_width(base, multiplier=4))
    report = apply_mup(model, base)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = read_mup(loaded)
    assert again == report
    assert str(again) == str(report)
    with pytest.raises(ConfigurationError, match="is in muP already"):
        apply_mup(loaded, base)
    assert torch.equal(logits(loaded), logits(model))
    build_optimizer("adamw_mup", loaded)  # needs no base: the record says it


def test_the_report_survives_json() -> None:
    base = tiny_config("mixtral")
    report = apply_mup(fresh(scale_width(base, multiplier=2)), base)
    again = MupReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert again.rows() == report.rows()
    patterns = [row["pattern"] for row in report.rows()]
    assert len(patterns) == len(set(patterns))
    row = report.rows()[patterns.index("model.layers.*.mlp.gate.weight")]
    assert (row["count"], row["role"], row["init"], row["lr_adam"], row["damping_A"]) == (2, "output", 0.5, 0.5, 2.0)


def test_a_configuration_may_serve_for_several_models() -> None:
    base = tiny_config("gemma3_text")
    config = scale_width(base, multiplier=2, head="size")
    before = config.to_dict()
    first = fresh(config)
    apply_mup(first, base)
    assert config.to_dict() == before
    second = fresh(config)
    assert read_mup(second) is None
    apply_mup(second, base)
    assert torch.equal(logits(first), logits(second))


def test_a_record_without_its_weights_is_refused() -> None:
    base = tiny_config("llama")
    model = fresh(scale_width(base, multiplier=2))
    apply_mup(model, base)
    with pytest.raises(ConfigurationError, match="does not belong to a freshly initialised model"):
        read_mup(fresh(model.config))


def test_pretrained_weights_stay(tmp_path: Path) -> None:
    proxy, config = tiny_config("gpt2"), scale_width(tiny_config("gpt2"), multiplier=4)
    fresh(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = weights(model)
    report = apply_mup(model, proxy)
    assert report.pretrained
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    fc, embedding = report["transformer.h.0.mlp.c_fc.weight"], report["transformer.wte.weight"]
    assert rules.learning_rate_multiplier(rules.ADAM, fc) == 0.25
    # Without a factor on the logits the head's side of a tied matrix limits its rate.
    assert rules.learning_rate_multiplier(rules.ADAM, embedding) == 0.25
    assert {row["init"] for row in report.rows()} == {1.0}


def test_native_multipliers_are_not_applied_twice() -> None:
    base = tiny_config("granite")
    wide = scale_width(base, multiplier=4)
    by_hand = type(base)(**{**wide.to_dict(), "logits_scaling": 4 * base.logits_scaling})
    report, scaled = apply_mup(fresh(wide), base), apply_mup(fresh(by_hand), base)
    head = "lm_head.weight"
    assert rules.init_multiplier(report[head]) == 0.25
    # The family divides the logits by 4 already, so the matrix keeps the base's deviation and Adam's rate.
    assert rules.init_multiplier(scaled[head]) == 1.0
    assert rules.learning_rate_multiplier(rules.ADAM, scaled[head]) == 1.0
    tied = type(base)(**{**by_hand.to_dict(), "tie_word_embeddings": True})
    tied_base = type(base)(**{**base.to_dict(), "tie_word_embeddings": True})
    assert not apply_mup(fresh(tied), tied_base).notes


class Plain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, 64, bias=False)


def test_plain_modules_by_the_power_law_of_their_own_weights() -> None:
    torch.manual_seed(0)
    model, base = Plain(256), Plain(64)
    before = weights(model)
    apply_mup(model, base)
    # nn.Linear divides by the root of fan_in by itself: the hidden layer is left alone, the head gets the other root.
    assert torch.equal(model.hidden.weight, before["hidden.weight"])
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    torch.testing.assert_close(model.head.weight, before["head.weight"] / 2)
    assert read_mup(model) is not None
    with pytest.raises(ConfigurationError, match="is in muP already"):
        apply_mup(model, base)


def quantized() -> PreTrainedModel:
    model = fresh(tiny_config("llama"))
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config("llama"))


REFUSALS: dict[str, tuple[Callable[[], nn.Module], Callable[[], object], str]] = {
    "another family": (lambda: fresh(tiny_config("llama")), lambda: GPT2Config(n_embd=32, n_head=4), "family, 'llama'"),
    "a wider base": (
        lambda: fresh(tiny_config("llama")),
        lambda: scale_width(tiny_config("llama"), multiplier=2),
        "base_config=64: must not be wider than the model, 32",
    ),
    "quantized": (quantized, lambda: tiny_config("llama"), "is quantized"),
    "no weights": (on_meta, lambda: tiny_config("llama"), "is on the meta device"),
    "no width": (lambda: fresh(tiny_config("llama")), PretrainedConfig, "must be of the model's family"),
    "inlined attention scale": (
        lambda: fresh(scale_width(tiny_config("bloom"), multiplier=2, head="size")),
        lambda: tiny_config("bloom"),
        "head_dim=16: scale of BloomAttention not found; must stay 8",
    ),
    "no place for the attention scale": (
        lambda: fresh(scale_width(tiny_config("nanochat"), multiplier=2, head="size")),
        lambda: tiny_config("nanochat"),
        "no weight can carry its attention scale",
    ),
    "a scaled base": (
        lambda: fresh(scale_width(tiny_config("llama"), multiplier=4)),
        lambda: (lambda model: (apply_mup(model, tiny_config("llama")), model.config)[1])(
            fresh(scale_width(tiny_config("llama"), multiplier=2))
        ),
        "base_config=64: is itself scaled from width 32",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_model_is_left_untouched(case: str) -> None:
    make, base, message = REFUSALS[case]
    model = make()
    before, fields = weights(model), json.dumps(model.config.to_dict(), default=str)
    with pytest.raises(ConfigurationError) as error:
        apply_mup(model, base())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert json.dumps(model.config.to_dict(), default=str) == fields
    for name, parameter in model.named_parameters():
        assert parameter.is_meta or torch.equal(parameter, before[name])


def test_a_failed_fold_undoes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_config("gpt2")
    model = fresh(scale_width(base, multiplier=2))
    before = weights(model)
    monkeypatch.setattr("hf_so2.mup.folding._equal", lambda *_: False)
    with pytest.raises(ConfigurationError, match=r"^tie_word_embeddings=True: no layer .* must be False$"):
        apply_mup(model, base)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert read_mup(model) is None


def test_infer_widths_agrees_with_the_report() -> None:
    base = LlamaConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=64, num_hidden_layers=1)
    config = scale_width(base, multiplier=2)
    model = fresh(config)
    widths = infer_widths(model, base)
    assert dict(apply_mup(model, base)) == widths
