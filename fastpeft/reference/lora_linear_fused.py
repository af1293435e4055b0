"""The base product and the rank-R product in one sum, forward and for dx."""

from __future__ import annotations

import torch

from fastpeft.reference.dropout import dropped
from fastpeft.reference.lora_expand import lora_expand


def lora_linear_fused_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """x [M, K], w [N, K], s [M, R], b [N, R] -> y = x wᵀ + bias + scale · (s bᵀ + lora_bias) [M, N]."""
    return x @ w.t() + lora_expand(s, b, bias, lora_bias, scale)


def lora_linear_fused_dx(
    dy: torch.Tensor, w: torch.Tensor, ds: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """dy [M, N], w [N, K], ds [M, R], a [R, K] -> dx = dy w + mask ∘ (ds a) / keep [M, K]."""
    return dy @ w + dropped(ds @ a.to(ds.dtype), p, seed)
