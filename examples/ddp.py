"""DistributedDataParallel: before it wraps the model.   torchrun --nproc-per-node 2 examples/ddp.py [MODEL]"""

import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastpeft

device = torch.accelerator.current_accelerator() or torch.device("cpu")
if device.type != "cpu":
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
distributed.init_process_group()
tiny = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1]) if sys.argv[1:] else LlamaForCausalLM(tiny)
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).to(device)
fastpeft.accelerate(model)
parallel = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(distributed.get_rank())).to(device)
for _ in range(10):
    loss = parallel(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"rank {distributed.get_rank()}: loss {loss.item():.3f}, {fastpeft.status(model)}")
distributed.destroy_process_group()
