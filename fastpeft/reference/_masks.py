"""Bit masks of parameters: which elements of a factor are there; the same bytes in every backend.

bits [rows, ceil(columns / 8)] uint8: bit c mod 8 of byte c div 8, the lowest first, is element c of the row
"""

from __future__ import annotations

import torch

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Booleans [rows, columns] -> bits [rows, ceil(columns / 8)] uint8, the lowest first, on the same device."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def unpack(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """Bits [rows, ceil(columns / 8)] uint8, as `pack_mask` gives them -> booleans [rows, columns]."""
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) & weights).ne(0).flatten(1)[:, :columns]
