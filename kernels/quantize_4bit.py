"""packed, absmax = 4-bit blocks of w; codes, scale = 8-bit blocks of its absmax; as bitsandbytes' bytes on a CPU.

w any float dtype, contiguous, n elements; packed uint8 [ceil(n / 2)], absmax fp32 [ceil(n / block_size)]; values fp32
[nblocks], code fp32 [256] ascending, codes uint8 [nblocks], scale fp32 [ceil(nblocks / 256)].
A value is rounded to the nearest code, a tie to the lower one; fp4's -0 and +0 differ by sign. Every division is
rounded to nearest, because its last bit decides bytes.
Memory-bound. Floor: n elements read, n / 2 bytes written.
Dettmers et al. 2023, arXiv:2305.14314, section 3; 8-bit blocks: Dettmers et al. 2022, arXiv:2110.02861.
"""

# ruff: noqa: C408 (tile tables are written with dict())

import itertools
import math

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import lookup_tile, tile_product
from fastpeft.kernels._fourbit import CODES, NESTED_BLOCK
from fastpeft.kernels._launch import arch_of, launch, record

MODES = ("plain",)
# tiles: begin
TILES = {
    (80, "half", "plain", 0): dict(BLOCK=4096, num_warps=4),
    (80, "float32", "plain", 0): dict(BLOCK=4096, num_warps=4),
}
# tiles: end

LEAST = tl.constexpr(1e-38)  # the divisor if absmax is smaller
# The 8-bit code is that of the nearest of 65536 evenly spaced values, like the table that bitsandbytes uses on a CPU.
STEPS = tl.constexpr(65535.0)


