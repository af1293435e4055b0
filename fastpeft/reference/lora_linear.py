"""``y = x wᵀ + bias + scale · (drop(x) aᵀ bᵀ + lora_bias)`` and its gradients, composed of the primitives."""

from __future__ import annotations

import torch

from fastpeft.reference.lora_expand import lora_expand
from fastpeft.reference.lora_grad_a import lora_grad_a
from fastpeft.reference.lora_grad_b import lora_grad_b
from fastpeft.reference.lora_shrink import lora_shrink


def _wide(activation: torch.Tensor) -> torch.Tensor:
    """In fp32 instead of fp16, because s and ds may exceed 65504 even if no gradient does."""
    return activation.float() if activation.dtype == torch.float16 else activation


def _as_given(activation: torch.Tensor) -> torch.autocast:
    """Autocast off: it would cast fp32 activations back to fp16, and every operand already has its dtype."""
    return torch.autocast(activation.device.type, enabled=False)


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
    """x [M, K], w [N, K], a [R, K], b [N, R] -> y [M, N], s [M, R] in x.dtype, but fp32 for fp16."""
    with _as_given(x):
        s = lora_shrink(_wide(x), a, p, seed)
        return (x @ w.t() + lora_expand(s, b, bias, lora_bias, scale)).to(x.dtype), s


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
    with _as_given(dy):
        ds, db, dbias = lora_grad_b(_wide(dy), s, b, scale, need_db, need_bias, mask_b)
        da, dx = lora_grad_a(_wide(x), ds, a, p, seed, need_dx, need_da, mask_a)
        if need_dx:
            dx = dx + dy @ w
        return dx.to(dy.dtype), da, db, dbias
