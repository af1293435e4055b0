"""QLoRALinear: a linear layer with its weight in 4 bits and a LoRA adapter on it."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import torch
from torch import nn

from fastpeft.nn._config import adapter_dtype as _adapter_dtype
from fastpeft.nn._config import one_of, resolve
from fastpeft.nn._linear import FromSizes, constructor_form, default_alpha, require_linear
from fastpeft.nn._quantized import Quantized
from fastpeft.ops import _calls, _checks, linear4bit, linear4bit_lora, quantize_4bit

_OP = "QLoRALinear"
_NEW = ("in_features", "out_features", "rank", "bits")

_Self = TypeVar("_Self", bound="QLoRALinear")


class QLoRALinear(FromSizes, Quantized):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ Bᵀ + lora_bias)          Dettmers et al. 2023, arXiv:2305.14314, eq. 5

    QLoRALinear(original_layer, rank=8, alpha=16, dropout_probability=0.1, bias=False)   layout "out_in"
        quantises the weight of an nn.Linear, which stays as it is, on its device; its bias Parameter becomes this
        module's own and is frozen. Its training flag is kept.
    QLoRALinear(in_features, out_features, rank=4, bits=4)                              layout "in_out"
        makes a new base first; ``base_bias``, ``device``, ``dtype`` are nn.Linear's bias, device, dtype.

    bits           4, the only number that is served
    quant_type, block_size, double_quant    as in fastpeft.ops.quantize_4bit
    compute_dtype  of the products; default: that of x. x is cast to it and y back, but autocast goes first.
    bias, rank, alpha, layout, scaling, use_rslora, init, dropout, backend    as in LoRALayer
    adapter_dtype  of lora_A, lora_B and lora_bias; default: the original weight's, fp32 where that is a half precision
    Input      x [..., in_features] fp32 | bf16 | fp16
    Output     y [..., out_features] in x.dtype, under autocast in its dtype
    State dict weight and weight.* in bitsandbytes' keys and bytes, bias, lora_A, lora_B, lora_bias: Linear4bit's
               checkpoints load with strict=False, ours there. It is always that of the unmerged module. A weight of
               another shape, of floats or with a part missing is an error, and changes nothing of the module.
    Raises     TypeError: original_layer is no plain nn.Linear, or a type.  ValueError: a range, or a layer with hooks.

    ``.to(dtype)``, ``.half()`` and the like cast the adapter and the bias, never the packed weight and its scales.
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
    def __init__(
        self, in_features: int, out_features: int, rank: int | None = None, bits: int = 4, **options: Any
    ) -> None: ...

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
        bits: int = 4,
        quant_type: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        compute_dtype: torch.dtype | None = None,
        dropout: float | None = None,
        layout: str = "out_in",
        scaling: float | None = None,
        use_rslora: bool = False,
        init: str | None = None,
        backend: str | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        require_linear(_OP, original_layer)
        _checks.require(bits == 4, _OP, "bits", "be 4: weights of 8 bits are not served", bits)
        known = (None, torch.float32, torch.bfloat16, torch.float16)
        _checks.one_of(_OP, "compute_dtype", compute_dtype, known)
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
            base=False,
        )
        dtype = _adapter_dtype(_OP, adapter_dtype, original_layer.weight)
        # An explicit backend is asked for by the products; the bytes are the same whichever quantises.
        quantized = quantize_4bit(original_layer.weight.detach(), quant_type, block_size, double_quant)
        super().__init__()
        self.compute_dtype = compute_dtype
        self.register_parameter("weight", nn.Parameter(quantized.packed.view(-1, 1), requires_grad=False))
        self.register_parameter("bias", original_layer.bias)
        self._hold(quantized)
        self._adapt(config, self.weight.device, dtype)
        self.training = original_layer.training
        self.reset_parameters()
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def from_linear(
        cls: type[_Self],
        layer: nn.Linear,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.05,
        bits: int = 4,
        quant_type: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        compute_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> _Self:
        """Quantise and adapt ``layer``; alpha = 32 unless ``scaling`` is given, and the options of the class."""
        alpha = default_alpha(alpha, options.get("scaling"))
        options |= {"quant_type": quant_type, "double_quant": double_quant, "block_size": block_size, "bits": bits}
        options |= {"rank": rank, "alpha": alpha, "dropout": dropout, "compute_dtype": compute_dtype}
        return cls(original_layer=layer, **options)

    def reset_parameters(self) -> None:
        """Draw the factors anew by ``init``; the base is left."""
        self._require_unmerged("reset_parameters")
        self._reset(None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x.dtype
        cast = self.compute_dtype is not None and _calls.autocast_dtype(x, x.device.type) is None
        if cast:
            x = x.to(self.compute_dtype)
        weight = self.weight_4bit()
        held: dict[str, Any] = self._parameters
        try:
            bias, lora_bias = held["bias"], held["lora_bias"]
        except KeyError:  # see factors
            bias, lora_bias = self.bias, self.lora_bias
        if self._undo is not None or not self._enabled:
            y = linear4bit(x, weight, bias, backend=self.backend)
        else:
            a, b = self.factors()
            y = linear4bit_lora(
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
        return y.to(given) if cast else y

    def extra_repr(self) -> str:
        bias = self.bias is not None if self._undo is None else self._undo.had_bias
        base = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
        double = self.weight_4bit().double_quant
        base += f", quant_type={self.quant_type}, block_size={self.block_size}, double_quant={double}"
        compute = "" if self.compute_dtype is None else f", compute_dtype={str(self.compute_dtype).split('.')[1]}"
        return f"{base}{compute}, {self._describe()}" + (", merged" if self.merged else "")
