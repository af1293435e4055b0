"""fastpeft: parameter-efficient fine-tuning at the price of the frozen model."""

from fastpeft import ops
from fastpeft._info import explain, info, release_workspace
from fastpeft._installed import warn_of_hidden as _warn_of_hidden
from fastpeft._version import __version__
from fastpeft.integrations import Report, accelerate, restore
from fastpeft.nn import (
    AdaLoRALayer,
    AdaLoRALinear,
    LoRAGRU,
    LoRAGRUCell,
    LoRALayer,
    LoRALinear,
    LoRALSTM,
    LoRALSTMCell,
    LoRAMultiheadAttention,
    LoRARNN,
    LoRARNNCell,
    QLoRALinear,
    RankAllocator,
    disable_lora,
    enable_lora,
    encoder_safe,
    lora_disabled,
)
from fastpeft.nn.prompts import (
    PatternVerbalizer,
    PrefixEncoder,
    PrefixTuning,
    PromptEmbedding,
    PromptEncoder,
    PTuningEmbedding,
    freeze_body,
    insert_prefix,
    insert_prompt,
    prepend_prompt,
    remove_prompt,
)

_warn_of_hidden()

__all__ = [
    "AdaLoRALayer",
    "AdaLoRALinear",
    "LoRAGRU",
    "LoRAGRUCell",
    "LoRALSTM",
    "LoRALSTMCell",
    "LoRALayer",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRARNN",
    "LoRARNNCell",
    "PTuningEmbedding",
    "PatternVerbalizer",
    "PrefixEncoder",
    "PrefixTuning",
    "PromptEmbedding",
    "PromptEncoder",
    "QLoRALinear",
    "RankAllocator",
    "Report",
    "__version__",
    "accelerate",
    "disable_lora",
    "enable_lora",
    "encoder_safe",
    "explain",
    "freeze_body",
    "info",
    "insert_prefix",
    "insert_prompt",
    "lora_disabled",
    "ops",
    "prepend_prompt",
    "release_workspace",
    "remove_prompt",
    "restore",
]
