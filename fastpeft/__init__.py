"""fastpeft: parameter-efficient fine-tuning at the price of the frozen model."""

from fastpeft import ops
from fastpeft._info import explain, info, release_workspace
from fastpeft._version import __version__
from fastpeft.integrations import Report, accelerate, restore
from fastpeft.nn import LoRALayer, LoRALinear, QLoRALinear, disable_lora, enable_lora, lora_disabled

__all__ = [
    "LoRALayer",
    "LoRALinear",
    "QLoRALinear",
    "Report",
    "__version__",
    "accelerate",
    "disable_lora",
    "enable_lora",
    "explain",
    "info",
    "lora_disabled",
    "ops",
    "release_workspace",
    "restore",
]
