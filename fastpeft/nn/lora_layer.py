"""LoRALayer, the adapter without a base, and what every LoRA module shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.nn import init as schemes
from fastpeft.nn._config import Config, adapter_dtype, one_of, resolve, size
from fastpeft.ops.lora_adapter import lora_adapter


class LoRAModule(nn.Module):
    """lora_A, lora_B, lora_bias, their hyperparameters and the switch; the base class of the LoRA modules.

    ``scaling`` (float or 0-d tensor), ``dropout_probability`` and ``backend`` are read at every call and may be set.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    scaling: float | torch.Tensor

    def _adapt(self, config: Config, device: torch.device | str | None, dtype: torch.dtype) -> None:
        """Make the factors, without values."""
        self.in_features, self.out_features = config.in_features, config.out_features
        self.rank, self.alpha, self.scaling = config.rank, config.alpha, config.scaling
        self.use_rslora, self.init, self.layout = config.use_rslora, config.init, config.layout
        self.dropout_probability, self.backend = config.dropout, config.backend
        self._transposed, self._enabled = config.layout == "in_out", True
        a, b = (config.rank, config.in_features), (config.out_features, config.rank)
        if self._transposed:
            a, b = a[::-1], b[::-1]
        self.lora_A = nn.Parameter(torch.empty(a, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(b, device=device, dtype=dtype))
        bias = torch.zeros(config.out_features, device=device, dtype=dtype) if config.bias else None
        self.register_parameter("lora_bias", None if bias is None else nn.Parameter(bias))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, K] and B [N, R] whatever the layout: the parameters or views of them, differentiable."""
        held: dict[str, Any] = self._parameters
        try:
            # nn.Module's attribute lookup costs a tiny layer several microseconds a call.
            a, b = held["lora_A"], held["lora_B"]
        except KeyError:  # torch's parametrize or prune computes one of them
            a, b = self.lora_A, self.lora_B
        return (a.t(), b.t()) if self._transposed else (a, b)

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """scaling · B A [N, K], in fp32 or the factors' wider dtype: what the adapter adds to a base weight."""
        a, b = self.factors()
        dtype = torch.promote_types(a.dtype, torch.float32)
        return (b.to(dtype) @ a.to(dtype)) * self.scaling

    def _reset(self, weight: torch.Tensor | None) -> None:
        a, b = self.factors()
        schemes.initialise(self.init, a.detach(), b.detach(), float(self.scaling), weight)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    @property
    def enabled(self) -> bool:
        return self._enabled

    def enable(self) -> None:
        """Let the adapter act again."""
        self._enabled = True

    def disable(self) -> None:
        """Take the adapter out of every later call; its parameters stay as they are."""
        self._enabled = False

    def _describe(self) -> str:
        parts = [f"rank={self.rank}", "" if self.alpha is None else f"alpha={self.alpha:g}"]
        parts += [f"scaling={float(self.scaling):g}", f"dropout={self.dropout_probability:g}", f"init={self.init}"]
        parts += ["lora_bias=True" if self.lora_bias is not None else "", f"layout={self.layout}"]
        parts += ["" if self._enabled else "disabled", f"backend={self.backend}" if self.backend else ""]
        return ", ".join(part for part in parts if part)


class LoRALayer(LoRAModule):
    """y = scaling · (dropout(x) Aᵀ Bᵀ + lora_bias), to be added to a base layer's output        arXiv:2106.09685, eq. 3

    input_dimension, output_dimension    sizes of x's and y's last dimension; also input_dim, output_dim; or
                in_features, out_features, which select layout "in_out". By position they mean layout "out_in".
    rank        r >= 1
    alpha       numerator of the scaling α/r; None where it is fixed
    dropout_probability    in [0, 1), of an element of x being hidden from A while training; also ``dropout``
    bias        whether the output has a trainable bias, lora_bias [output_dimension], multiplied by scaling
    layout      "out_in": lora_A [r, in], lora_B [out, r] · "in_out": lora_A [in, r], lora_B [r, out]. It brings the
                defaults of rank, scaling, init and dropout with it: the table of fastpeft/nn/_config.py
    scaling     fixed factor in the place of α/r
    use_rslora  α/√r in the place of α/r                                            Kalajdzievski 2023, arXiv:2312.03732
    init        a scheme of fastpeft/nn/init.py that needs no base weight
    backend     as in fastpeft.ops.lora_linear
    Input      x [..., in] fp32 | bf16 | fp16, whatever the parameters' dtype
    Output     y [..., out] in x.dtype, under autocast in its dtype; zeros while disabled
    Raises     ValueError: range, or a name given twice.  TypeError: type.
    """

    def __init__(
        self,
        input_dimension: int | None = None,
        output_dimension: int | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        dropout_probability: float | None = None,
        bias: bool = False,
        *,
        input_dim: int | None = None,
        output_dim: int | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
        dropout: float | None = None,
        layout: str | None = None,
        scaling: float | None = None,
        use_rslora: bool = False,
        init: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = "LoRALayer"
        slides = in_features is not None and out_features is not None
        K = one_of(op, input_dimension=input_dimension, input_dim=input_dim, in_features=in_features)
        N = one_of(op, output_dimension=output_dimension, output_dim=output_dim, out_features=out_features)
        config = resolve(
            op,
            size(op, "input_dimension", K),
            size(op, "output_dimension", N),
            rank=rank,
            alpha=alpha,
            scaling=scaling,
            use_rslora=use_rslora,
            init=init,
            dropout=one_of(op, dropout_probability=dropout_probability, dropout=dropout),
            layout=one_of(op, "in_out" if slides else "out_in", layout=layout),
            bias=bias,
            backend=backend,
            base=False,
        )
        super().__init__()
        self._adapt(config, device, adapter_dtype(op, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors anew by ``init``, with the scaling as it is now."""
        self._reset(None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._enabled:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        a, b = self.factors()
        return lora_adapter(
            x,
            a,
            b,
            self.lora_bias,
            scale=self.scaling,
            dropout=self.dropout_probability if self.training else 0.0,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"
