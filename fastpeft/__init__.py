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
    "QLoRALinear",
    "RankAllocator",
    "Report",
    "__version__",
    "accelerate",
    "disable_lora",
    "enable_lora",
    "encoder_safe",
    "explain",
    "info",
    "lora_disabled",
    "ops",
    "release_workspace",
    "restore",
]