def _fp32(value):
    """Round to 24 bits, without a tensor: this module may be imported while a compiler traces."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def _bounds(code):
    """(midpoints, nibbles): the fp32 midpoints of the sorted code, and the nibble of each interval between them."""
    order = sorted(range(16), key=lambda i: code[i])
    values = [_fp32(code[i]) for i in order]
    middles = ((low + high) / 2 for low, high in itertools.pairwise(values))
    return tuple(_fp32(middle) for middle in middles), tuple(order)


# -0.0 compares equal to 0.0 and so sorts after it.
_BOUNDS = {name: _bounds(code) for name, code in CODES.items()}
_NF4_BOUNDS, _FP4_BOUNDS = (tl.constexpr(_BOUNDS[name][0]) for name in ("nf4", "fp4"))
_FP4_ORDER = tl.constexpr(_BOUNDS["fp4"][1])


def tile_space(arch, dtype, R=0, mode="plain"):
    """Candidate tiles; BLOCK is the elements of a program."""
    return tile_product(BLOCK=(2048, 4096, 8192), num_warps=(4, 8))


@triton.jit
def _max_abs(values):
    """Largest magnitude of each row; NaN if the row holds one, a case that tl.max leaves to the hardware."""
    poisoned = tl.max((values != values).to(tl.int32), axis=1) > 0
    return tl.where(poisoned, float("nan"), tl.max(tl.abs(values), axis=1))


@triton.jit
def _interval(scaled, FP4: tl.constexpr):
    """Nibble of each value of `scaled`: the number of bounds below it. A NaN is above all of them."""
    index = tl.zeros(scaled.shape, tl.int32)
    for i in tl.static_range(15):
        index += (scaled <= (_FP4_BOUNDS[i] if FP4 else _NF4_BOUNDS[i])).to(tl.int32) ^ 1
    if FP4:
        nibble = tl.zeros(scaled.shape, tl.int32)
        for i in tl.static_range(16):
            nibble = tl.where(index == i, _FP4_ORDER[i], nibble)
        return nibble
    else:
        return index


@triton.jit
def _quantize_4bit_kernel(
    w_ptr, packed_ptr, absmax_ptr, n, packed_bytes, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, FP4: tl.constexpr
):
    blocks: tl.constexpr = BLOCK // BLOCK_SIZE
    rows = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    first = rows * BLOCK_SIZE
    offs = first[:, None] + tl.arange(0, BLOCK_SIZE)[None, :]
    w = tl.load(w_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)  # [blocks, BLOCK_SIZE]
    absmax = _max_abs(w)
    # A NaN is not less than LEAST, so it stays.
    divisor = tl.where(absmax < LEAST, LEAST, absmax)
    # The last, shorter block divides; the others multiply by the reciprocal; the two differ in the last bit.
    partial = first + BLOCK_SIZE > n
    scaled = w * tl.div_rn(1.0, divisor)[:, None]
    scaled = tl.where(partial[:, None], tl.div_rn(w, divisor[:, None]), scaled)
    scaled = tl.where(offs < n, scaled, 0.0)  # after an odd n the low nibble is that of zero, even beside a NaN
    absmax = tl.where(partial, divisor, absmax)
    nibbles = _interval(scaled, FP4)
    high, low = tl.split(tl.reshape(nibbles, (blocks, BLOCK_SIZE // 2, 2)))
    bytes_ = (rows * (BLOCK_SIZE // 2))[:, None] + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(packed_ptr + bytes_, ((high << 4) | low).to(tl.uint8), mask=bytes_ < packed_bytes)
    tl.store(absmax_ptr + rows, absmax, mask=first < n)


@triton.jit
def _quantize_absmax_kernel(values_ptr, code_ptr, codes_ptr, scale_ptr, n, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + offs, mask=offs < n, other=0.0)
    absmax = tl.max(tl.where(values == values, tl.abs(values), 0.0), axis=0)
    scaled = values * tl.div_rn(1.0, absmax)
    known = scaled == scaled
    scaled = tl.where(known, tl.minimum(tl.maximum(scaled, -1.0), 1.0), 0.0)
    step = tl.fma((scaled + 1.0) * 0.5, STEPS, 0.0)
    value = tl.div_rn((step + 0.5).to(tl.int32).to(tl.float32), STEPS) * 2.0 - 1.0
    # Binary search, bit by bit, for the number of midpoints below the value: the code is sorted.
    index = tl.zeros((BLOCK,), tl.int32)
    for bit in tl.static_range(7, -1, -1):
        probe = index + (1 << bit)
        middle = (tl.load(code_ptr + probe - 1) + tl.load(code_ptr + probe)) * 0.5
        index = tl.where(middle < value, probe, index)
    tl.store(codes_ptr + offs, tl.where(known, index, 0).to(tl.uint8), mask=offs < n)
    tl.store(scale_ptr + block, absmax)


def quantize_4bit(w, quant_type, block_size, *, tile=None):
    """(packed, absmax)."""
    n = w.numel()
    packed = torch.empty((n + 1) // 2, device=w.device, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), device=w.device, dtype=torch.float32)
    if n == 0:
        return packed, absmax
    tile = dict(tile or lookup_tile(TILES, arch_of(w), w.dtype, 0))
    tile["BLOCK"] = max(tile["BLOCK"], block_size)
    record("quantize_4bit", 2 * n, n * w.element_size(), packed.numel() + 4 * absmax.numel())
    args = (w, packed, absmax, n, packed.numel())
    constants = {"BLOCK_SIZE": block_size, "FP4": quant_type == "fp4"}
    launch(_quantize_4bit_kernel, (-(-n // tile["BLOCK"]),), w, args, {**tile, **constants})
    return packed, absmax


def quantize_absmax(values, code):
    """(codes, scale)."""
    n = values.numel()
    codes = torch.empty(n, device=values.device, dtype=torch.uint8)
    scale = torch.empty(-(-n // NESTED_BLOCK), device=values.device, dtype=torch.float32)
    record("quantize_absmax", 2 * n, 4 * (n + code.numel()), n + 4 * scale.numel())
    args = (values, code, codes, scale, n)
    launch(_quantize_absmax_kernel, (scale.numel(),), values, args, {"BLOCK": NESTED_BLOCK, "num_warps": 4})
    return codes, scale
