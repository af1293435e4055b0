"""A PEFT model on fastpeft's kernels: one line.   python examples/peft_model.py [MODEL]"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastpeft

tiny = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1]) if sys.argv[1:] else LlamaForCausalLM(tiny)
config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, config)
print(fastpeft.accelerate(model))  # which layers, and why others were left alone

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.randint(base.config.vocab_size, (4, 32))
for _ in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
print(fastpeft.status(model))  # the calls that were served, and those left to PEFT
# Save, load, merge and switch adapters with PEFT's own methods: model.save_pretrained(folder) and the others.
