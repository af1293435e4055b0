"""``y = bias + scale · (s bᵀ + lora_bias)``, and a form that adds to an existing y."""

from __future__ import annotations

import torch


def lora_expand(
    s: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, lora_bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """s [M, R], b [N, R], bias and lora_bias [N] -> y [M, N] in s.dtype."""
    y = (s @ b.to(s.dtype).t()) * scale
    if bias is not None:
        y = y + bias.to(s.dtype)
    if lora_bias is not None:
        y = y + (lora_bias.to(torch.promote_types(lora_bias.dtype, torch.float32)) * scale).to(s.dtype)
    return y


def lora_expand_add(y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """y [M, N] += scale · s bᵀ, in place."""
    y.add_(s @ b.to(s.dtype).t(), alpha=scale)
