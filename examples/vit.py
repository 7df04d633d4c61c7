"""A vision transformer, from scratch on pictures of bars that lie or stand, with KL-Shampoo. Seconds on a CPU."""

import datasets
import torch
from transformers import ViTConfig, ViTForImageClassification, set_seed

import hf_so2

set_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_labels=2,
    )
)  # fmt: skip
labels = torch.randint(2, (512,))
places = torch.randint(16, (512,))
pictures = 0.3 * torch.randn(512, 1, 16, 16)
for picture, stands, place in zip(pictures, labels, places, strict=True):
    (picture[0, :, place] if stands else picture[0, place]).add_(1)
data = datasets.Dataset.from_dict({"pixel_values": pictures.numpy(), "labels": labels}).with_format("torch")

args = hf_so2.SecondOrderTrainingArguments(
    output_dir="out/vit",
    optim="kl_shampoo",
    fallback_learning_rate=0.003,  # patches, positions and the head; the default was tuned on embeddings of tokens
    per_device_train_batch_size=32,
    max_steps=60,
    warmup_steps=0.1,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
trainer = hf_so2.SecondOrderTrainer(model=model, args=args, train_dataset=data)
print(trainer.train().metrics)
logits = model.eval()(pixel_values=pictures[:128].to(model.device)).logits
right = (logits.argmax(1).cpu() == labels[:128]).float().mean()
print(f"accuracy on pictures that it was trained on: {right:.2f}")
