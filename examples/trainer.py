"""transformers' Trainer: a callback accelerates its model.   python examples/trainer.py [MODEL]"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastpeft

tiny = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1]) if sys.argv[1:] else LlamaForCausalLM(tiny)
model = get_peft_model(base, LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"))
ids = torch.randint(base.config.vocab_size, (4, 32))
trainer = Trainer(
    model,
    TrainingArguments("demo_output", max_steps=10, learning_rate=1e-2, logging_steps=5, report_to="none"),
    train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    callbacks=[fastpeft.AccelerateCallback(report=print)],  # or, on a line after this one: fastpeft.accelerate(trainer)
)
trainer.train()
print(fastpeft.status(trainer))
