"""The networks that the experiments train, torch's global generator left alone."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification

from hf_so2.papers.data import BLOCK, BYTES, CLASSES, PIXELS


def mlp(width: int, layers: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers without biases and ReLUs between, He's initialisation.

    Without biases every parameter is in a Kronecker block, and nothing is left to a first-order fallback.
    """
    sizes = [PIXELS, *[width] * (layers - 1), CLASSES]
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=False, dtype=dtype)
        with torch.no_grad():
            gain = 1 if index == layers - 1 else 2
            linear.weight.normal_(0.0, (gain / fan_in) ** 0.5, generator=generator)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class Classifier(nn.Module):
    """A Transformer of the library as a function from rows to logits.

    Args:
        model: gives `logits`.
        shape: of the model's input, without the batch.
    """

    def __init__(self, model: PreTrainedModel, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (predictions, classes)."""
        logits: Tensor = self.model(x.view(-1, *self.shape)).logits
        return logits.flatten(0, -2)


def vit(width: int, layers: int, seed: int) -> Classifier:
    """A Vision Transformer on 16 patches of the digits, heads of 8 dimensions, no dropout."""
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 8, intermediate_size=2 * width, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(ViTForImageClassification(config), (1, 8, 8))


def llama_config(width: int, layers: int) -> LlamaConfig:
    """On bytes, heads of 16 dimensions."""
    return LlamaConfig(
        vocab_size=BYTES, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 16, num_key_value_heads=width // 16, max_position_embeddings=BLOCK,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip


def llama(width: int, layers: int, seed: int) -> Classifier:
    """A Llama on blocks of bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(LlamaForCausalLM(llama_config(width, layers)), (BLOCK,))
