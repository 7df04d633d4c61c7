"""`apply_mup`: nothing at the base width, the table's initial weights beyond it, once, or one clear refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hf_so2 import ConfigurationError
from hf_so2.mup import apply_mup, infer_widths, read_mup, rules, scale_width
from hf_so2.mup.tiny import tiny_config

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "gemma", "qwen3", "mixtral", "mamba", "falcon")
RULES = (rules.SGD, rules.ADAM, rules.SPECTRAL, rules.SOAP, rules.NONE, rules.FOOF, rules.shampoo(0.5))
DAMPINGS = tuple(rules.DAMPING_EXPONENTS)


def fresh(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("family", FAMILIES)
def test_base_width_is_the_standard_parametrization_bit_for_bit(family: str) -> None:
    config = tiny_config(family)
    model = fresh(config)
    before, tokens = weights(model), torch.arange(8)[None]
    logits = model.eval()(input_ids=tokens).logits
    report = apply_mup(model, config)
    assert_unchanged(model, before)
    assert torch.equal(model(input_ids=tokens).logits, logits)
    assert set(report) == {name for name, _ in model.named_parameters()}
    for width in report.values():
        multipliers = [rules.init_multiplier(width)]
        multipliers += [rules.learning_rate_multiplier(rule, width) for rule in RULES]
        multipliers += [rules.weight_decay_multiplier(rule, width) for rule in RULES]
        multipliers += [rules.damping_multiplier(kind, width) for kind in DAMPINGS]
        assert set(multipliers) == {1.0}


# Standard deviations of weights with some ten thousand entries: a sampling error of about one percent.
MEASURED = {
    "llama": ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("family", MEASURED)
def test_initial_weights_follow_the_table(family: str) -> None:
    untied = {"tie_word_embeddings": False}
    base = tiny_config(family, **untied)
    wide = scale_width(base, multiplier=4)
    narrow_model, model = fresh(base), fresh(wide)
    apply_mup(narrow_model, base)
    apply_mup(model, base)
    embedding, hidden, head = MEASURED[family]
    if family == "gpt_neox" and hasattr(model, "embed_out"):  # as older versions of transformers call it
        head = "embed_out.weight"
    for name, exponent in ((embedding, 0.0), (hidden, -0.5), (head, -1.0)):
        growth = float(model.get_parameter(name).detach().std() / narrow_model.get_parameter(name).detach().std())
        assert growth == pytest.approx(4**exponent, rel=0.05), name


def test_every_norm_gain_and_bias_keeps_its_initial_value() -> None:
    model = fresh(scale_width(tiny_config("gpt_neox"), multiplier=4))
    before = weights(model)
    apply_mup(model, tiny_config("gpt_neox"))
    vectors = [name for name, parameter in model.named_parameters() if parameter.ndim == 1]
    assert vectors
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in vectors)


def test_a_tied_head_divides_the_logits_by_the_growth_of_the_width() -> None:
    base = tiny_config("gpt2")
    model = fresh(scale_width(base, multiplier=4))
    tokens = torch.arange(8)[None]
    # Hidden weights that are zero leave the residual stream, so the logits tell the head's factor alone.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".h." in name:
                parameter.zero_()
    plain = model.eval()(input_ids=tokens).logits
    report = apply_mup(model, base)
    torch.testing.assert_close(model(input_ids=tokens).logits, plain / 4)
    assert report["transformer.wte.weight"].tied


def test_the_second_time_is_refused() -> None:
    base = tiny_config("llama")
    model = fresh(scale_width(base, multiplier=2))
    report = apply_mup(model, base)
    before = weights(model)
    with pytest.raises(ConfigurationError, match="in muP already"):
        apply_mup(model, base)
    assert_unchanged(model, before)
    recorded = read_mup(model)
    assert recorded is not None
    assert dict(recorded) == dict(report)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reload_neither_rescales_nor_forgets(family: str, tmp_path: Path) -> None:
    base = tiny_config(family)
    model = fresh(scale_width(base, multiplier=2))
    report = apply_mup(model, base)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_unchanged(loaded, weights(model))
    recorded = read_mup(loaded)
    assert recorded is not None
    assert dict(recorded) == dict(report)
    assert recorded.base_width == report.base_width == 32
    with pytest.raises(ConfigurationError, match="in muP already"):
        apply_mup(loaded, base)
    assert_unchanged(loaded, weights(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pretrained_weights_are_kept(family: str, tmp_path: Path) -> None:
    base = tiny_config(family)
    fresh(scale_width(base, multiplier=2)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = weights(model)
    report = apply_mup(model, base)
    assert report.pretrained
    assert_unchanged(model, before)
    hidden = [width for width in report.values() if width.role == "hidden"]
    assert {rules.learning_rate_multiplier(rules.ADAM, width) for width in hidden} == {0.5}


def test_a_deeper_model_is_compared_layer_by_layer() -> None:
    base = tiny_config("llama")
    wide = scale_width(base, multiplier=2)
    deep = copy.deepcopy(wide)
    deep.num_hidden_layers = 5
    widths = infer_widths(fresh(deep), base)
    assert widths["model.layers.4.mlp.up_proj.weight"] == widths["model.layers.0.mlp.up_proj.weight"]
    assert widths["model.layers.4.mlp.up_proj.weight"].m_in == 2.0


def quantized(model: PreTrainedModel) -> None:
    model.config.quantization_config = SimpleNamespace(quant_method="any")


def integer(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)


def doubled() -> PretrainedConfig:
    return scale_width(tiny_config("llama"), multiplier=2)


@pytest.mark.parametrize(
    ("base", "spoil", "message"),
    [
        (tiny_config("mistral"), None, "must be of the model's family, 'llama'"),
        (scale_width(tiny_config("llama"), multiplier=4), None, "must not be wider than the model, 64"),
        (tiny_config("llama"), quantized, "is quantized"),
        (tiny_config("llama"), integer, "must be floating point"),
        (PretrainedConfig(), None, "must be of the model's family"),
        ("llama", None, "must be a transformers configuration or a module"),
        (tiny_config("llama", tie_word_embeddings=True), None, "base_config="),
    ],
    ids=["family", "wider", "quantized", "integer", "no_width", "no_config", "tied"],
)
def test_what_cannot_be_patched_is_refused_and_left_alone(
    base: PretrainedConfig, spoil: Callable[[PreTrainedModel], None] | None, message: str
) -> None:
    model = fresh(doubled())
    if spoil is not None:
        spoil(model)
    before, config = weights(model), model.config.__dict__.copy()
    with pytest.raises(ConfigurationError) as error:
        apply_mup(model, base)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert_unchanged(model, before)
    assert model.config.__dict__ == config
    assert "_so2_mup" not in vars(model)


def test_a_base_that_is_itself_scaled_is_refused() -> None:
    base = tiny_config("llama")
    middle = fresh(scale_width(base, multiplier=2))
    apply_mup(middle, base)
    model = fresh(scale_width(base, multiplier=4))
    before = weights(model)
    with pytest.raises(ConfigurationError, match="itself scaled"):
        apply_mup(model, middle.config)
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", ["gptj", "bloom"])
def test_larger_heads_where_no_weight_can_carry_the_scale(family: str) -> None:
    base = tiny_config(family)
    model = fresh(scale_width(base, multiplier=2, head="size"))
    if any(hasattr(module, "scaling") for name, module in model.named_modules() if name.endswith("attn")):
        pytest.skip(f"this version of transformers has a number for {family}'s scale")
    before = weights(model)
    with pytest.raises(ConfigurationError, match="head"):
        apply_mup(model, base)
    assert_unchanged(model, before)
    assert read_mup(model) is None


@pytest.mark.parametrize("family", ["falcon", "gpt_bigcode"])
def test_a_fused_projection_with_one_kv_head_grows_less_than_the_width(family: str) -> None:
    base = tiny_config(family, multi_query=True)
    widths = infer_widths(fresh(scale_width(base, multiplier=2)), base)
    fused = [w for name, w in widths.items() if name.endswith(("query_key_value.weight", "c_attn.weight"))]
    assert fused
    # Width 32 in 4 heads of 8: all queries and one head each of keys and values, 32 + 16 becomes 64 + 16.
    assert {(width.role, width.m_in, width.m_out) for width in fused} == {("hidden", 2.0, 80 / 48)}
