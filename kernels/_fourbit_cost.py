"""Time of a product with a 4-bit weight, directly from its bytes or dequantised for the vendor's GEMM; picks which.

    small     2 launches + start + max(packed bytes / bandwidth, weights * seconds to decode one, FLOP / rate)
    mid         launch   + start + max(packed bytes / bandwidth, waves of tiles * FLOP per tile / rate of an SM),
                and a launch and the fp32 sums / bandwidth if spans of K fill idle SMs
    dequant     launch   + start + max(bytes / bandwidth, weights * seconds to decode one) + GEMM

and how a dequantised weight is combined with the adapter (start: half of `Arch.dirty` is written back):

    accumulate  shrink, expand, GEMM, as in `_cost`
    augmented   shrink   + x written / bandwidth, 2 launches for the thin columns, a GEMM over K + R

Nothing here was measured: the ceilings are those of `_cost`, and the cost of decoding is counted in instructions of the
compiled kernels. Only the standard library is imported, as in `_cost`.
"""

from functools import lru_cache
from math import ceil

from fastpeft.kernels._cost import Arch, arch_of, dtype_name, gemm_time, padded_rank, pass_time
from fastpeft.kernels._gpu import table_keys

# 11 to 12 instructions per weight for sm_90, over integer, floating-point and shared-memory pipes: 6 slots of the
# integer pipe alone; a mask takes 4 (`_cost.H100`).
DECODE_PER_MASK = 1.5
FP32_DOT = 0.5  # share of the fp32 GEMM's rate that a tile of up to 64 rows reaches without tensor cores

# The CUDA kernel of up to 512 rows: rows of x and columns of y in a tile, values of k in a step, and the share of the
# vendor GEMM's rate that a tile reaches: decoding takes a third, and mma.sync does 0.6 of what Hopper's wgmma does.
MID_TILE = (128, 256, 64)
MID_RATE, MID_RATE_HOPPER = 0.7, 0.45
AUGMENTED_MARGIN = 0.02  # as MID_MARGIN, to justify a copy of x that stays until the GEMM is done
MID_MARGIN = 0.2  # a smaller predicted gain does not justify leaving the vendor's GEMM for a kernel that no one timed

# Largest M that multiplies the packed bytes directly. Key: (device or arch, dtype, N, K): ("sm90", "bf16", 4096, 4096).
# tuned: begin
LARGEST_SMALL: dict[tuple, int] = {}
LARGEST_MID: dict[tuple, int] = {}
# Smallest M that uses [x | s] [w | scale b]ᵀ; 0: none. Key: (device or arch, dtype, N, K, padded R).
LEAST_AUGMENTED: dict[tuple, int] = {}
# tuned: end


def _tuned(table: dict[tuple, int], arch_cc, *rest) -> int | None:
    """The entry of this very device, else that of its compute capability."""
    found = (table.get((device, *rest)) for device in table_keys(arch_cc))
    return next((rows for rows in found if rows is not None), None)


def _start(arch: Arch) -> float:
    return 0.5 * arch.dirty / arch.copy_bw


def _packed_bytes(N: int, K: int, block_size: int) -> float:
    return N * K / 2 + N * K / block_size


def dequantize_time(N: int, K: int, itemsize: int, block_size: int, arch: Arch) -> float:
    """Seconds of dequantize_4bit into a workspace."""
    memory = (_packed_bytes(N, K, block_size) + N * K * itemsize) / arch.copy_bw
    return arch.launch + _start(arch) + max(memory, N * K * DECODE_PER_MASK * arch.mask_seconds)


def small_time(M: int, N: int, K: int, dtype, block_size: int, arch: Arch) -> float:
    """Seconds of linear4bit_small or its dx, including the sum of its spans."""
    dt = dtype_name(dtype)
    flop = 2 * max(16, M) * N * K
    rate = FP32_DOT * arch.gemm_fp32 if dt == "fp32" else arch.mma_shared
    memory = _packed_bytes(N, K, block_size) / arch.copy_bw
    return 2 * arch.launch + _start(arch) + max(memory, N * K * DECODE_PER_MASK * arch.mask_seconds, flop / rate)


