"""Torch modules: parameters, initialisation, merging. The arithmetic of a call is in ``fastpeft.ops``."""

from fastpeft.nn.factors import LoRAModule, RankAllocator
from fastpeft.nn.layers import LoRALayer, LoRALinear, QLoRALinear
from fastpeft.nn.merge import Mergeable, MergeReport
from fastpeft.nn.switch import disable_lora, enable_lora, lora_disabled
from fastpeft.nn.variants import AdaLoRALayer, AdaLoRALinear

__all__ = [
    "AdaLoRALayer",
    "AdaLoRALinear",
    "LoRALayer",
    "LoRALinear",
    "LoRAModule",
    "MergeReport",
    "Mergeable",
    "QLoRALinear",
    "RankAllocator",
    "disable_lora",
    "enable_lora",
    "lora_disabled",
]
