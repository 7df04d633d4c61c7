"""A loop of your own: a classifier of random points in plain PyTorch, with K-FAC. Seconds on a CPU."""

import torch
from torch import nn

import hf_so2

torch.manual_seed(0)
points = torch.randn(512, 8)
labels = (points[:, :3].norm(dim=1) > 1.5).long()
model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

optimizer = hf_so2.build_optimizer("kfac", model, lr=0.1)
print(optimizer.coverage())  # what updates each weight, and why
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
for step in range(60):
    rows = torch.randint(512, (256,))
    loss = nn.functional.cross_entropy(model(points[rows]), labels[rows])
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == 59:
        print(f"step {step}: loss {loss.item():.3f}")
