"""A saved model in muP computes the same logits in a process that has transformers and nothing of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_so2.mup import apply_mup, scale_width
from hf_so2.mup.tiny import tiny_config
from hf_so2.mup.widths import HeadGrowth

# One process for all models: importing transformers takes longer than loading them.
PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(3, 15)[None]).logits, folder + "/logits.pt")
assert not any(name.startswith("hf_so2") for name in sys.modules)
"""
CASES: dict[str, tuple[str, HeadGrowth, dict[str, object]]] = {
    "gpt2_tied": ("gpt2", "count", {}),
    "opt_tied": ("opt", "count", {}),
    "gemma_tied": ("gemma", "count", {}),
    "llama_larger_heads": ("llama", "size", {"num_key_value_heads": 2}),
    "gpt2_larger_heads": ("gpt2", "size", {}),
    "qwen3_larger_heads": ("qwen3", "size", {}),
    "granite_native": ("granite", "size", {}),
}


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By case: logits without muP, in muP before saving, and after loading elsewhere; each (1, 12, vocabulary)."""
    root = tmp_path_factory.mktemp("reload")
    logits = {}
    for case, (family, head, fields) in CASES.items():
        base = tiny_config(family, **fields)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(scale_width(base, multiplier=2, head=head))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)  # initial scores are too small to tell scales apart
        plain = run(model)
        apply_mup(model, base)
        logits[case] = plain, run(model)
        model.save_pretrained(root / case)
    subprocess.run(
        [sys.executable, "-c", PLAIN, *(str(root / case) for case in CASES)],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=root,
        check=True,
        timeout=300,
    )
    return {case: (*logits[case], load_logits(root / case)) for case in CASES}


def run(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15)[None]).logits


def load_logits(folder: Path) -> torch.Tensor:
    return torch.load(folder / "logits.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_computes_the_same_logits(
    case: str, reloaded: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> None:
    plain, patched, loaded = reloaded[case]
    assert not torch.allclose(patched, plain, rtol=1e-2, atol=1e-3)  # muP did something that could get lost
    torch.testing.assert_close(loaded, patched, rtol=1e-5, atol=1e-5)


def test_larger_heads_divide_the_scores_by_the_head_size() -> None:
    """With weights kept, scores of a model with heads twice as large are `sqrt(1/2)` of its family's own."""
    base = tiny_config("llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(scale_width(base, multiplier=2, head="size")).eval()
    attention = model.model.layers[0].self_attn
    inputs = torch.randn(1, 4, model.config.hidden_size)
    with torch.no_grad():
        queries = attention.q_proj(inputs) * attention.scaling
    report = apply_mup(model, base)
    with torch.no_grad():
        patched = attention.q_proj(inputs) * attention.scaling
    # The table's initial weights of a hidden matrix, and the scale of Yang et al.: 1/d, equal at the base's head size.
    torch.testing.assert_close(patched, queries * 2**-0.5 * 2**-0.5)
    # The rate of the folded weight follows, so that training is that of the factor outside.
    assert report["model.layers.0.self_attn.q_proj.weight"].scale_out == pytest.approx(2**0.5)
