"""Torch modules: parameters, initialisation, merging. The arithmetic of a call is in ``fastpeft.ops``."""

from fastpeft.nn.encoder import encoder_safe
from fastpeft.nn.factors import LoRAModule, RankAllocator
from fastpeft.nn.layers import (
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
)
from fastpeft.nn.merge import Mergeable, MergeReport
from fastpeft.nn.switch import disable_lora, enable_lora, lora_disabled
from fastpeft.nn.variants import AdaLoRALayer, AdaLoRALinear

__all__ = [
    "AdaLoRALayer",
    "AdaLoRALinear",
    "LoRAGRU",
    "LoRAGRUCell",
    "LoRALSTM",
    "LoRALSTMCell",
    "LoRALayer",
    "LoRALinear",
    "LoRAModule",
    "LoRAMultiheadAttention",
    "LoRARNN",
    "LoRARNNCell",
    "MergeReport",
    "Mergeable",
    "QLoRALinear",
    "RankAllocator",
    "disable_lora",
    "enable_lora",
    "encoder_safe",
    "lora_disabled",
]
