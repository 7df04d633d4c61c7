"""A base of another depth: configurations, the residual branches of the families, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import llama, optimizer_of, token_rows, trained
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from hf_so2 import ConfigurationError, apply_mup, build_optimizer, scale_depth, scale_width
from hf_so2.mup import read_mup, rules
from hf_so2.mup.depth import depth_growth, patch, text_depth
from hf_so2.mup.tiny import tiny_config

# The modules of one layer whose outputs are added to the stream, written down from the families' own code.
BRANCHES: dict[str, tuple[str, ...]] = {
    "llama": ("self_attn.o_proj", "mlp"),
    "mistral": ("self_attn.o_proj", "mlp"),
    "qwen2": ("self_attn.o_proj", "mlp"),
    "qwen3": ("self_attn.o_proj", "mlp"),
    "phi3": ("self_attn.o_proj", "mlp"),
    "gemma": ("self_attn.o_proj", "mlp"),
    # Norms behind the branches.
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    # Parallel branches.
    "gpt_neox": ("attention.dense", "mlp"),
    "phi": ("self_attn.dense", "mlp"),
    "falcon": ("self_attention.dense", "mlp"),
    "gptj": ("attn.out_proj", "mlp"),
    # Biases, Conv1D, norms behind the sum (BERT's kind), recurrences.
    "gpt2": ("attn.c_proj", "mlp"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "openai-gpt": ("attn.c_proj", "mlp"),
    "bert": ("attention.output.dense", "output.dense"),
    "mamba": ("mixer",),
    # Experts.
    "mixtral": ("self_attn.o_proj", "mlp.experts"),
    "qwen2_moe": ("self_attn.o_proj", "mlp"),
    "gpt_oss": ("self_attn.o_proj", "mlp.experts"),
    # Multipliers of the family's own.
    "granite": ("self_attn.o_proj", "mlp"),
    "minicpm3": ("self_attn.o_proj", "mlp"),
}
# What these families do by themselves when they become three times as deep: initial values and multipliers.
OWN_INIT = {"gpt2": 3**-0.5}
OWN_MULTIPLIER = {"minicpm3": 3**-0.5}


def fresh(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model whose branches matter; everything but what a family initialises in a way of its own is drawn anew."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits


def layers_of(model: PreTrainedModel, names: tuple[str, ...]) -> list[nn.Module]:
    ends = tuple(f".{name}" for name in names)
    found = [
        m
        for n, m in model.named_modules()
        if n.endswith(ends) and n.removesuffix(next(e for e in ends if n.endswith(e)))[-1].isdigit()
    ]
    assert len(found) == len(names) * text_depth(model.config)
    return found


def scale_output(factor: float) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    return hook


@pytest.mark.parametrize("family", BRANCHES)
def test_branches_are_multiplied_where_the_family_adds_them(family: str) -> None:
    base = tiny_config(family)
    if family == "bert":
        base.is_decoder = True
    config = scale_depth(base, multiplier=3)
    model, oracle = fresh(config), fresh(config)
    report = apply_mup(model, base, pretrained=False)
    # Initial values that the family divides by a power of the depth are brought back to the base's.
    factor = 1 / 3 / OWN_MULTIPLIER.get(family, 1.0)
    names = BRANCHES[family]
    if family in OWN_INIT:
        with torch.no_grad():
            for name, parameter in oracle.named_parameters():
                if name.endswith(".c_proj.weight"):
                    parameter.div_(OWN_INIT[family])
    plain = logits(oracle)
    for module in layers_of(oracle, names):
        module.register_forward_hook(scale_output(factor))
    torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-4, atol=2e-5)
    assert float((logits(model) - plain).abs().max()) > 1e-2
    inside = {name for name, width in report.items() if width.depth == 3}
    assert {n for n, width in report.items() if width.role == "hidden" and ".1." in n} <= inside
    assert not any("embed" in name or "lm_head" in name or "wte" in name for name in inside)


def test_a_reload_computes_the_same_and_knows_its_depth(tmp_path: Path) -> None:
    for family in ("llama", "gemma2", "granite", "minicpm3"):
        base = tiny_config(family)
        model = fresh(scale_depth(scale_width(base, multiplier=2), multiplier=2))
        report = apply_mup(model, base)
        model.save_pretrained(tmp_path / family)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert torch.equal(logits(loaded.eval()), logits(model))
        again = read_mup(loaded)
        assert again == report
        assert again is not None
        assert (again.base_depth, again.depth) == (2, 4)
        assert "residual branches times 0.5, 2 layers to 4" in str(again)
        assert "base depth 2, depth 4" in str(again)


def test_at_the_base_depth_nothing_is_sought_and_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(patch, "make_probe")
    base = tiny_config("llama")
    model = fresh(base)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = apply_mup(model, base)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert {width.depth for width in report.values()} == {1.0}
    assert "depth" not in model.config.so2_mup
    assert {len(packed) for packed in model.config.so2_mup["parameters"].values()} == {6}


def test_a_shallower_model_multiplies_its_branches() -> None:
    base = scale_depth(tiny_config("llama"), 4)
    model, before = fresh(tiny_config("llama")), fresh(tiny_config("llama"))
    apply_mup(model, base)
    for name, parameter in before.named_parameters():
        factor = 2.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(model.get_parameter(name), factor * parameter)


def test_width_and_depth_go_together() -> None:
    base = tiny_config("llama")
    model = fresh(scale_depth(scale_width(base, multiplier=4), multiplier=2))
    width = apply_mup(model, base)["model.layers.3.mlp.down_proj.weight"]
    assert (width.role, width.m_in, width.m_out, width.scale_out, width.depth) == ("hidden", 4, 4, 2, 2)
    assert rules.learning_rate_multiplier(rules.ADAM, width) == 1 / 8
    assert rules.init_multiplier(width) == 1 / 4


def test_pretrained_weights_are_kept_and_their_rates_scale(tmp_path: Path) -> None:
    base = tiny_config("granite")
    fresh(scale_depth(base, multiplier=2)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = apply_mup(model, base)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert model.config.residual_multiplier == 1.0
    rates = {n.split(".")[-2]: rules.learning_rate_multiplier(rules.ADAM, w) for n, w in report.items() if w.depth != 1}
    assert (rates["q_proj"], rates["o_proj"], rates["down_proj"]) == (1, 0.5, 0.5)


def test_a_model_whose_own_multiplier_does_it_already_is_left_alone() -> None:
    base = tiny_config("granite")
    config = scale_depth(base, multiplier=2)
    config.residual_multiplier = base.residual_multiplier / 2
    model, before = fresh(config), fresh(config)
    report = apply_mup(model, base)
    assert torch.equal(logits(model), logits(before))
    assert report["model.layers.0.mlp.down_proj.weight"].depth == 2.0


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("doge", "base_config='doge': must be as deep as the model, DogeForCausalLM: no residual branch is found"),
        (
            "longcat_flash",
            "must be as deep as the model, Long.*: .* acts on the stream otherwise than by a residual branch",
        ),
        ("olmo_hybrid", "must be as deep as the model, Olmo.*: the last weights of .* cannot carry a factor"),
    ],
)
def test_families_that_cannot_are_refused_by_name_at_another_depth_only(family: str, message: str) -> None:
    base = tiny_config(family)
    deep = fresh(scale_depth(base, multiplier=2))
    before = {name: parameter.detach().clone() for name, parameter in deep.named_parameters()}
    with pytest.raises(ConfigurationError, match=message) as caught:
        apply_mup(deep, base)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in deep.named_parameters())
    assert apply_mup(fresh(base), base).depth == 0


def test_the_trainers_base_config_counts_with_its_depth(tmp_path: Path) -> None:
    base = llama(num_hidden_layers=1).config.to_dict()
    trainer = trained(
        llama(num_hidden_layers=3), token_rows(4), tmp_path, optim="kfac_mup", mup_base_config=base, max_steps=1
    )
    report = read_mup(trainer.model)
    assert report is not None
    assert (report.base_depth, report.depth) == (1, 3)
    assert report["model.layers.2.mlp.down_proj.weight"].scale_out == 3
    groups = optimizer_of(trainer).param_groups
    initial = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    up, down = (
        initial[id(trainer.model.model.layers[2].mlp.get_submodule(n).weight)] for n in ("up_proj", "down_proj")
    )
    assert up == pytest.approx(3 * down)
    doge = AutoModelForCausalLM.from_config(scale_depth(tiny_config("doge"), multiplier=2))
    shallow = tiny_config("doge").to_dict()
    with pytest.raises(ConfigurationError, match=r"^mup_base_config=.*: must be as deep as the model, DogeForCausalLM"):
        trained(doge, token_rows(4), tmp_path, optim="kfac_mup", mup_base_config=shallow, max_steps=1)


class Blocks(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))


def test_a_module_of_another_depth_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^base_config='Blocks of another depth': must be as deep as the model, Blocks: "
    ):
        apply_mup(Blocks(3), Blocks(2))
    apply_mup(Blocks(2), Blocks(2))


def test_a_base_that_is_itself_scaled_is_refused() -> None:
    base = tiny_config("llama")
    model = fresh(scale_depth(base, multiplier=2))
    apply_mup(model, base)
    with pytest.raises(ConfigurationError, match=r"^base_config=4: is itself scaled from depth 2$"):
        build_optimizer("adamw_mup", fresh(scale_depth(base, multiplier=4)), base_config=model.config)


def test_scale_depth_takes_lists_of_layers_along_and_back() -> None:
    kinds = ["sliding_attention", "full_attention"]
    base = tiny_config("gemma2", layer_types=kinds)
    deep = scale_depth(base, 6)
    assert (deep.num_hidden_layers, deep.layer_types) == (6, kinds * 3)
    assert scale_depth(deep, 2).to_dict() == base.to_dict()
    assert depth_growth(base, deep) == 3.0
    assert depth_growth(deep, base) == 1 / 3
    assert scale_depth(tiny_config("gpt_neo"), 6).attention_layers == ["global", "local"] * 3
    assert scale_depth(tiny_config("bamba"), 6).attn_layer_indices == [1, 3, 5]
    assert scale_depth(base, multiplier=1).to_dict() == base.to_dict()
    assert "so2_mup" not in scale_depth(deep, 2).to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "depth=None: give exactly one of depth and multiplier"),
        ({"depth": 4, "multiplier": 2}, "depth=4: give exactly one of depth and multiplier"),
        ({"depth": 0}, "depth=0: must be a positive number"),
        ({"depth": True}, "depth=True: must be a positive number"),
        ({"multiplier": float("nan")}, "multiplier=nan: must be a positive number"),
        ({"depth": float("inf")}, "depth=inf: must be a positive number"),
        (
            {"multiplier": 1.25},
            "multiplier=1.25: must give a whole number of layers, and num_hidden_layers of 2 would ",
        ),
    ],
)
def test_depths_that_cannot_be_had(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        scale_depth(LlamaConfig(num_hidden_layers=2), **arguments)
