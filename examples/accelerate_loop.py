"""A loop with Accelerate, on one process or several:

python examples/accelerate_loop.py
accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

import hf_so2

set_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
)
tokens = torch.randint(1, 4, (256, 32)).cumsum(1) % 64  # each token is the last one plus 1, 2 or 3
loader = DataLoader(tokens, batch_size=16, shuffle=True)

accelerator = Accelerator(gradient_accumulation_steps=2)
optimizer = hf_so2.build_optimizer("shampoo", model, lr=0.03)  # before prepare
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(2):
    total = 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
    accelerator.print(f"epoch {epoch}: loss {total / len(loader):.3f}")
