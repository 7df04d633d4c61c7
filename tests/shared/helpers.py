"""Oracles and small builders that share no code with the package under test.

The dense definitions are those of the curvature literature: a layer computes `u = W h` for every token, `δ = ∂ℓ/∂u`
with ℓ the sum of the losses of single tokens, `A = E[h hᵀ]`, `B = E[δ δᵀ]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_so2

VOCABULARY = 32

# A configuration of any family with these fields: width 16 and one layer.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}

# What it takes to precondition a weight that is tied between embedding and head.
BOTH_ENDS: dict[str, Any] = {"precondition_embeddings": True, "precondition_head": True}


@dataclass
class DenseFactors:
    """Rows of one linear layer over a whole batch: `inputs` (N, fan_in), `deltas` (N, fan_out)."""

    inputs: Tensor
    deltas: Tensor

    @property
    def a(self) -> Tensor:
        return self.inputs.mT @ self.inputs / len(self.inputs)

    @property
    def b(self) -> Tensor:
        return self.deltas.mT @ self.deltas / len(self.deltas)

    @property
    def gradient(self) -> Tensor:
        """Of the mean loss, (fan_out, fan_in)."""
        return self.deltas.mT @ self.inputs / len(self.inputs)


def dense_factors(
    model: nn.Module, layers: dict[str, nn.Module], loss_sum: Callable[..., Tensor], batch: tuple[Any, ...]
) -> dict[str, DenseFactors]:
    """`h` and `δ` of every layer by `torch.func`: δ is the derivative with respect to a perturbation added to `u`.

    Args:
        layers: name of the weight to the module that computes `u`.
        loss_sum: maps (outputs of the model, batch) to the sum of all tokens' losses.
        batch: the model's arguments first, whatever `loss_sum` needs behind them.
    """
    inputs: dict[str, Tensor] = {}
    shapes: dict[str, Tensor] = {}
    perturbation: dict[str, Tensor] = {}

    def perturb(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name], shapes[name] = args[0].detach(), output
            return output + perturbation[name] if name in perturbation else output

        return hook

    handles = [module.register_forward_hook(perturb(name)) for name, module in layers.items()]
    fixed = {name: p.detach() for name, p in model.named_parameters()} | dict(model.named_buffers())

    def perturbed(shift: dict[str, Tensor]) -> Tensor:
        perturbation.update(shift)
        return loss_sum(functional_call(model, fixed, (batch[0],)), batch)

    try:
        with torch.no_grad():
            model(batch[0])
        zeros = {name: torch.zeros_like(output) for name, output in shapes.items()}
        plain_inputs = dict(inputs)
        deltas = grad(perturbed)(zeros)
    finally:
        for handle in handles:
            handle.remove()
    return {name: DenseFactors(_rows(plain_inputs[name]), _rows(deltas[name]).detach()) for name in layers}


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def kronecker_solve(a: Tensor, b: Tensor, gradient: Tensor, rho_a: float, rho_b: float) -> Tensor:
    """`((A + ρ_A I) ⊗ (B + ρ_B I))^-1 vec(G)` with the Kronecker matrix written out; vec stacks columns."""
    damped_a = a + rho_a * torch.eye(len(a), dtype=a.dtype)
    damped_b = b + rho_b * torch.eye(len(b), dtype=b.dtype)
    stacked = gradient.mT.reshape(-1)
    return torch.linalg.solve(torch.kron(damped_a, damped_b), stacked).reshape(gradient.mT.shape).mT


def captured_factors(optimizer: hf_so2.SecondOrderOptimizer) -> dict[str, dict[str, Tensor]]:
    """Bias-corrected averages of every layer, by parameter name."""
    assert optimizer.curvature is not None
    return {
        name: {key: layer.state[key] / layer.state["weight"] for key in ("A", "B") if key in layer.state}
        for name, layer in optimizer.curvature.layers.items()
    }


def rows_that_count(dense: Mapping[str, DenseFactors]) -> dict[str, Tensor]:
    """Which rows of each layer a loss depends on, (rows,): of all layers whose inputs are equal together."""

    def count(mine: DenseFactors) -> Tensor:
        readers = [d for d in dense.values() if torch.equal(d.inputs, mine.inputs)]
        return torch.stack([(d.deltas != 0).any(dim=1) for d in readers]).any(dim=0)

    return {name: count(factors) for name, factors in dense.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`‖actual - expected‖ / ‖expected‖` in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = torch.linalg.vector_norm(expected).clamp(min=1e-300)
    return float(torch.linalg.vector_norm(actual - expected) / norm)


def numpy_damping(
    rule: str, epsilon: float, a: np.ndarray, b: np.ndarray, multipliers: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float]:
    """(ρ_A, ρ_B) from the formulas, in NumPy; π as in Martens & Grosse 2015, section 6.3, with λ = ε.

    π² is the ratio of the mean eigenvalues, and 1 where that is no positive number. `multipliers` are the width's, on
    constant damping.
    """
    if rule == "trace":
        return epsilon * np.trace(a), epsilon * np.trace(b)
    if rule == "trace_mean":
        return epsilon * np.trace(a) / len(a), epsilon * np.trace(b) / len(b)
    if rule == "spectral":
        return epsilon * np.linalg.norm(a, 2), epsilon * np.linalg.norm(b, 2)
    if rule == "pi":
        means = np.trace(a) / len(a), np.trace(b) / len(b)
        pi = np.sqrt(means[0] / means[1]) if all(means) else 1.0
        return pi * np.sqrt(epsilon), np.sqrt(epsilon) / pi
    return epsilon * multipliers[0], epsilon * multipliers[1]


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")


def llama(width: int = 16, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {
        "hidden_size": width,
        "intermediate_size": width * 3 // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 8,
        "num_key_value_heads": width // 16,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(SMALL | fields | changes)))


def tied_llama(width: int = 16, **changes: Any) -> LlamaForCausalLM:
    """Its embedding is its head."""
    return llama(width, tie_word_embeddings=True, **changes).train()


def gpt2(width: int = 16, **changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "n_embd": width,
        "n_layer": 2,
        "n_head": width // 8,
        "n_positions": 32,
        "n_inner": 2 * width,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**(fields | changes)))


def mixtral(width: int = 16, **changes: Any) -> MixtralForCausalLM:
    """Experts in one 3-D weight, computed one by one, which works in float64."""
    torch.manual_seed(0)
    fields = SMALL | {"hidden_size": width, "num_local_experts": 4, "_experts_implementation": "eager"}
    return MixtralForCausalLM(MixtralConfig(**(fields | changes)))


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0))


def in_float64(model: nn.Module) -> nn.Module:
    """`model.double()` with RMS norms that stay in float64; the library's compute in float32 in any case."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("LlamaRMSNorm", "MixtralRMSNorm", "T5LayerNorm"):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            model.set_submodule(name, norm)
    return model.double()


