"""Image with text and speech: models without token logits, padded, in the Trainer and in a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import arguments, relative_error
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Wav2Vec2Config, Wav2Vec2ForCTC

import hf_so2

SETTINGS: dict[str, Any] = {"lr": 0.01, "fallback_learning_rate": 0.01}


def clip() -> nn.Module:
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 32, "max_position_embeddings": 16, "pad_token_id": 0, "eos_token_id": 31}
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 8, "patch_size": 4}, projection_dim=8)
    return CLIPModel(config).double()


def clip_rows(length: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(2, 31, (8, 10), generator=generator)
    texts[:, -1] = 31
    pixels = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    mask = nn.functional.pad(torch.ones_like(texts), (0, length - 10))
    texts = nn.functional.pad(texts, (0, length - 10))
    return [
        {"input_ids": ids, "attention_mask": own, "pixel_values": image, "return_loss": True}
        for ids, own, image in zip(texts, mask, pixels, strict=True)
    ]


def speech() -> nn.Module:
    torch.manual_seed(0)
    rates = ("hidden", "attention", "activation", "feat_proj", "final")
    config = Wav2Vec2Config(
        **{f"{name}_dropout": 0.0 for name in rates},
        vocab_size=12,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.0,
        mask_time_prob=0.0,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        ctc_loss_reduction="mean",
    )
    return Wav2Vec2ForCTC(config).double()


def speech_rows(length: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(4, 200, generator=generator, dtype=torch.float64)
    labels = torch.randint(1, 12, (4, 5), generator=generator)
    mask = nn.functional.pad(torch.ones(4, 200, dtype=torch.long), (0, 20 * length - 200))
    waves = nn.functional.pad(waves, (0, 20 * length - 200))
    return [
        {"input_values": wave, "attention_mask": own, "labels": label}
        for wave, own, label in zip(waves, mask, labels, strict=True)
    ]


MODELS = {"clip": (clip, clip_rows), "speech": (speech, speech_rows)}


class InOrder(hf_so2.SecondOrderTrainer):
    """Its batches are those of the plain loop, in the same order."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: torch.stack([r[key] for r in rows]) if isinstance(x, Tensor) else x for key, x in rows[0].items()}


def weights(model: nn.Module) -> Tensor:
    """All but the biases of keys, whose gradient is zero but for round-off, which AdamW would blow up."""
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if not name.endswith("k_proj.bias")])


def plain(kind: str, name: str, length: int = 10, **settings: Any) -> Tensor:
    build, rows = MODELS[kind]
    model = build().train()
    start = weights(model)
    optimizer = hf_so2.build_optimizer(name, model, **(SETTINGS | settings))
    for _ in range(3):
        model(**together(rows(length))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if optimizer.curvature is not None:
        assert all(layer.refreshes for layer in optimizer.curvature.layers.values())
    return weights(model) - start


@pytest.mark.parametrize("name", ["adamw", "kfac", "ekfac", "tkfac", "foof"])
@pytest.mark.parametrize("kind", MODELS)
def test_padding_changes_nothing(kind: str, name: str) -> None:
    assert relative_error(plain(kind, name, length=16), plain(kind, name)) < 1e-10


@pytest.mark.parametrize("name", ["kfac", "kfac_mup"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_trainer_trains_as_a_plain_loop(kind: str, name: str, tmp_path: Path) -> None:
    build, rows = MODELS[kind]
    model = build()
    start = weights(model)
    base = {"mup_base_width": 16} if name == "kfac_mup" else {}
    fields = {"learning_rate": 0.01, "fallback_learning_rate": 0.01, "max_grad_norm": 0.0}
    args = arguments(tmp_path, optim=name, remove_unused_columns=False, **fields, **base)
    trainer = InOrder(model=model, args=args, train_dataset=rows(10), data_collator=together)
    trainer.train()
    settings = {"base_config": build().config} if base else {}
    assert relative_error(weights(model) - start, plain(kind, name, **settings)) < 1e-10


def test_sampled_labels_need_logits(tmp_path: Path) -> None:
    args = arguments(tmp_path, fisher="mc", remove_unused_columns=False)
    trainer = InOrder(model=clip(), args=args, train_dataset=clip_rows(10), data_collator=together)
    with pytest.raises(hf_so2.ConfigurationError, match=r"^fisher='mc': needs a model that returns logits, not CLIP"):
        trainer.train()
