"""From one read of x: ``da = dsᵀ drop(x)`` and the adapter's share of dx, ``mask ∘ (ds a) / keep``."""

from __future__ import annotations

import torch

from fastpeft.reference._masks import unpack
from fastpeft.reference.dropout import dropped


def lora_grad_a(
    x: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_da: bool,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], ds [M, R], a [R, K] -> da [R, K] in a.dtype, dx [M, K] in ds.dtype; [0] where not needed.

    mask       bits (`_masks`), or None; da is zero where its bit is
    """
    da = (ds.t() @ dropped(x, p, seed)).to(a.dtype) if need_da else a.new_empty(0)
    if need_da and mask is not None:
        da = da * unpack(mask, da.shape[1])
    dx = dropped(ds @ a.to(ds.dtype), p, seed) if need_dx else ds.new_empty(0)
    return da, dx
