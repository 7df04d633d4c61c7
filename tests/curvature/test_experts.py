"""Mixture-of-experts layers: modules of their own are preconditioned, fused tensors fall back."""

from __future__ import annotations

import torch
from helpers import SMALL, relative_error
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import hf_so2


class Routed(nn.Module):
    """Every row goes through the expert that it names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(5, 4, bias=False) for _ in range(3))
        self.double()

    def forward(self, rows: Tensor, choice: Tensor) -> Tensor:
        outputs = rows.new_zeros(len(rows), 4)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            if chosen.any():
                outputs[chosen] = expert(rows[chosen])
        return outputs


def test_every_expert_averages_over_its_own_tokens_and_an_idle_one_keeps_its_state() -> None:
    """Loss `cᵀ u / N` over all rows: `A` averages over the expert's rows, `B` over the tokens of the loss."""
    model, generator = Routed(), torch.Generator().manual_seed(1)
    optimizer = hf_so2.build_optimizer("kfac", model, beta2=0.0)
    rows, costs = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (5, 4))
    first = torch.tensor([0, 1, 2] * 4)

    def step(choice: Tensor) -> dict[str, dict[str, Tensor]]:
        optimizer.zero_grad()
        optimizer.announce(tokens=12, gradient_scale=1 / 12)
        ((model(rows, choice) * costs).sum() / 12).backward()
        optimizer.step()
        return {
            name: {k: v.clone() for k, v in layer.state.items()} for name, layer in optimizer.curvature.layers.items()
        }

    before = step(first)
    for index in range(3):
        h, delta = rows[first == index], costs[first == index]
        state = before[f"experts.{index}.weight"]
        assert relative_error(state["A"], h.mT @ h / len(h)) < 1e-13
        assert relative_error(state["B"], delta.mT @ delta / 12) < 1e-13
    idle = model.experts[2].weight.detach().clone()
    after = step(first % 2)
    for key in ("A", "B", "weight"):
        assert torch.equal(after["experts.2.weight"][key], before["experts.2.weight"][key])
    assert torch.equal(model.experts[2].weight, idle)
    assert not torch.equal(after["experts.0.weight"]["A"], before["experts.0.weight"]["A"])


def test_fused_experts_fall_back_and_the_table_says_why() -> None:
    config = MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).train()
    optimizer = hf_so2.build_optimizer("kfac", model)
    batch = torch.randint(1, 32, (4, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    found = {entry.name: (entry.algorithm, entry.reason) for entry in optimizer.coverage().parameters}
    experts = {name: value for name, value in found.items() if ".experts." in name}
    assert len(experts) == 2
    for algorithm, reason in experts.values():
        assert algorithm == "adamw"
        assert reason == "3-D weight of MixtralExperts, which no curvature method covers"
    assert found["model.layers.0.self_attn.q_proj.weight"][0] == "kfac"
