"""What every test starts from: one thread, no network, and models small enough to train in a blink."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import GPT2Config, LlamaConfig

torch.set_num_threads(1)  # two workers on two cores, and sums in one order
datasets.disable_progress_bars()
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture
def tiny_llama() -> LlamaConfig:
    """Two layers, width 32, grouped KV heads; a vocabulary of 64."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.0,
    )


@pytest.fixture
def tiny_gpt2() -> GPT2Config:
    """Two layers, width 32, Conv1D with a fused QKV and tied embeddings; no dropout."""
    return GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
