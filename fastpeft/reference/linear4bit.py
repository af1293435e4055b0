"""``y = x wᵀ + bias``, with an adapter ``+ scale · (drop(x) aᵀ bᵀ + lora_bias)``; w is stored in 4 bits."""

from __future__ import annotations

import torch

from fastpeft.reference.dequantize_4bit import weight_of
from fastpeft.reference.lora_linear import lora_linear_bwd, lora_linear_fwd


def linear4bit_fwd(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    quant_type: str,
    block_size: int,
    N: int,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], w [N, K] packed, a [R, K], b [N, R] -> y [M, N], s [M, R]; s [0] without an adapter."""
    K = x.shape[1]
    w = weight_of(packed, scales, quant_type, block_size, N * K).view(N, K).to(x.dtype)
    if a is None or b is None:
        y = x @ w.t()
        return y if bias is None else y + bias.to(x.dtype), x.new_empty(0)
    return lora_linear_fwd(x, w, a, b, bias, lora_bias, scale, p, seed)


def linear4bit_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    quant_type: str,
    block_size: int,
    K: int,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    s: torch.Tensor,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dx [M, K], da [R, K], db [N, R], dbias [N] fp32 or fp64; [0] where not needed."""
    N = dy.shape[1]
    w = dy
    if need_dx:
        w = weight_of(packed, scales, quant_type, block_size, N * K).view(N, K).to(dy.dtype)
    if a is None or b is None:
        dx = dy @ w if need_dx else dy.new_empty(0)
        dbias = (
            dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
            if need_bias
            else dy.new_empty(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        )
        return dx, dy.new_empty(0), dy.new_empty(0), dbias
    return lora_linear_bwd(dy, x, w, a, b, s, scale, p, seed, need_dx, need_da, need_db, need_bias)
