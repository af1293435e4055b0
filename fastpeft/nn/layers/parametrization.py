"""LoRAParametrization: LoRA in weight space, W + scale · B A by torch's parametrize, on any weight of any module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastpeft.nn.config import adapter_dtype, flag, named_options, number, size
from fastpeft.ops import _checks

_OP = "add_parametrization"


class LoRAParametrization(nn.Module):
    """W ↦ W + scale · (B A) in the shape of W, scale = α / r                       Hu et al. 2021, arXiv:2106.09685

    features_in, features_out    ``weight.shape`` of a matrix, in this order: lora_A [rank, features_out],
                lora_B [features_in, rank]; of more dimensions, the first and the product of the others
    rank        r >= 1
    alpha       numerator of the scale
    device, dtype    of lora_A ~ N(0, 1) and lora_B = 0; those of the weight, for a sum that is exact to the bit
    Raises     ValueError: a range.  TypeError: a type.

    It works wherever torch reads the weight, but forms it and its dense gradient whole in every call: for a
    linear layer, a convolution or an attention the modules of this package do the same at a fraction of the cost.
    ``torch.nn.utils.parametrize.cached()`` forms it once for several calls.
    """

    @named_options
    def __init__(
        self,
        features_in: int,
        features_out: int,
        rank: int = 1,
        alpha: float = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = "LoRAParametrization"
        rows, columns = size(op, "features_in", features_in), size(op, "features_out", features_out)
        rank, self.alpha = size(op, "rank", rank), number(op, "alpha", alpha)
        dtype = adapter_dtype(op, dtype)
        super().__init__()
        self.rank, self.scale, self.enabled = rank, alpha / rank, True
        self.lora_A = nn.Parameter(torch.empty(rank, columns, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(rows, rank, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw lora_A anew; lora_B, and with it the update, is zero."""
        nn.init.normal_(self.lora_A)
        nn.init.zeros_(self.lora_B)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return weight
        update = (self.lora_B @ self.lora_A).view(weight.shape) * self.scale
        return (weight + update).to(weight.dtype)

    def enable(self) -> None:
        """Let the update act again."""
        self.enabled = True

    def disable(self) -> None:
        """Take the update out of the weight; its parameters stay as they are."""
        self.enabled = False

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}" + ("" if self.enabled else ", disabled")


@named_options
def add_parametrization(
    layer: nn.Module, rank: int = 1, alpha: float = 1, name: str = "weight", *, freeze_base: bool = True
) -> LoRAParametrization:
    """Put a `LoRAParametrization` on ``layer``'s parameter ``name``; returns it.

    layer      any module: nn.Linear, a convolution, nn.MultiheadAttention (name="in_proj_weight"), nn.LSTM
               (name="weight_hh_l0"), ...
    name       of a float parameter of two dimensions or more; then stored as parametrizations.<name>.original
    freeze_base    False leaves its requires_grad as it is
    Raises     TypeError: no module, or no float dtype.  ValueError: no such parameter, a shape, a range; nothing has
               been changed then.  torch's parametrize.remove_parametrizations takes it out, merged or not.
    """
    _checks.require_dtype(isinstance(layer, nn.Module), _OP, "layer", "be an nn.Module", type(layer).__name__)
    flag(_OP, "freeze_base", freeze_base)
    stacked = parametrize.is_parametrized(layer, name)
    weight: Any = getattr(layer, name) if stacked else layer._parameters.get(name)
    names = ", ".join(layer._parameters) or "none"
    _checks.require(weight is not None, _OP, "name", f"be a parameter of {type(layer).__name__} ({names})", repr(name))
    lazy = isinstance(weight, nn.parameter.UninitializedParameter)
    _checks.require(not lazy, _OP, name, "be initialised", "an uninitialised parameter")
    _checks.floats(_OP, name, weight.dtype)
    _checks.require(weight.dim() >= 2, _OP, name, "have two dimensions or more", list(weight.shape))
    rows, columns = weight.shape[0], weight[0].numel()
    update = LoRAParametrization(rows, columns, rank, alpha, weight.device, weight.dtype)
    parametrize.register_parametrization(layer, name, update)
    if freeze_base:
        lists: Any = layer.parametrizations
        lists[name].original.requires_grad_(False)
    if isinstance(layer, nn.RNNBase) and _refresh not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_refresh)
    return update


def _refresh(layer: Any, _: Any) -> None:
    """torch's recurrent modules call the vendor with a list of their weights, which no parametrization reaches."""
    layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]
