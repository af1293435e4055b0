"""Blockwise quantisation of a weight to 4 bits and of its absmax to 8 bits: the bytes of bitsandbytes on a CPU."""

from __future__ import annotations

import torch

CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4,
        -0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4,
    ),
}  # fmt: skip
"""The value of each nibble. NF4: Dettmers et al. 2023, arXiv:2305.14314, appendix E."""

NESTED_BLOCK = 256
_TINY = 1e-38
_GRID = 65535


def code(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values [16], fp32."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


def quantize_4bit(w: torch.Tensor, quant_type: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w of n elements -> packed uint8 [⌈n/2⌉], absmax fp32 [⌈n/block_size⌉].

    A tie takes the smaller value. As in bitsandbytes, whole blocks are multiplied by the reciprocal of their absmax,
    and an incomplete last block is divided by its absmax: the two differ in the last bit.
    """
    flat = w.reshape(-1).float()
    full = flat.numel() // block_size * block_size
    blocks, rest = flat[:full].view(-1, block_size), flat[full:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=_TINY)
        absmax, scaled = torch.cat([absmax, last.view(1)]), torch.cat([scaled, rest / last])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    values, order = torch.sort(code(quant_type, w.device), stable=True)
    nibbles = order[torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)].to(torch.uint8)
    return nibbles[::2] << 4 | nibbles[1::2], absmax


def quantize_absmax(values: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values fp32 [n], code fp32 [256] ascending -> codes uint8 [n], scale fp32 [⌈n/256⌉].

    value / scale is first rounded to a grid of 65536 points over [-1, 1], and then to the nearest code. NaN, which the
    scale ignores too, gets code 0, and so does a zero whose scale is zero or has no reciprocal.
    """
    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scale = torch.where(blocks.isnan(), 0.0, blocks.abs()).amax(1)
    unit = (blocks * (1.0 / scale).unsqueeze(1)).clamp(-1.0, 1.0)
    point = ((unit + 1.0) * 0.5 * _GRID + 0.5).floor()
    codes = torch.bucketize(2.0 * point / _GRID - 1.0, (code[:-1] + code[1:]) * 0.5)
    codes = torch.where(unit.isnan(), 0, codes)
    return codes.to(torch.uint8).view(-1)[:n].clone(), scale
