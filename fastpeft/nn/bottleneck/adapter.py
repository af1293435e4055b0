"""Adapter: x + scale · up(activation(down(x))), a bottleneck with a residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastpeft import dispatch
from fastpeft.nn.config import adapter_dtype, named_options, number, size
from fastpeft.ops import _checks
from fastpeft.ops.lora_between import lora_between

KINDS = ("houlsby", "pfeiffer", "parallel")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Adapter(nn.Module):
    """x + scale · up(activation(down(x)))                                        Houlsby et al. 2019, arXiv:1902.00751

    dim        size of x's last dimension
    bottleneck hidden units; default dim / 16, at least 1
    activation "gelu", "relu", "silu", "tanh" or "sigmoid"
    kind       where a manager puts it: "houlsby" and "pfeiffer" behind a layer (after the attention and the MLP, or
               after the MLP alone: Pfeiffer et al. 2021, arXiv:2005.00247), and with the residual; "parallel" beside
               a layer: the delta alone (He et al. 2022, arXiv:2110.04366)
    scale      of the delta
    backend    as in fastpeft.ops.lora_linear
    Parameters down.weight [bottleneck, dim], down.bias, up.weight [dim, bottleneck], up.bias; up is zero at init:
               the adapter starts as the identity ("parallel": as zero)
    Input      x [..., dim] fp32 | bf16 | fp16, whatever the parameters' dtype
    Output     as x; under autocast the delta is in autocast's dtype. x itself while disabled ("parallel": zeros)
    Saves      x and activation(down(x))
    Raises     ValueError: a range, an unknown name.  TypeError: a type.
    """

    @named_options
    def __init__(
        self,
        dim: int,
        bottleneck: int | None = None,
        activation: str = "gelu",
        kind: str = "houlsby",
        *,
        scale: float = 1.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = type(self).__name__
        size(op, "dim", dim)
        bottleneck = size(op, "bottleneck", max(dim // 16, 1) if bottleneck is None else bottleneck)
        _checks.one_of(op, "activation", activation, tuple(ACTIVATIONS))
        _checks.one_of(op, "kind", kind, KINDS)
        _checks.one_of(op, "backend", backend, (None, *dispatch.BACKENDS))
        dtype = adapter_dtype(op, dtype)
        super().__init__()
        self.dim, self.bottleneck, self.activation, self.kind = dim, bottleneck, activation, kind
        self.scale, self.backend, self._enabled = number(op, "scale", scale), backend, True
        self.down = nn.Linear(dim, bottleneck, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``down`` as nn.Linear does; ``up`` is zero."""
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """scale · up(activation(down(x))) [..., dim], without the residual."""
        act = ACTIVATIONS[self.activation]
        bias: torch.Tensor = self.down.bias
        return lora_between(
            x, self.down.weight, self.up.weight, lambda s: act(s + bias.to(s.dtype)),
            lora_bias=self.up.bias, scale=self.scale, backend=self.backend,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._enabled:
            return torch.zeros_like(x) if self.kind == "parallel" else x
        return self.delta(x) if self.kind == "parallel" else x + self.delta(x)

    @property
    def enabled(self) -> bool:
        return self._enabled

    def enable(self) -> None:
        """Let the adapter act again."""
        self._enabled = True

    def disable(self) -> None:
        """Take the adapter out of every later call; its parameters stay as they are."""
        self._enabled = False

    def extra_repr(self) -> str:
        scaled = "" if self.scale == 1.0 else f", scale={self.scale:g}"
        off = "" if self._enabled else ", disabled"
        sizes = f"dim={self.dim}, bottleneck={self.bottleneck}"
        return f"{sizes}, activation={self.activation}, kind={self.kind}{scaled}{off}"
