"""Torch modules: parameters, initialisation, merging. The arithmetic of a call is in ``fastpeft.ops``."""

from fastpeft.nn.bottleneck import Adapter, AdapterFusion
from fastpeft.nn.encoder import encoder_safe
from fastpeft.nn.factors import LoRAModule, RankAllocator, remask_after, task
from fastpeft.nn.layers import (
    LoRAGRU,
    LoRAGRUCell,
    LoRALayer,
    LoRALinear,
    LoRALSTM,
    LoRALSTMCell,
    LoRAMultiheadAttention,
    LoRAParametrization,
    LoRARNN,
    LoRARNNCell,
    QLoRALinear,
    add_parametrization,
)
from fastpeft.nn.merge import Mergeable, MergeReport
from fastpeft.nn.switch import disable_lora, enable_lora, lora_disabled
from fastpeft.nn.variants import (
    AdaLoRALayer,
    AdaLoRALinear,
    AttentionGuidedLoRALayer,
    AttentionGuidedLoRALinear,
    ConditionalLoRALayer,
    ConditionalLoRALinear,
    HyperLoRALayer,
    HyperLoRALinear,
    PruningAwareLoRALayer,
    PruningAwareLoRALinear,
    SparseLoRALayer,
    SparseLoRALinear,
)

__all__ = [
    "AdaLoRALayer",
    "AdaLoRALinear",
    "Adapter",
    "AdapterFusion",
    "AttentionGuidedLoRALayer",
    "AttentionGuidedLoRALinear",
    "ConditionalLoRALayer",
    "ConditionalLoRALinear",
    "HyperLoRALayer",
    "HyperLoRALinear",
    "LoRAGRU",
    "LoRAGRUCell",
    "LoRALSTM",
    "LoRALSTMCell",
    "LoRALayer",
    "LoRALinear",
    "LoRAModule",
    "LoRAMultiheadAttention",
    "LoRAParametrization",
    "LoRARNN",
    "LoRARNNCell",
    "MergeReport",
    "Mergeable",
    "PruningAwareLoRALayer",
    "PruningAwareLoRALinear",
    "QLoRALinear",
    "RankAllocator",
    "SparseLoRALayer",
    "SparseLoRALinear",
    "add_parametrization",
    "disable_lora",
    "enable_lora",
    "encoder_safe",
    "lora_disabled",
    "remask_after",
    "task",
]
