"""``s = drop(x) aᵀ``: the projection to rank space."""

from __future__ import annotations

import torch

from fastpeft.reference.dropout import dropped


def lora_shrink(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], a [R, K] any float dtype -> s [M, R] in x.dtype."""
    return dropped(x, p, seed) @ a.to(x.dtype).t()
