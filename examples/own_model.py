"""A hand-written model, without PEFT: adapters by the names of its modules.   python examples/own_model.py"""

from pathlib import Path

import torch
from torch import nn

import fastpeft

layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=128, batch_first=True)
model = nn.Sequential(nn.TransformerEncoder(layer, num_layers=2), nn.Flatten(), nn.Linear(8 * 64, 2))
manager = fastpeft.EfficientFineTuningManager(model)
manager.apply_lora(target_modules=["self_attn", "linear1", "linear2"], rank=8, alpha=16, dropout=0.1)
model[-1].requires_grad_(True)  # the head trains too; everything else is frozen
print(manager.summary())

x, labels = torch.randn(32, 8, 64), torch.randint(2, (32,))
optimizer = torch.optim.AdamW(manager.get_trainable_parameters(), lr=1e-3)
for _ in range(10):
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
Path("demo_output").mkdir(exist_ok=True)
manager.save_efficient_weights("demo_output/adapters.safetensors")  # load_efficient_weights(file) puts them back
model = manager.merge()  # and manager.unload() then leaves the model's own layers, with the adapters in their weights
