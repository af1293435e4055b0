"""The base product and the rank-R product for a given s or ds: LoRA without the function of s in between."""

from __future__ import annotations

import torch

from fastpeft.reference.lora_grad_a import lora_grad_a
from fastpeft.reference.lora_linear_fused import lora_linear_fused_fwd


def lora_between_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """x [M, K], w [N, K], s [M, R], b [N, R] -> y = x wᵀ + bias + scale · (s bᵀ + lora_bias) [M, N]."""
    return lora_linear_fused_fwd(x, w, s, b, bias, lora_bias, scale)


def lora_between_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_da: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy [M, N], ds [M, R], a [R, K] -> dx = dy w + mask ∘ (ds a) / keep [M, K], da = dsᵀ drop(x) [R, K]; [0] where
    not needed."""
    da, dx = lora_grad_a(x, ds, a, p, seed, need_dx, need_da)
    return (dx.addmm_(dy, w) if need_dx else dx), da
