"""Lightning: in the module's __init__, before a strategy wraps it.   python examples/lightning_module.py [MODEL]"""

import sys

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastpeft


class Adapted(lightning.LightningModule):
    def __init__(self, base):
        super().__init__()
        self.model = get_peft_model(base, LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear"))
        print(fastpeft.accelerate(self))

    def training_step(self, ids, index):
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


tiny = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
module = Adapted(AutoModelForCausalLM.from_pretrained(sys.argv[1]) if sys.argv[1:] else LlamaForCausalLM(tiny))
loader = torch.utils.data.DataLoader(torch.randint(256, (4, 32)).repeat(10, 1), batch_size=4)
lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(module, loader)
print(fastpeft.status(module))
