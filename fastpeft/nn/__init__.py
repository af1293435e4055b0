"""Torch modules: parameters, initialisation, merging. The arithmetic of a call is in ``fastpeft.ops``."""

from fastpeft.nn.factors import LoRAModule
from fastpeft.nn.layers import LoRALayer, LoRALinear, QLoRALinear
from fastpeft.nn.merge import Mergeable, MergeReport
from fastpeft.nn.switch import disable_lora, enable_lora, lora_disabled

__all__ = [
    "LoRALayer",
    "LoRALinear",
    "LoRAModule",
    "MergeReport",
    "Mergeable",
    "QLoRALinear",
    "disable_lora",
    "enable_lora",
    "lora_disabled",
]
