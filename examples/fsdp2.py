"""FSDP2: before or after fully_shard.   torchrun --nproc-per-node 2 examples/fsdp2.py"""

import os

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft

if torch.accelerator.is_available():
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
distributed.init_process_group()
torch.manual_seed(0)  # of every process: each keeps its part of the same weights
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
for part in [*base.model.layers, model]:
    fully_shard(part)
fastpeft.accelerate(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(distributed.get_rank()))
for _ in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"rank {distributed.get_rank()}: loss {loss.item():.3f}, {fastpeft.status(model)}")
distributed.destroy_process_group()
