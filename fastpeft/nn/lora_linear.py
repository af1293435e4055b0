"""LoRALinear: a frozen linear layer with a LoRA adapter on it."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import torch
from torch import nn

from fastpeft.nn._config import adapter_dtype as _adapter_dtype
from fastpeft.nn._config import one_of, resolve
from fastpeft.nn._linear import FromSizes, constructor_form, default_alpha, require_linear
from fastpeft.nn.merge import Mergeable
from fastpeft.ops import lora_linear

_OP = "LoRALinear"
_NEW = ("in_features", "out_features", "rank", "alpha", "dropout_probability", "bias")
_Self = TypeVar("_Self", bound="LoRALinear")


class LoRALinear(FromSizes, Mergeable):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ Bᵀ + lora_bias)              Hu et al. 2021, arXiv:2106.09685, eq. 3

    LoRALinear(original_layer, rank=8, alpha=16, dropout_probability=0.1, bias=False)   layout "out_in"
        adapts an nn.Linear: its weight and bias Parameters become this module's own and are frozen, also where
        something else holds them. Its training flag is kept.
    LoRALinear(in_features, out_features, rank=4)                                       layout "in_out"
        makes a new base first, frozen too; ``base_bias``, ``device``, ``dtype`` are nn.Linear's bias, device, dtype.

    bias, rank, alpha, layout, scaling, use_rslora, init, dropout, backend    as in LoRALayer; init may also be pissa or
                olora, which take their part out of W in place
    adapter_dtype    of lora_A, lora_B and lora_bias; default: the base's, fp32 where that is a half precision
    freeze_base      False leaves requires_grad of the base as it is
    Input      x [..., in_features] in the weight's dtype, or any under autocast
    Output     y [..., out_features]; the very bits of the base layer while disabled
    State dict weight, bias, lora_A, lora_B, lora_bias: weight and bias as in nn.Linear, so its checkpoints load with
               strict=False. It is always that of the unmerged module, and loading one unmerges first.
    Raises     TypeError: original_layer is no plain nn.Linear, or a type.  ValueError: a range, or a layer with hooks.
               Nothing has been changed then.
    """

    @overload
    def __init__(
        self,
        original_layer: nn.Linear,
        rank: int | None = None,
        alpha: float | None = None,
        dropout_probability: float | None = None,
        bias: bool = False,
        **options: Any,
    ) -> None: ...

    @overload
    def __init__(self, in_features: int, out_features: int, rank: int | None = None, **options: Any) -> None: ...

    def __init__(self, *args: Any, **options: Any) -> None:
        adapting = constructor_form(_OP, args, options, _NEW)
        (self._adapt_layer if adapting else self._adapt_new)(**options)

    def _adapt_layer(
        self,
        original_layer: nn.Linear,
        rank: int | None = None,
        alpha: float | None = None,
        dropout_probability: float | None = None,
        bias: bool = False,
        *,
        dropout: float | None = None,
        layout: str = "out_in",
        scaling: float | None = None,
        use_rslora: bool = False,
        init: str | None = None,
        backend: str | None = None,
        adapter_dtype: torch.dtype | None = None,
        freeze_base: bool = True,
    ) -> None:
        require_linear(_OP, original_layer)
        N, K = original_layer.weight.shape
        config = resolve(
            _OP,
            K,
            N,
            rank=rank,
            alpha=alpha,
            scaling=scaling,
            use_rslora=use_rslora,
            init=init,
            dropout=one_of(_OP, dropout_probability=dropout_probability, dropout=dropout),
            layout=layout,
            bias=bias,
            backend=backend,
            base=True,
        )
        dtype = _adapter_dtype(_OP, adapter_dtype, original_layer.weight)
        super().__init__()
        self.register_parameter("weight", original_layer._parameters["weight"])
        self.register_parameter("bias", original_layer.bias)
        self._adapt(config, self.weight.device, dtype)
        self.training = original_layer.training
        self.reset_parameters()
        if freeze_base:
            self.weight.requires_grad_(False)
            if self.bias is not None:
                self.bias.requires_grad_(False)

    @classmethod
    def from_linear(
        cls: type[_Self],
        layer: nn.Linear,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.05,
        **options: Any,
    ) -> _Self:
        """Adapt ``layer``; alpha = 32 unless ``scaling`` is given, and the options of the class."""
        alpha = default_alpha(alpha, options.get("scaling"))
        return cls(original_layer=layer, rank=rank, alpha=alpha, dropout=dropout, **options)

    def reset_parameters(self) -> None:
        """Draw the factors anew by ``init``; the base is left, but pissa and olora take their part out of it."""
        self._require_unmerged("reset_parameters")
        self._reset(self.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._undo is not None or not self._enabled:
            return nn.functional.linear(x, self.weight, self.bias)
        held: dict[str, Any] = self._parameters
        try:
            weight, bias, lora_bias = held["weight"], held["bias"], held["lora_bias"]
        except KeyError:  # see factors
            weight, bias, lora_bias = self.weight, self.bias, self.lora_bias
        a, b = self.factors()
        return lora_linear(
            x,
            weight,
            a,
            b,
            bias,
            lora_bias,
            scale=self.scaling,
            dropout=self.dropout_probability if self.training else 0.0,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        bias = self.bias is not None if self._undo is None else self._undo.had_bias
        base = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
        return f"{base}, {self._describe()}" + (", merged" if self.merged else "")
