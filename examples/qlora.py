"""QLoRA: PEFT over bitsandbytes' 4-bit weights, on a CPU too.   python examples/qlora.py [MODEL]"""

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import fastpeft

with tempfile.TemporaryDirectory() as folder:
    tiny = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    name = sys.argv[1] if sys.argv[1:] else LlamaForCausalLM(tiny).save_pretrained(folder) or folder
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bits)
base = prepare_model_for_kbit_training(base)
model = get_peft_model(base, LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"))
print(fastpeft.accelerate(model))

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.randint(base.config.vocab_size, (4, 32))
for _ in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
print(fastpeft.status(model))
