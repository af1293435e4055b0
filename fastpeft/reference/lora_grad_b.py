"""What one read of dy gives: ``ds = scale · dy b``, ``db = scale · dyᵀ s`` and the bias gradient."""

from __future__ import annotations

import torch


def lora_grad_b(
    dy: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scale: float, need_db: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy [M, N], s [M, R], b [N, R] -> ds [M, R] in dy.dtype, db [N, R] in b.dtype, dbias [N] fp32 | fp64; or [0]."""
    ds = (dy @ b.to(dy.dtype)) * scale
    db = ((dy.t() @ s) * scale).to(b.dtype) if need_db else b.new_empty(0)
    dbias = (
        dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        if need_bias
        else dy.new_empty(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    )
    return ds, db, dbias
