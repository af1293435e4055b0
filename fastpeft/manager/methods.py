"""The methods that a manager can apply, and the class that each uses for a kind of module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastpeft import nn as fast
from fastpeft.nn.config import adapter_dtype
from fastpeft.nn.layers.stack import AdapterStack
from fastpeft.ops import _checks


@dataclass(frozen=True)
class Kind:
    """The class that replaces a linear layer, and the class of an adapter beside it; None if there is none."""

    linear: type[nn.Module]
    beside: type[nn.Module] | None


LINEAR: dict[str, Kind] = {
    "lora": Kind(fast.LoRALinear, fast.LoRALayer),
    "qlora": Kind(fast.QLoRALinear, None),
    "adalora": Kind(fast.AdaLoRALinear, fast.AdaLoRALayer),
    "sparse_lora": Kind(fast.SparseLoRALinear, fast.SparseLoRALayer),
    "pruning_lora": Kind(fast.PruningAwareLoRALinear, fast.PruningAwareLoRALayer),
    "conditional_lora": Kind(fast.ConditionalLoRALinear, fast.ConditionalLoRALayer),
    "hyper_lora": Kind(fast.HyperLoRALinear, fast.HyperLoRALayer),
    "attention_guided_lora": Kind(fast.AttentionGuidedLoRALinear, fast.AttentionGuidedLoRALayer),
}

# What plain LoRA adapts besides linear layers and attentions: torch's class -> our class over it.
OTHERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: fast.LoRAConv1d,
    nn.Conv2d: fast.LoRAConv2d,
    nn.Conv3d: fast.LoRAConv3d,
    nn.RNN: fast.LoRARNN,
    nn.LSTM: fast.LoRALSTM,
    nn.GRU: fast.LoRAGRU,
    nn.RNNCell: fast.LoRARNNCell,
    nn.LSTMCell: fast.LoRALSTMCell,
    nn.GRUCell: fast.LoRAGRUCell,
}


def is_attention(module: nn.Module) -> bool:
    """Whether this is torch's own attention, whose out_proj is read but never called."""
    return type(module) is nn.MultiheadAttention


def is_read(module: nn.Module) -> bool:
    """Whether this is the out_proj of a torch attention: the attention is adapted in its place."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def never_called(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the out_proj of attentions that are neither torch's own nor ours: their readers are unknown."""
    attentions = (each for each in modules if isinstance(each, nn.MultiheadAttention) and not is_attention(each))
    return {id(each.out_proj) for each in attentions if not isinstance(each, fast.LoRAMultiheadAttention)}


def bare(module: nn.Module) -> nn.Module:
    """The layer inside a stack of adapters, or the module itself."""
    return module.layer if isinstance(module, AdapterStack) else module


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a module that is linear in its last dimension; None for any other module."""
    layer = bare(module)
    if isinstance(layer, (nn.Linear, fast.LoRALinear, fast.QLoRALinear)):
        return layer.in_features, layer.out_features
    # transformers' Conv1D, a linear layer whose weight is [in, out].
    weight = layer._parameters.get("weight")
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and weight is not None and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


def takes_place(module: nn.Module) -> bool:
    """Whether this nn.Linear computes what nn.Linear computes, so that an adapted layer may replace it."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def supports(method: str, module: nn.Module, kind: str = "") -> bool:
    """Whether ``method`` can adapt ``module``, as far as its class tells.

    kind       of an `Adapter`
    """
    layer = bare(module)
    if method == "adapter" and kind != "parallel" and isinstance(layer, nn.MultiheadAttention):
        return True
    if method == "lora" and (isinstance(layer, fast.LoRAMultiheadAttention) or is_attention(layer)):
        return True
    if method == "lora" and type(layer) in OTHERS:
        return True
    return sizes(module) is not None


def described(method: str, kind: str = "") -> str:
    """The modules that a method can adapt, for an error."""
    if method == "lora":
        others = (nn.Linear, nn.MultiheadAttention, *OTHERS)
        return ", ".join(f"nn.{each.__name__}" for each in others)
    return "nn.Linear or nn.MultiheadAttention" if method == "adapter" and kind != "parallel" else "nn.Linear"


def beside(op: str, method: str, module: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Another adapter for a layer that has one, or that cannot be replaced: of the layer's sizes, on its device.

    Raises     ValueError: a method without a separate adapter.
    """
    alone, layer, fits = LINEAR[method].beside, bare(module), sizes(module)
    if method == "qlora" and isinstance(layer, fast.QLoRALinear):
        alone = fast.LoRALayer  # the base is already in 4 bits
    rule = f"name plain nn.Linear layers for {method}, without an adapter"
    _checks.require(alone is not None and fits is not None, op, "target_modules", rule, type(layer).__name__)
    assert alone is not None and fits is not None
    rest = dict(options)
    dtype = dtype_of(op, layer, rest.pop("adapter_dtype", None))
    made: nn.Module = alone(
        in_features=fits[0], out_features=fits[1], device=device_of(layer), dtype=dtype, **{"layout": "out_in", **rest}
    )
    return made


def behind(op: str, module: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The bottleneck adapter on the output of ``module``, or, for kind "parallel", beside ``module``.

    Raises     ValueError: a parallel adapter on a layer that is not square.
    """
    layer, fits = bare(module), sizes(module)
    if fits is None:
        assert isinstance(layer, nn.MultiheadAttention)
        dim = layer.embed_dim
    else:
        square = options.get("kind") != "parallel" or fits[0] == fits[1]
        rule = "name square layers for kind='parallel', whose adapter reads x and adds to y"
        _checks.require(square, op, "target_modules", rule, f"{fits[0]} → {fits[1]}")
        dim = fits[1]
    return fast.Adapter(dim, device=device_of(layer), dtype=dtype_of(op, layer), **options)


def _parameter(layer: nn.Module) -> torch.Tensor | None:
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else next(layer.parameters(), None)


def device_of(layer: nn.Module) -> torch.device | None:
    held = _parameter(layer)
    return None if held is None else held.device


def dtype_of(op: str, layer: nn.Module, asked: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a new adapter: the requested one, else the layer's; fp32 for a half-precision or packed weight."""
    held = getattr(layer, "lora_A", None)
    held = held if isinstance(held, torch.Tensor) else _parameter(layer)
    return adapter_dtype(op, asked, held if held is not None and held.is_floating_point() else None)
