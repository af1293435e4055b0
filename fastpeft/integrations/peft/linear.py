"""PEFT's ``lora.Linear`` over torch's Linear or transformers' Conv1D.

    y = x Wᵀ + bias + Σ_active scale · (dropout(x) Aᵀ Bᵀ + lora_bias)             `fastpeft.ops.lora_linear`
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Linear

from fastpeft.integrations.peft.factors import weight_unreadable
from fastpeft.integrations.peft.kind import imported
from fastpeft.integrations.peft.lora import AcceleratedLoRA, LoRAKind
from fastpeft.integrations.peft.plain import held, matching
from fastpeft.ops import lora_linear


def transposed(base: Any) -> bool | None:
    """Whether the base stores W as [in, out]; None for a class that is not one matrix product that we know."""
    kind = type(base)
    if kind is Linear:
        return False
    return True if kind is imported("transformers.pytorch_utils", "Conv1D") else None


class AcceleratedLinear(AcceleratedLoRA):
    """Comes before PEFT's ``lora.Linear``."""

    def _fused(
        self, x: torch.Tensor, base: Any, a: Any, b: Any, lora_bias: Any, scale: Any, p: float
    ) -> torch.Tensor | None:
        stored = transposed(base)
        w = held(base, "weight")
        if stored is None or not matching(x, w):
            return None
        bias = held(base, "bias")
        return lora_linear(x, w.t() if stored else w, a, b, bias, lora_bias, scale=scale, dropout=p)


class LinearKind(LoRAKind):
    mixin = AcceleratedLinear

    def peft_class(self) -> type | None:
        found: type | None = imported("peft.tuners.lora.layer", "Linear")
        return found

    def adopt(self, layer: Any) -> str | None:
        base = layer.base_layer
        if transposed(base) is None and not hasattr(base, "parametrizations"):
            return f"base layer {type(base).__module__}.{type(base).__qualname__} is not torch.nn.Linear or Conv1D"
        return None

    def base_changed(self, base: Any) -> str | None:
        if transposed(base) is None:
            return f"base layer {type(base).__name__} is not torch.nn.Linear or Conv1D (parametrised?)"
        return None

    def base_unreadable(self, base: Any) -> str | None:
        return weight_unreadable("base_layer", base)

    def weights(self, layer: Any, names: list[str]) -> str | None:
        why = super().weights(layer, names)
        if why is None and not layer.cast_input_dtype_enabled:
            adapter = layer.lora_A[names[0]].weight.dtype
            if layer.base_layer.weight.dtype is not adapter:
                return "adapter and base dtype differ and casting the input is disabled"
        return why

    def base_uncallable(self, layer: Any, x: torch.Tensor, adapter: torch.dtype | None) -> str | None:
        if x.dtype is not layer.base_layer.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return "the input and the base weight have different dtypes"
        return None


KIND = LinearKind()