def token_rows(count: int = 64, length: int = 10, *, padded: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    """Examples of a causal LM; `padded` ones have padding of random length and a random prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator)
        labels, mask = tokens.clone(), torch.ones_like(tokens)
        if padded:
            size = int(torch.randint(length // 2, length + 1, (), generator=generator))
            prompt = int(torch.randint(0, size // 2, (), generator=generator))
            tokens[size:], labels[size:], mask[size:] = 0, -100, 0
            labels[:prompt] = -100
        rows.append({"input_ids": tokens, "labels": labels, "attention_mask": mask})
    return rows


def arguments(output_dir: Path | str, **changes: Any) -> hf_so2.SecondOrderTrainingArguments:
    """Quiet arguments for a few steps on the CPU; `kfac` in the standard parametrization unless told otherwise."""
    fields = {
        "output_dir": str(output_dir),
        "optim": "kfac",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 16,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return hf_so2.SecondOrderTrainingArguments(**(fields | changes))


def trained(
    model: nn.Module, rows: list[dict[str, Tensor]], output_dir: Path | str, *, resume: Any = None, **changes: Any
) -> hf_so2.SecondOrderTrainer:
    trainer = hf_so2.SecondOrderTrainer(model=model, args=arguments(output_dir, **changes), train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def optimizer_of(trainer: hf_so2.SecondOrderTrainer) -> hf_so2.SecondOrderOptimizer:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, hf_so2.SecondOrderOptimizer)
    return optimizer


def assert_same_parameters(first: nn.Module, second: nn.Module) -> None:
    """Bit for bit, by name."""
    expected = dict(second.named_parameters())
    assert expected.keys() == dict(first.named_parameters()).keys()
    differing = [name for name, p in first.named_parameters() if not torch.equal(p, expected[name])]
    assert not differing
