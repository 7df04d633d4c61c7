"""Mixture-of-experts layers: modules of their own, and the 3-D weights that transformers keeps experts in."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from shared.helpers import SMALL, assert_same_parameters, in_float64, relative_error
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import hf_so2
from hf_so2.errors import ConfigurationError

GRADIENT_BASED = ("shampoo", "soap", "kl_shampoo", "muon")
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 4},
}


def moe(family: str = "mixtral", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | ROUTED | FAMILIES[family] | changes))
    # The other implementations multiply in float32 at most.
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").train()


def batch(seed: int, rows: int = 4) -> Tensor:
    return torch.randint(1, 32, (rows, 9), generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer, tokens: Tensor) -> float:
    optimizer.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


class Separate(nn.Module):
    """Every row goes through the expert that it names; every expert is a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(5, 4, bias=False) for _ in range(3))
        self.double()

    def weight(self, index: int) -> Tensor:
        return self.experts[index].weight

    def apply_to(self, rows: Tensor, index: int) -> Tensor:
        return self.experts[index](rows)

    def forward(self, rows: Tensor, choice: Tensor) -> Tensor:
        outputs = rows.new_zeros(len(rows), 4)
        for index in range(3):
            chosen = choice == index
            if chosen.any():
                outputs[chosen] = self.apply_to(rows[chosen], index)
        return outputs


class Experts(nn.Module):
    """The weights of `Separate` as one tensor, (expert, fan_out, fan_in), or with the last two the other way round."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        weights = torch.stack([Separate().weight(index) for index in range(3)]).detach()
        self.up_proj = nn.Parameter(weights.mT.contiguous() if is_transposed else weights)


class Fused(Separate):
    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(is_transposed=is_transposed)

    def weight(self, index: int) -> Tensor:
        weight = self.experts.up_proj[index]
        return weight.mT if self.experts.is_transposed else weight

    def apply_to(self, rows: Tensor, index: int) -> Tensor:
        return rows @ self.weight(index).mT


def test_every_expert_averages_over_its_own_tokens_and_an_idle_one_keeps_its_state() -> None:
    """Loss `cᵀ u / N` over all rows: `A` averages over the expert's rows, `B` over the tokens of the loss."""
    model, generator = Separate(), torch.Generator().manual_seed(1)
    optimizer = hf_so2.build_optimizer("kfac", model, beta2=0.0)
    rows, costs = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (5, 4))
    first = torch.tensor([0, 1, 2] * 4)

    def make_step(choice: Tensor) -> dict[str, dict[str, Tensor]]:
        optimizer.zero_grad()
        optimizer.announce(tokens=12, gradient_scale=1 / 12)
        ((model(rows, choice) * costs).sum() / 12).backward()
        optimizer.step()
        return {
            name: {k: v.clone() for k, v in layer.state.items()} for name, layer in optimizer.curvature.layers.items()
        }

    before = make_step(first)
    for index in range(3):
        h, delta = rows[first == index], costs[first == index]
        state = before[f"experts.{index}.weight"]
        assert relative_error(state["A"], h.mT @ h / len(h)) < 1e-13
        assert relative_error(state["B"], delta.mT @ delta / 12) < 1e-13
    idle = model.experts[2].weight.detach().clone()
    after = make_step(first % 2)
    for key in ("A", "B", "weight"):
        assert torch.equal(after["experts.2.weight"][key], before["experts.2.weight"][key])
    assert torch.equal(model.experts[2].weight, idle)
    assert not torch.equal(after["experts.0.weight"]["A"], before["experts.0.weight"]["A"])


