"""Hugging Face Accelerate: before prepare().   python examples/accelerate_loop.py, or accelerate launch it [MODEL]"""

import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastpeft

accelerator = Accelerator(gradient_accumulation_steps=2)
tiny = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1]) if sys.argv[1:] else LlamaForCausalLM(tiny)
model = get_peft_model(base, LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"))
accelerator.print(fastpeft.accelerate(model))  # then prepare: DDP, FSDP and DeepSpeed wrap what is there

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
loader = torch.utils.data.DataLoader(torch.randint(256, (4, 32)).repeat(10, 1), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for ids in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")
accelerator.print(fastpeft.status(accelerator.unwrap_model(model)))
