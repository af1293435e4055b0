"""Torch modules: parameters, initialisation, merging. The arithmetic of a call is in ``fastpeft.ops``."""

from fastpeft.nn.lora_layer import LoRALayer, LoRAModule
from fastpeft.nn.lora_linear import LoRALinear
from fastpeft.nn.merge import Mergeable, MergeReport
from fastpeft.nn.qlora_linear import QLoRALinear
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
