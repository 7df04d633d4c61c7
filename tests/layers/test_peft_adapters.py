"""Low-rank adapters (PEFT): trained as two plain layers beside a frozen one; muP refuses them in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import arguments, in_float64, llama, relative_error
from torch import Tensor, nn

import hf_so2

REFUSED = r"^model='\w+': has adapters, for which muP has no rule; kfac trains it at this width as it is$"
# Not of queries: those of a first position have nothing to choose from, and a gradient of zero or its round-off.
TARGETS = ["v_proj", "down_proj"]


@pytest.mark.parametrize("base", [True, False])
def test_models_with_adapters_are_refused_by_mup_names(base: bool, tmp_path: Path) -> None:
    model = llama()
    model.peft_config = {"default": object()}  # as PEFT leaves on a model, and shows on its wrapper
    with pytest.raises(hf_so2.ConfigurationError, match=REFUSED):
        hf_so2.build_optimizer("kfac_mup", model, base_config=model.config if base else None)
    args = arguments(tmp_path, optim="kfac_mup", **({"mup_base_width": 16} if base else {}))
    with pytest.raises(hf_so2.ConfigurationError, match=REFUSED):
        hf_so2.SecondOrderTrainer(model=model, args=args)


def test_real_adapters_are_refused_by_mup_names() -> None:
    peft = pytest.importorskip("peft")
    inside = llama()
    inside.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS))
    for model in (adapted(llama()), inside):
        with pytest.raises(hf_so2.ConfigurationError, match=REFUSED):
            hf_so2.build_optimizer("kfac_mup", model, base_config=llama().config)


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


class ByHand(nn.Module):
    """What an adapter computes."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.base, self.scale = adapter.base_layer, adapter.scaling["default"]
        self.a, self.b = adapter.lora_A["default"], adapter.lora_B["default"]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.scale * self.b(self.a(inputs))


def by_hand() -> nn.Module:
    model = adapted(in_float64(llama())).double()
    inside = model.get_base_model()
    for name, module in list(inside.named_modules()):
        if hasattr(module, "lora_A"):
            inside.set_submodule(name, ByHand(module))
    return inside


def moved(name: str, model: nn.Module, length: int = 10) -> Tensor:
    """The update of three steps."""
    tokens = torch.randint(1, 32, (4, 10), generator=torch.Generator().manual_seed(0))
    mask = nn.functional.pad(torch.ones_like(tokens), (0, length - 10))
    labels = nn.functional.pad(tokens, (0, length - 10), value=-100)
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    optimizer = hf_so2.build_optimizer(name, model)
    for _ in range(3):
        logits = model(input_ids=labels.clamp(min=0), attention_mask=mask).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([(p.detach() - old).flatten() for p, old in zip(parameters, start, strict=True)])


@pytest.mark.parametrize("name", ["kfac", "ekfac", "tkfac", "tekfac", "foof", "shampoo"])
def test_adapters_train_as_plain_layers_whatever_the_padding(name: str) -> None:
    expected = moved(name, by_hand())
    for length in (10, 20):
        found = moved(name, adapted(in_float64(llama())).double(), length)
        assert relative_error(found, expected) < 1e-10
