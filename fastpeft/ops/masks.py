"""Bit masks of parameters, as the operators take them: `pack_mask` and `unpack_mask`.

Each element has one bit: bit c mod 8 of byte c div 8 of a row is column c, and a row is whole bytes. lora_A has bits
[R, ceil(K / 8)], lora_B has those of its transpose, [R, ceil(N / 8)]: a rank is one row of either.
"""

from fastpeft.reference._masks import pack as pack_mask
from fastpeft.reference._masks import unpack as unpack_mask

__all__ = ["pack_mask", "unpack_mask"]
