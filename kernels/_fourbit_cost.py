"""Time of a product with a 4-bit weight, straight from its bytes or dequantised for the vendor's GEMM; picks which.

    small     2 launches + ramp / 2 + max(packed bytes / bandwidth, weights * seconds to decode one, FLOP / rate)
    dequant     launch   + ramp / 2 + max(bytes / bandwidth, weights * seconds to decode one) + GEMM

Nothing here was measured: the ceilings are those of `_cost`, the decoding is counted in instructions of the compiled
kernels. Only the standard library is imported, as in `_cost`.
"""

from functools import lru_cache

from fastpeft.kernels._cost import Arch, arch_of, dtype_name, gemm_time

# 11 to 12 instructions a weight for sm_90, over integer, floating and shared-memory pipes: 6 slots of the integer pipe
# alone, of which a mask takes 4 (`_cost.H100`).
DECODE_PER_MASK = 1.5
FP32_DOT = 0.5  # share of the fp32 GEMM's rate that a tile of up to 64 rows reaches without matrix units

# Largest M that goes straight from the packed bytes. Key: (arch, dtype, N, K), as in ("sm90", "bf16", 4096, 4096).
# tuned: begin
LARGEST_SMALL: dict[tuple, int] = {}
# tuned: end


def _packed_bytes(N: int, K: int, block_size: int) -> float:
    return N * K / 2 + N * K / block_size


def dequantize_time(N: int, K: int, itemsize: int, block_size: int, arch: Arch) -> float:
    """Seconds of dequantize_4bit into a workspace."""
    memory = (_packed_bytes(N, K, block_size) + N * K * itemsize) / arch.copy_bw
    return arch.launch + 0.5 * arch.ramp + max(memory, N * K * DECODE_PER_MASK * arch.mask_seconds)


def small_time(M: int, N: int, K: int, dtype, block_size: int, arch: Arch) -> float:
    """Seconds of linear4bit_small or its dx, the sum of its spans included."""
    dt = dtype_name(dtype)
    flop = 2 * max(16, M) * N * K
    rate = FP32_DOT * arch.gemm_fp32 if dt == "fp32" else arch.mma_shared
    memory = _packed_bytes(N, K, block_size) / arch.copy_bw
    return 2 * arch.launch + 0.5 * arch.ramp + max(memory, N * K * DECODE_PER_MASK * arch.mask_seconds, flop / rate)


@lru_cache(maxsize=4096)
def choose_small(M: int, N: int, K: int, dtype, block_size: int, arch_cc) -> bool:
    """Whether M rows go straight from the packed weight [N, K]: the tuned table first, else the prediction. Cached."""
    dt = dtype_name(dtype)
    largest = LARGEST_SMALL.get((f"sm{arch_cc}", dt, N, K))
    if largest is not None:
        return largest >= M
    arch = arch_of(arch_cc)
    dequantized = dequantize_time(N, K, 4 if dt == "fp32" else 2, block_size, arch) + gemm_time(M, N, K, dtype, arch)
    return small_time(M, N, K, dtype, block_size, arch) < dequantized
