"""``w = code[nibble] · absmax[block]``, with absmax itself dequantised first if it is quantised too."""

from __future__ import annotations

import torch

from fastpeft.reference.quantize_4bit import NESTED_BLOCK, code


def absmax_of(scales: list[torch.Tensor]) -> torch.Tensor:
    """[absmax], or [codes, code, scale, offset] -> absmax fp32 [nblocks], rounded after the product and the sum."""
    if len(scales) == 1:
        return scales[0]
    codes, values, scale, offset = scales
    product = values[codes.long()] * scale.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return product + offset


def weight_of(
    packed: torch.Tensor, scales: list[torch.Tensor], quant_type: str, block_size: int, n: int
) -> torch.Tensor:
    """The n values in fp32."""
    nibbles = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)[:n]
    absmax = absmax_of(scales).repeat_interleave(block_size)[:n]
    return code(quant_type, packed.device)[nibbles.long()] * absmax


def dequantize_4bit(
    packed: torch.Tensor, scales: list[torch.Tensor], quant_type: str, block_size: int, out: torch.Tensor
) -> None:
    """packed uint8 [⌈n/2⌉] or [⌈n/2⌉, 1] -> out, n elements of any float dtype, contiguous."""
    out.copy_(weight_of(packed, scales, quant_type, block_size, out.numel()).view(out.shape))
