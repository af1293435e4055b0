"""``y = x wᵀ + bias + scale · (drop(x) aᵀ bᵀ + lora_bias)`` and its gradients, composed of the primitives."""

from __future__ import annotations

import torch

from fastpeft.reference.lora_grad_a import lora_grad_a
from fastpeft.reference.lora_grad_b import lora_grad_b
from fastpeft.reference.lora_linear_fused import lora_linear_fused_fwd
from fastpeft.reference.lora_shrink import lora_shrink


def lora_linear_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], w [N, K], a [R, K], b [N, R] -> y [M, N], s [M, R]."""
    s = lora_shrink(x, a, p, seed)
    return lora_linear_fused_fwd(x, w, s, b, bias, lora_bias, scale), s


def lora_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_bias: bool,
    mask_a: torch.Tensor | None = None,
    mask_b: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dx [M, K], da [R, K], db [N, R], dbias [N] fp32 or fp64; [0] where not needed."""
    ds, db, dbias = lora_grad_b(dy, s, b, scale, need_db, need_bias, mask_b)
    da, dx = lora_grad_a(x, ds, a, p, seed, need_dx, need_da, mask_a)
    if need_dx:
        dx = dx.addmm_(dy, w)
    return dx, da, db, dbias
