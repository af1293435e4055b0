"""PEFT's ``lora.Linear`` over torch's Linear or transformers' Conv1D.

y = x Wᵀ + bias + Σ_active scale · (dropout(x) Aᵀ Bᵀ + lora_bias)             `fastpeft.ops.lora_linear`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.linear import Linear

from fastpeft.integrations.peft.factors import weight_unreadable
from fastpeft.integrations.peft.kind import imported
from fastpeft.integrations.peft.lora import AcceleratedLoRA, LoRAKind
from fastpeft.integrations.peft.plain import MISSING, PLAIN, STRIDED, bias_unfit, held, original, replaced
from fastpeft.ops import lora_linear

_ADDMM = original(torch, "addmm")
_conv1d_forward: Any = None  # set by `LinearKind.register`


def conv1d() -> Any:
    """transformers' Conv1D, if it is imported: one product with W stored as [in, out]."""
    return imported("transformers.pytorch_utils", "Conv1D")


def _conv1d_replaced() -> str | None:
    kind = conv1d()
    return replaced("Conv1D", kind, "forward", original(kind, "forward")) or replaced("torch", torch, "addmm", _ADDMM)


class AcceleratedLinear(AcceleratedLoRA):
    """Comes before PEFT's ``lora.Linear``."""

    def _fused(
        self, x: torch.Tensor, base: Any, a: Any, b: Any, lora_bias: Any, scale: Any, p: float
    ) -> torch.Tensor | None:
        parameters = base._parameters
        w, bias = parameters.get("weight"), parameters.get("bias", MISSING)
        if w is None or bias is MISSING:
            w, bias = held(base, "weight"), held(base, "bias")
        if (
            not (type(w) is Parameter or type(w) is Tensor)
            or w.layout is not STRIDED
            or not (w.dtype is x.dtype or torch.is_autocast_enabled(x.device.type))
            or w.device != x.device
            or not (bias is None or type(bias) in PLAIN)
        ):
            return None
        if type(base) is not Linear:
            if type(base) is not conv1d() or type(base).forward is not _conv1d_forward or torch.addmm is not _ADDMM:
                return None
            w = w.t()
        return lora_linear(x, w, a, b, bias, lora_bias, scale=scale, dropout=p)


class LinearKind(LoRAKind):
    mixin = AcceleratedLinear
    launcher = "lora_linear_fwd"

    def peft_class(self) -> type | None:
        found: type | None = imported("peft.tuners.lora.layer", "Linear")
        return found

    def register(self) -> None:
        super().register()
        global _conv1d_forward
        if conv1d() is not None:
            _conv1d_forward = original(conv1d(), "forward")

    def adopt(self, layer: Any) -> str | None:
        base = layer.base_layer
        if type(base) not in (Linear, conv1d()) and not hasattr(base, "parametrizations"):
            return f"base layer {type(base).__module__}.{type(base).__qualname__} is not torch.nn.Linear or Conv1D"
        return None

    def base_changed(self, base: Any) -> str | None:
        if type(base) is conv1d():
            return _conv1d_replaced()
        if type(base) is not Linear:
            return f"base layer {type(base).__name__} is not torch.nn.Linear or Conv1D (parametrised?)"
        return None

    def base_unreadable(self, base: Any) -> str | None:
        why = weight_unreadable("base_layer", base)
        if why is not None:
            return why
        return bias_unfit("base_layer", held(base, "bias"))

    def any_call(self, layer: Any, names: list[str]) -> str | None:
        base, adapter = layer.base_layer.weight, layer.lora_A[names[0]].weight
        amp = torch.is_autocast_enabled(base.device.type)
        if base.dtype is not adapter.dtype and not layer.cast_input_dtype_enabled and not amp:
            return "adapter and base dtype differ and casting the input is disabled"
        return None

    def base_uncallable(self, layer: Any, x: torch.Tensor, adapter: torch.dtype | None) -> str | None:
        if x.dtype is not layer.base_layer.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return "the input and the base weight have different dtypes"
        return None


KIND = LinearKind()
