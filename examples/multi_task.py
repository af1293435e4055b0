"""Several tasks on one frozen model, each with an adapter of its own.   python examples/multi_task.py"""

import torch
from torch import nn

import fastpeft

model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
manager = fastpeft.apply_conditional_lora_to_model(model, target_modules=["0", "2"], num_tasks=3, rank=4, dropout=0.0)
optimizer = torch.optim.AdamW(manager.get_trainable_parameters(), lr=1e-2)

x, tasks = torch.randn(96, 16), torch.arange(96) % 3  # samples of all tasks in one batch
target = x.sum(1, keepdim=True) * (tasks - 1).unsqueeze(1)  # each task wants another answer
for step in range(200):
    with fastpeft.task(tasks):  # a task for each sample; -1 is the frozen model alone
        loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 49:
        print(f"loss {loss.item():.3f}")
with fastpeft.task(2):  # one task for all
    print("task 2:", model(x[:3]).flatten().tolist())
