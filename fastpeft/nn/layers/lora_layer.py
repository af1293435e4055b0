"""LoRALayer: the adapter without a base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastpeft.nn.config import adapter_dtype, one_of, size
from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.layers._construct import by_position

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastpeft.nn.config import AdapterOptions

_SIZES = ("input_dimension", "output_dimension")
_POSITIONS = ("rank", "alpha", "dropout_probability", "bias")
_SPELLINGS = ("input_dim", "output_dim", "in_features", "out_features", "device", "dtype")


class LoRALayer(LoRAModule):
    """y = scaling · (dropout(x) Aᵀ Bᵀ + lora_bias), to be added to a base layer's output        arXiv:2106.09685, eq. 3

    LoRALayer(input_dimension, output_dimension, rank=8, alpha=16, dropout_probability=0.1, bias=False, ...)

    input_dimension, output_dimension    sizes of x's and y's last dimension; also input_dim, output_dim; or
                in_features, out_features, which select layout "in_out". By position they mean layout "out_in".
    rank        r >= 1
    alpha       numerator of the scaling α/r; None if it is fixed
    dropout_probability    in [0, 1), of an element of x being hidden from A while training; also ``dropout``
    bias        whether the output has a trainable bias, lora_bias [output_dimension], multiplied by scaling
    layout      "out_in": lora_A [r, in], lora_B [out, r] · "in_out": lora_A [in, r], lora_B [r, out]. It also sets the
                defaults of rank, scaling, init and dropout: see the table in fastpeft/nn/config.py
    scaling     fixed factor instead of α/r
    use_rslora  α/√r instead of α/r                                               Kalajdzievski 2023, arXiv:2312.03732
    init        a scheme of fastpeft/nn/init.py that needs no base weight
    backend     as in fastpeft.ops.lora_linear
    device, dtype    of the parameters; default: torch's own
    Input      x [..., in] fp32 | bf16 | fp16, whatever the parameters' dtype
    Output     y [..., out] in x.dtype, under autocast in its dtype; zeros while disabled
    Raises     ValueError: range, or a name given twice.  TypeError: type, or an unknown option.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            input_dimension: int | None = None,
            output_dimension: int | None = None,
            *args: Any,
            input_dim: int | None = None,
            output_dim: int | None = None,
            in_features: int | None = None,
            out_features: int | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            **options: Unpack[AdapterOptions],
        ) -> None: ...

    else:

        def __init__(self, *args: Any, **options: Any) -> None:
            op = type(self).__name__
            by_position(op, args, options, (*self.SIZES, *(self.POSITIONS or _POSITIONS)))
            layout = self._convention(options, len(args))
            in_out = options.get("in_features") is not None and options.get("out_features") is not None
            sizes = {name: options.pop(name, None) for name in (*_SIZES, *_SPELLINGS)}
            device, dtype = sizes.pop("device"), sizes.pop("dtype")
            K, N = (
                one_of(op, **{name: sizes[name] for name in names})
                for names in (("input_dimension", "input_dim", "in_features"),
                              ("output_dimension", "output_dim", "out_features"))
            )  # fmt: skip
            K, N = size(op, "input_dimension", K), size(op, "output_dimension", N)
            layout = layout or ("in_out" if in_out else "out_in")
            config, own = self._configure(K, N, options, layout, False, *_SIZES, *_SPELLINGS)
            dtype = adapter_dtype(op, dtype)
            super().__init__()
            self._adapt(config, device, dtype, **own)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors again by ``init``, with the current scaling."""
        self._reset(None)

    def forward(self, x: torch.Tensor, *condition: Any) -> torch.Tensor:
        if not self._enabled:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return self._adapter(x, *condition)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"
