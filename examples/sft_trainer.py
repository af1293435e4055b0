"""TRL's SFTTrainer, which puts the adapter in itself: the same callback.   python examples/sft_trainer.py [MODEL]"""

import sys

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import fastpeft

words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, "to": 2, "be": 3, "or": 4, "not": 5}, unk_token="[PAD]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
tiny = LlamaConfig(vocab_size=6, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
trainer = SFTTrainer(
    model=sys.argv[1] if sys.argv[1:] else LlamaForCausalLM(tiny),
    processing_class=None if sys.argv[1:] else tokenizer,
    args=SFTConfig("demo_output", max_steps=10, learning_rate=1e-2, logging_steps=5, report_to="none", bf16=False),
    train_dataset=Dataset.from_dict({"text": ["to be or not to be"] * 16}),
    peft_config=LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear"),
    callbacks=[fastpeft.AccelerateCallback(report=print)],
)
trainer.train()
print(fastpeft.status(trainer))
# Where even the callbacks are another's, a recipe or a command line: python -m fastpeft script.py
