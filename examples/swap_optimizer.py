"""A training loop of one's own, with AdamW swapped for M3: the one line that names the optimizer.

python examples/swap_optimizer.py
"""

import torch
from torch import nn

from nestlearn.optim import M3

torch.manual_seed(0)
inputs = torch.randn(256, 20)
targets = torch.sin(inputs @ torch.randn(20, 4))
model = nn.Sequential(nn.Linear(20, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))

# optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
optimizer = M3(model.parameters(), lr=3e-3)

for step in range(200):
    loss = nn.functional.mse_loss(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss.item():.4f}")
