"""The Trainer: a small Llama from scratch on random tokens of a simple law, with K-FAC and μP. Seconds on a CPU."""

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import hf_so2

set_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
    max_position_embeddings=32,
)  # fmt: skip
steps = torch.randint(1, 4, (256, 32))
tokens = steps.cumsum(1) % 64  # each token is the last one plus 1, 2 or 3
data = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})

args = hf_so2.SecondOrderTrainingArguments(
    output_dir="out/trainer",
    optim="kfac_mup",
    mup_base_width=32,  # the hidden size at which the learning rate was found
    max_steps=40,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
trainer = hf_so2.SecondOrderTrainer(model=LlamaForCausalLM(config), args=args, train_dataset=data)
print(trainer.train().metrics)