def mid_time(M: int, N: int, K: int, block_size: int, arch: Arch) -> float:
    """Seconds of the CUDA kernel linear4bit_mid in 16 bits, with its best number of spans."""
    rows, columns, depth = MID_TILE
    tiles, steps = ceil(M / rows) * ceil(N / columns), ceil(K / depth)
    rate = (MID_RATE_HOPPER if arch.cc >= 90 else MID_RATE) * arch.gemm_boost
    step = 2 * rows * columns * depth / (rate / arch.sms)

    def work(spans: int) -> float:
        sums = arch.launch + 8 * spans * M * N / arch.copy_bw if spans > 1 else 0.0
        return ceil(tiles * spans / arch.sms) * ceil(steps / spans) * step + sums

    least = min(work(spans) for spans in range(1, max(2, min(64, steps // 4) + 1)))
    return arch.launch + _start(arch) + max(_packed_bytes(N, K, block_size) / arch.copy_bw, least)


def _dequant_time(M: int, N: int, K: int, dt: str, block_size: int, arch: Arch) -> float:
    return dequantize_time(N, K, 4 if dt == "fp32" else 2, block_size, arch) + gemm_time(M, N, K, dt, arch)


@lru_cache(maxsize=4096)
def choose_mid(M: int, N: int, K: int, dtype, block_size: int, arch_cc) -> bool:
    """As `choose_small`, between the CUDA kernel of up to 512 rows and the dequantised weight."""
    dt = dtype_name(dtype)
    largest = _tuned(LARGEST_MID, arch_cc, dt, N, K)
    if largest is not None:
        return largest >= M
    arch = arch_of(arch_cc)
    return mid_time(M, N, K, block_size, arch) < (1 - MID_MARGIN) * _dequant_time(M, N, K, dt, block_size, arch)


@lru_cache(maxsize=4096)
def choose_small(M: int, N: int, K: int, dtype, block_size: int, arch_cc) -> bool:
    """Whether M rows multiply the packed weight [N, K] directly: the tuned table first, else the prediction. Cached."""
    dt = dtype_name(dtype)
    largest = _tuned(LARGEST_SMALL, arch_cc, dt, N, K)
    if largest is not None:
        return largest >= M
    arch = arch_of(arch_cc)
    return small_time(M, N, K, dtype, block_size, arch) < _dequant_time(M, N, K, dt, block_size, arch)


def accumulate_time(M: int, N: int, K: int, R: int, dtype, arch: Arch) -> float:
    """Seconds of shrink, expand and the GEMM that adds to y."""
    parts = (pass_time(name, M, N, K, R, 0.0, dtype, arch) for name in ("shrink", "expand"))
    return sum(parts) + gemm_time(M, N, K, dtype, arch)


def augmented_time(M: int, N: int, K: int, R: int, dtype, arch: Arch) -> float:
    """Seconds of a shrink that copies x, the two thin copies, and the GEMM over K + R."""
    itemsize = 4 if dtype_name(dtype) == "fp32" else 2
    shrink = pass_time("shrink", M, N, K, R, 0.0, dtype, arch) + M * K * itemsize / arch.copy_bw
    return shrink + 2 * arch.launch + gemm_time(M, N, K + padded_rank(R), dtype, arch)


@lru_cache(maxsize=4096)
def choose_augmented(M: int, N: int, K: int, R: int, dtype, arch_cc) -> bool:
    """Whether a dequantised weight [N, K] gets the adapter as R more columns: the table first, else the prediction."""
    dt = dtype_name(dtype)
    least = _tuned(LEAST_AUGMENTED, arch_cc, dt, N, K, padded_rank(R))
    if least is not None:
        return 0 < least <= M
    arch = arch_of(arch_cc)
    return augmented_time(M, N, K, R, dtype, arch) < (1 - AUGMENTED_MARGIN) * accumulate_time(M, N, K, R, dtype, arch)
