"""From one read of dy: ``ds = scale · dy b``, ``db = scale · dyᵀ s`` and the bias gradient."""

from __future__ import annotations

import torch

from fastpeft.reference._masks import unpack


def lora_grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    need_db: bool,
    need_bias: bool,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy [M, N], s [M, R], b [N, R] -> ds [M, R] in dy.dtype, db [N, R] in b.dtype, dbias [N] fp32 | fp64; or [0].

    mask       bits (`_masks`) of dbᵀ [R, N], or None; db is zero where its bit is
    """
    ds = (dy @ b.to(dy.dtype)) * scale
    db = ((dy.t() @ s) * scale).to(b.dtype) if need_db else b.new_empty(0)
    if need_db and mask is not None:
        db = db * unpack(mask, db.shape[0]).t()
    wide = torch.promote_types(dy.dtype, torch.float32)
    dbias = dy.sum(0, dtype=wide) if need_bias else dy.new_empty(0, dtype=wide)
    return ds, db, dbias
