"""What ``--quick`` trains: models with random weights and sentences of a few words, made here, nothing fetched."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

WORDS = ["good", "bad", "the", "a", "film", "plot", "actor", "scene", "it", "was", "great", "terrible", "text", "with"]
WORDS += ["some", "more", "words", "of", "this", "kind"]


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word, unknown ones too."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    )


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """`good` or `bad`, which decides the class, among one to seven other words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        others = torch.randint(2, len(WORDS), (1 + i % 7,), generator=generator)
        rows.append((" ".join([WORDS[i % 2], *(WORDS[j] for j in others)]), 1 - i % 2))
    return rows


def tiny_bert() -> nn.Module:
    """A BERT of two layers with a head for two classes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=len(WORDS) + 2, **sizes))


def tiny_llama() -> nn.Module:
    """A Llama of two layers with grouped queries."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": len(WORDS) + 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, pad_token_id=0, bos_token_id=0))
