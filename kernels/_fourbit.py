"""Shared by the 4-bit kernels: the code tables, the absmax of a block, decoded weights.

Format (bitsandbytes'): the weight [N, K] as n row-major values, two per byte, the first in the high nibble;
blocks of block_size consecutive values share an fp32 absmax, w = code[nibble] * absmax. `scales` is [absmax], or doubly
quantised [codes uint8, code fp32 [256], scale fp32, offset]: absmax[i] = code[codes[i]] * scale[i // 256] + offset,
rounded after the product and after the sum. NF4: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
"""

import struct

import triton
import triton.language as tl

NESTED_BLOCK = 256  # values of absmax that share one fp32 scale if absmax itself is quantised

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, then 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4: not sorted by size.
FP4 = (
    0.0, 0.005208333333333333, 0.6666666666666666, 1.0, 0.3333333333333333, 0.5, 0.16666666666666666, 0.25,
    -0.0, -0.005208333333333333, -0.6666666666666666, -1.0, -0.3333333333333333, -0.5, -0.16666666666666666, -0.25,
)  # fmt: skip
CODES = {"nf4": NF4, "fp4": FP4}


def _bits(code):
    """The fp32 values as int32: Triton up to 3.7 turns a constant -0.0 into 0.0."""
    return tl.constexpr(struct.unpack("<16i", struct.pack("<16f", *code)))


_NF4_BITS, _FP4_BITS = _bits(NF4), _bits(FP4)


def nested(scales):
    return len(scales) > 1


def scale_args(scales):
    """(absmax or codes, code, scale, offset) for a kernel; those that a plain weight lacks are never read."""
    return tuple(scales) if nested(scales) else tuple(scales) * 4


def scale_bytes(scales):
    return sum(t.numel() * t.element_size() for t in scales)


def packed_flags(nested, quant_type, block_size):
    """The constants of a kernel that reads a packed weight; nested: whether its absmax is quantised."""
    return {"BLOCK_SIZE": block_size, "FP4": quant_type == "fp4", "NESTED": nested}


@triton.jit
def code_table(FP4: tl.constexpr):
    """The 16 values as a tensor, from constants: no table in memory to allocate, cache or copy."""
    index = tl.arange(0, 16)
    bits = tl.zeros((16,), tl.int32)
    for i in tl.static_range(16):
        bits = tl.where(index == i, _FP4_BITS[i] if FP4 else _NF4_BITS[i], bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def block_absmax(absmax_ptr, code_ptr, scale_ptr, offset_ptr, block, mask, NESTED: tl.constexpr):
    """absmax fp32 of the blocks `block` (int64), zero where not mask.

    The product is an fma with zero: it is already rounded, so the compiler cannot contract it with the sum, whatever
    its fusion flags.
    """
    if NESTED:
        codes = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(scale_ptr + block // 256, mask=mask, other=0.0)
        return tl.fma(tl.load(code_ptr + codes), scale, 0.0) + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def decode(packed, FP4: tl.constexpr):
    """Code values fp32 [ROWS, 2 * COLS] of `packed` [ROWS, COLS], in the order of the weight.

    tl.gather looks each weight up by one 4-byte read of shared memory: the 16 words lie in 16 banks, so reads do not
    conflict. A tree of tl.where takes 15 selects, which at 64 lanes per clock are slower than the memory; a table in
    global memory costs 64-bit addresses and becomes part of the software pipeline.
    """
    nibbles = tl.interleave(packed >> 4, packed & 15).to(tl.int32)
    flat = tl.gather(code_table(FP4), tl.reshape(nibbles, (nibbles.numel,)), 0)
    return tl.reshape(flat, nibbles.shape)


@triton.jit
def scale_rows(values, absmax):
    """values [ROWS, COLS] times absmax [ROWS, GROUPS], each value of absmax for COLS // GROUPS columns."""
    rows: tl.constexpr = values.shape[0]
    groups: tl.constexpr = absmax.shape[1]
    grouped = tl.reshape(values, (rows, groups, values.shape[1] // groups))
    return tl.reshape(grouped * absmax[:, :, None], values.shape)
