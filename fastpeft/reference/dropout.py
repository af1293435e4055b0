"""The dropout mask as a pure function of (seed, row, column): the same bits in every backend.

    words = Philox4x32-7(counter = (col >> 3, row mod 2³², row >> 32, 0), key = (seed mod 2³², seed >> 32))
    draw  = the 15 low bits of half (col & 1) of word (col & 7) >> 1          Salmon et al. 2011, SC '11, table 2
    keep  = draw >= dropped            if dropped = round(32768 · p) is at most 0x7c00, that is p up to 31/32
            draw < 32768 - dropped     if it is more

One call of Philox serves eight adjacent columns, two per word: a kernel masks a whole load or store with it, two
elements per comparison (kernels/dropout.py says why 15 bits, and why a larger p counts from the other end).
"""

from __future__ import annotations

import torch

ROUNDS = 7
_MASK32 = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The number of the 32768 values of a draw that drop an element; ``0`` means that nothing is ever dropped."""
    return min(round(p * 32768), 32767)


def keep_factor(p: float) -> float:
    """``1 / (share of draws kept)``: exact for the threshold in use, so that the expectation is unbiased."""
    return 32768.0 / (32768 - threshold(p))


def _mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # 32 x 32 -> 64 bits in signed int64: split `b` in halves so that no partial product passes 2^48.
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + (high << 16)) & _MASK32


def keep_mask(seed: torch.Tensor, M: int, K: int, p: float, device: torch.device | str) -> torch.Tensor:
    """Boolean mask ``[M, K]``; ``seed`` is an int64 tensor of one element, which stays on its device."""
    key = seed.reshape(())
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    calls = (K + 7) // 8
    row = torch.arange(M, device=device, dtype=torch.int64).view(M, 1)
    c0 = torch.arange(calls, device=device, dtype=torch.int64).view(1, -1).expand(M, -1)
    c1 = (row & _MASK32).expand_as(c0)
    c2 = (row >> 32).expand_as(c0)
    c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = (k0 + 0x9E3779B9) & _MASK32
        k1 = (k1 + 0xBB67AE85) & _MASK32
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    draws = torch.stack((words & 0x7FFF, (words >> 16) & 0x7FFF), dim=-1).reshape(M, 8 * calls)[:, :K]
    drops = threshold(p)
    return draws >= drops if drops <= 0x7C00 else draws < 32768 - drops


def dropped(x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """``mask ∘ x / keep`` in x.dtype; ``x`` itself where ``seed`` is None."""
    if seed is None or threshold(p) == 0:
        return x
    mask = keep_mask(seed, x.shape[0], x.shape[1], p, x.device)
    return torch.where(mask, x * keep_factor(p), torch.zeros((), dtype=x.dtype, device=x.device))
