"""LoRALinear: a frozen linear layer with a LoRA adapter on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn

from fastpeft.nn.config import adapter_dtype, flag, size
from fastpeft.nn.layers._construct import constructor_form, from_options, require_linear
from fastpeft.nn.merge import Mergeable

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastpeft.nn.config import AdapterOptions

_SIZES = ("in_features", "out_features")
_POSITIONS = ("rank", "alpha", "dropout_probability", "bias")
_ADAPTING = ("original_layer", "adapter_dtype", "freeze_base")
_NEW = (*_SIZES, "base_bias", "device", "dtype", "adapter_dtype", "freeze_base")
_Self = TypeVar("_Self", bound="LoRALinear")


class LoRALinear(Mergeable):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ Bᵀ + lora_bias)              Hu et al. 2021, arXiv:2106.09685, eq. 3

    LoRALinear(original_layer, rank=8, alpha=16, dropout_probability=0.1, bias=False)   layout "out_in"
        adapts an nn.Linear: its weight and bias Parameters become this module's own and are frozen, even if
        something else holds them. Its training flag is kept.
    LoRALinear(in_features, out_features, rank=4)                                       layout "in_out"
        makes a new base first, frozen too; ``base_bias``, ``device``, ``dtype`` are nn.Linear's bias, device, dtype.

    bias, rank, alpha, layout, scaling, use_rslora, init, dropout, backend    as in LoRALayer; init may also be pissa or
                olora, which take their part out of W in place
    adapter_dtype    of lora_A, lora_B and lora_bias; default: the base's, fp32 where that is a half precision
    freeze_base      False leaves requires_grad of the base as it is
    Input      x [..., in_features] in the weight's dtype, or any under autocast
    Output     y [..., out_features]; bit-identical to the base layer while disabled
    State dict weight, bias, lora_A, lora_B, lora_bias: weight and bias as in nn.Linear, so its checkpoints load with
               strict=False. It is always that of the unmerged module, and loading one unmerges first.
    Raises     TypeError: original_layer is no plain nn.Linear, a type, or an unknown option.  ValueError: a range, or a
               layer with hooks.  Nothing has been changed then.
    """

    if TYPE_CHECKING:

        @overload
        def __init__(
            self,
            original_layer: nn.Linear,
            *args: Any,
            adapter_dtype: torch.dtype | None = None,
            freeze_base: bool = True,
            **options: Unpack[AdapterOptions],
        ) -> None: ...

        @overload
        def __init__(
            self,
            in_features: int,
            out_features: int,
            *args: Any,
            base_bias: bool = True,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            **options: Unpack[AdapterOptions],
        ) -> None: ...

    def __init__(self, *args: Any, **options: Any) -> None:
        op = type(self).__name__
        adapting = constructor_form(op, args, options, (*_SIZES, *(self.POSITIONS or _POSITIONS)))
        layout = self._convention(options, len(args)) or "in_out"
        if adapting:
            layer, K, N = options.pop("original_layer"), 0, 0
            require_linear(op, layer)
            N, K = layer.weight.shape
        else:
            K, N = (size(op, name, options.pop(name, None)) for name in _SIZES)
        kind: Any = options.pop("adapter_dtype", None)
        freeze, new = options.pop("freeze_base", True), {}
        flag(op, "freeze_base", freeze)
        if not adapting:
            new = {name: options.pop(name) for name in ("base_bias", "device", "dtype") if name in options}
            flag(op, "base_bias", new.get("base_bias", True))
        known = _ADAPTING if adapting else _NEW
        config, own = self._configure(K, N, options, "out_in" if adapting else layout, True, *known)
        if not adapting:
            kept = adapter_dtype(op, new.get("dtype"))
            layer = nn.Linear(K, N, new.get("base_bias", True), new.get("device"), kept)
        kind = adapter_dtype(op, kind, layer.weight)
        super().__init__()
        self.register_parameter("weight", layer._parameters["weight"])
        self.register_parameter("bias", layer.bias)
        self._adapt(config, self.weight.device, kind, **own)
        self.training = layer.training
        self.reset_parameters()
        if freeze:
            self.weight.requires_grad_(False)
            if self.bias is not None:
                self.bias.requires_grad_(False)

    @classmethod
    def from_linear(
        cls: type[_Self],
        layer: nn.Linear,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        **options: Any,
    ) -> _Self:
        """Adapt ``layer``: rank 16, alpha 32 (unless ``scaling`` is given), dropout 0.05, and the class's options."""
        options |= {"rank": rank, "alpha": alpha, "dropout": dropout}
        return cls(original_layer=layer, **from_options(cls.RANKS, options))

    def reset_parameters(self) -> None:
        """Draw the factors again by ``init``; the base stays, but pissa and olora take their part out of it."""
        self._require_resettable()
        self._reset(self.weight.detach())

    def forward(self, x: torch.Tensor, *condition: Any) -> torch.Tensor:
        if self._undo is not None or not self._enabled:
            return nn.functional.linear(x, self.weight, self.bias)
        held: dict[str, Any] = self._parameters
        try:
            weight, bias = held["weight"], held["bias"]
        except KeyError:  # see factors
            weight, bias = self.weight, self.bias
        # A call without a star costs a tiny layer 1 % less.
        return self._linear(x, weight, bias, *condition) if condition else self._linear(x, weight, bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None if self._undo is None else self._undo.had_bias
        base = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
        return f"{base}, {self._describe()}" + (", merged" if self.merged else "")
