"""QLoRALinear: a linear layer with its weight in 4 bits and a LoRA adapter on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn

from fastpeft.nn.config import adapter_dtype, flag, size
from fastpeft.nn.layers._construct import constructor_form, from_options, require_linear
from fastpeft.nn.layers._quantized import Quantized
from fastpeft.ops import _calls, _checks, linear4bit, quantize_4bit

_SIZES = ("in_features", "out_features")
_POSITIONS = ("rank", "bits")
_QUANTISED = ("bits", "quant_type", "double_quant", "block_size", "compute_dtype", "adapter_dtype")
_NEW = ("base_bias", "device", "dtype")

_Self = TypeVar("_Self", bound="QLoRALinear")


class QLoRALinear(Quantized):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ Bᵀ + lora_bias)          Dettmers et al. 2023, arXiv:2305.14314, eq. 5

    QLoRALinear(original_layer, rank=8, alpha=16, dropout_probability=0.1, bias=False)   layout "out_in"
        quantises the weight of an nn.Linear, which stays as it is, on its device; its bias Parameter becomes this
        module's own and is frozen. Its training flag is kept.
    QLoRALinear(in_features, out_features, rank=4, bits=4)                              layout "in_out"
        makes a new base first; ``base_bias``, ``device``, ``dtype`` are nn.Linear's bias, device, dtype.

    bits           4, the only number supported
    quant_type, block_size, double_quant    as in fastpeft.ops.quantize_4bit
    compute_dtype  of the products; default: that of x. x is cast to it and y back, but autocast takes precedence.
    bias, rank, alpha, layout, scaling, use_rslora, init, dropout, backend    as in LoRALayer
    adapter_dtype  of lora_A, lora_B and lora_bias; default: the original weight's, fp32 where that is a half precision
    Input      x [..., in_features] fp32 | bf16 | fp16
    Output     y [..., out_features] in x.dtype, under autocast in its dtype
    State dict weight and weight.* in bitsandbytes' keys and bytes, bias, lora_A, lora_B, lora_bias: Linear4bit's
               checkpoints load with strict=False, ours there. It is always that of the unmerged module. A weight of
               another shape, of floats or with a part missing is an error, and changes nothing of the module.
    Raises     TypeError: original_layer is no plain nn.Linear, or a type.  ValueError: a range, or a layer with hooks.

    Averages of parameters (``torch.optim.swa_utils``) and of state dicts leave the packed weight as it is. FSDP2 shards
    it; FSDP1 cannot flatten integers: pass every ``weight`` in ``ignored_states``, and each rank keeps it whole.

    ``.to(dtype)``, ``.half()`` and the like cast the adapter and the bias, never the packed weight and its scales.
    """

    if TYPE_CHECKING:

        @overload
        def __init__(self, original_layer: nn.Linear, *args: Any, **options: Any) -> None: ...

        @overload
        def __init__(self, in_features: int, out_features: int, *args: Any, **options: Any) -> None: ...

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
        own_of_base = (*_QUANTISED, *(() if adapting else _NEW))
        given = {name: options.pop(name) for name in own_of_base if name in options}
        config, own = self._configure(K, N, options, "out_in" if adapting else layout, False, *own_of_base)
        bits, compute = given.get("bits", 4), given.get("compute_dtype")
        _checks.require(bits == 4, op, "bits", "be 4: weights of 8 bits are not served", bits)
        _checks.one_of(op, "compute_dtype", compute, (None, torch.float32, torch.bfloat16, torch.float16))
        if not adapting:
            flag(op, "base_bias", given.get("base_bias", True))
            kept = adapter_dtype(op, given.get("dtype"))
            layer = nn.Linear(K, N, given.get("base_bias", True), given.get("device"), kept)
        dtype = adapter_dtype(op, given.get("adapter_dtype"), layer.weight)
        # An explicit backend applies to the products; every backend quantises to the same bytes.
        packing = {name: given[name] for name in ("quant_type", "block_size", "double_quant") if name in given}
        quantized = quantize_4bit(layer.weight.detach(), **packing)
        super().__init__()
        self.compute_dtype = compute
        self.register_parameter("weight", nn.Parameter(quantized.packed.view(-1, 1), requires_grad=False))
        self.register_parameter("bias", layer.bias)
        self._hold(quantized)
        self._adapt(config, self.weight.device, dtype, **own)
        self.training = layer.training
        self.reset_parameters()
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
        """Quantise and adapt ``layer``: rank 16, alpha 32 (unless ``scaling`` is given), dropout 0.05, NF4 in blocks of
        64 with double quantisation; and the options of the class."""
        options |= {"rank": rank, "alpha": alpha, "dropout": dropout}
        return cls(original_layer=layer, **from_options(cls.RANKS, options))

    def reset_parameters(self) -> None:
        """Draw the factors again by ``init``; the base stays as it is."""
        self._require_unmerged("reset_parameters")
        self._reset(None)

    def forward(self, x: torch.Tensor, *condition: Any) -> torch.Tensor:
        given = x.dtype
        cast = self.compute_dtype is not None and _calls.autocast_dtype(x, x.device.type) is None
        if cast:
            x = x.to(self.compute_dtype)
        weight = self.weight_4bit()
        try:
            bias: Any = self._parameters["bias"]
        except KeyError:  # see factors
            bias = self.bias
        if self._undo is not None or not self._enabled:
            y = linear4bit(x, weight, bias, backend=self.backend)
        else:
            y = self._linear4bit(x, weight, bias, *condition)
        return y.to(given) if cast else y

    def extra_repr(self) -> str:
        bias = self.bias is not None if self._undo is None else self._undo.had_bias
        base = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
        double = self.weight_4bit().double_quant
        base += f", quant_type={self.quant_type}, block_size={self.block_size}, double_quant={double}"
        compute = "" if self.compute_dtype is None else f", compute_dtype={str(self.compute_dtype).split('.')[1]}"
        return f"{base}{compute}, {self._describe()}" + (", merged" if self.merged else "")