# Which experts see tokens at each step: one comes late, each is idle for a while.
USES = [(0, 1), (0, 1), (0, 2), (2, 0), (1, 2), (0, 1, 2), (1,), (0, 1, 2), (0, 1, 2)]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("norm_control", ["spectral", "graft_adam", "none"])
@pytest.mark.parametrize("name", GRADIENT_BASED)
def test_an_expert_is_updated_as_the_same_weight_of_a_module_is(
    name: str, norm_control: str, is_transposed: bool
) -> None:
    separate, fused = Separate(), Fused(is_transposed=is_transposed)
    settings = {"lr": 0.01, "weight_decay": 0.1, "norm_control": norm_control}
    if name != "muon":
        settings["preconditioner_update_steps"] = 2
    optimizers = [hf_so2.build_optimizer(name, model, **settings) for model in (separate, fused)]
    for seed, used in enumerate(USES):
        generator = torch.Generator().manual_seed(seed)
        rows, costs = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (5, 4))
        choice = torch.tensor(used).repeat(12 // len(used))
        idle = [index for index in range(3) if index not in used]
        before = {index: fused.weight(index).detach().clone() for index in idle}
        layers = optimizers[1].curvature.layers
        kept = {i: {k: v.clone() for k, v in layers[f"experts.up_proj[{i}]"].state.items()} for i in idle}
        for model, optimizer in zip((separate, fused), optimizers, strict=True):
            optimizer.zero_grad()
            (model(rows, choice) * costs).sum().backward()
            optimizer.step()
        for index in range(3):
            # Muon rounds to bfloat16, whose numbers are 4e-3 apart; a transposed weight is rounded in another order.
            assert relative_error(fused.weight(index), separate.weight(index)) < (1e-4 if name == "muon" else 1e-10)
        for index in idle:
            assert torch.equal(fused.weight(index), before[index])
            moments = {name: value for name, value in kept[index].items() if name in ("L", "R", "weight", "V", "M")}
            for key, value in moments.items():
                # SOAP turns its moments with a basis that a refresh moves, whoever is idle.
                if name != "soap" or key in ("L", "R", "weight"):
                    assert torch.equal(layers[f"experts.up_proj[{index}]"].state[key], value), key


@pytest.mark.parametrize("name", ["kfac", "kl_shampoo", "soap", "shampoo", "muon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_preconditioned_and_learn(family: str, name: str) -> None:
    model = moe(family)
    optimizer = hf_so2.build_optimizer(name, model)
    losses = [step(model, optimizer, batch(0)) for _ in range(12)]
    assert losses[-1] < losses[0] / 2
    found = {entry.name: entry for entry in optimizer.coverage().parameters}
    experts = [entry for key, entry in found.items() if ".experts." in key and len(entry.shape) == 3]
    assert len(experts) == 2
    for entry in experts:
        assert entry.algorithm == ("muon" if name == "kfac" else name)
        assert entry.reason.startswith("4 matrices of ")


@pytest.mark.parametrize("name", ["kfac_mup", "soap_mup"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_going_on_from_a_saved_state_is_going_on(family: str, name: str) -> None:
    base = moe(family).config
    straight, resumed = moe(family), moe(family)
    first = hf_so2.build_optimizer(name, straight, base_config=base)
    second = hf_so2.build_optimizer(name, resumed, base_config=base)
    for seed in range(3):
        step(straight, first, batch(seed, 1))
        step(resumed, second, batch(seed, 1))
    file = io.BytesIO()
    torch.save({"model": resumed.state_dict(), "optimizer": second.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = moe(family)
    resumed.load_state_dict(saved["model"])
    second = hf_so2.build_optimizer(name, resumed, base_config=base)
    second.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        step(straight, first, batch(seed, 1))
        step(resumed, second, batch(seed, 1))
    assert_same_parameters(resumed, straight)


def test_the_method_of_experts_is_the_users_choice() -> None:
    found = {}
    for method in (*GRADIENT_BASED, "adamw"):
        optimizer = hf_so2.build_optimizer("kfac", moe(), expert_method=method)
        (entry,) = (x for x in optimizer.coverage().parameters if x.name.endswith("gate_up_proj"))
        found[entry.algorithm] = entry.reason
    assert set(found) == {*GRADIENT_BASED, "adamw"}
    assert found["adamw"] == "expert_method adamw"
    with pytest.raises(ConfigurationError, match="expert_method='sgd': must be one of shampoo, soap"):
        hf_so2.build_optimizer("kfac", moe(), expert_method="sgd")
    with pytest.raises(ConfigurationError, match="expert_method='soap': has no effect on shampoo"):
        hf_so2.build_optimizer("shampoo", moe(), expert_method="soap")


def test_experts_can_be_skipped() -> None:
    optimizer = hf_so2.build_optimizer("shampoo", moe(), skip_modules=["experts"])
    reasons = {x.reason for x in optimizer.coverage().parameters if ".experts." in x.name}
    assert reasons == {"skip_modules 'experts'"}


def test_batches_may_be_split_and_layers_recomputed() -> None:
    whole, parts, recomputed = (in_float64(moe()) for _ in range(3))
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    for model, count in ((whole, 1), (parts, 4), (recomputed, 1)):
        optimizer = hf_so2.build_optimizer("kfac", model, expert_method="kl_shampoo")
        for seed in range(3):
            optimizer.zero_grad()
            for part in batch(seed).chunk(count):
                (model(input_ids=part, labels=part).loss / count).backward()
            optimizer.step()
    for (name, expected), actual in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert relative_error(actual, expected) < 1e-9, name
    assert_same_parameters(recomputed, whole)


@pytest.mark.parametrize("name", ["kfac", "shampoo", "muon"])
def test_other_weights_of_three_dimensions_are_no_experts(name: str) -> None:
    """Convolutions, with and without a weight norm, and tables of positions."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    speech = Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4))
    for model in (vit, speech):
        report = hf_so2.build_optimizer(name, model).coverage().parameters
        wide = [entry for entry in report if len(entry.shape) >= 3]
        assert wide
        assert {entry.algorithm for entry in wide} == {"adamw"}
        assert any(entry.algorithm == name for entry in report)
