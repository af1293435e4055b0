"""w = code[nibble] * absmax of a packed 4-bit weight, both forms of scales, in one launch.

packed uint8 [ceil(n / 2)], scales as in _fourbit.py, out n elements of fp32, bf16 or fp16, in rows of `width` elements,
`stride_out` apart; bit-identical to bitsandbytes.
Fused: the second quantisation of absmax, the cast. Not stored: absmax in fp32.
A tile row is a run inside one block, so absmax is computed once per run.
Memory-bound. Floor: n / 2 bytes and the scales read, n elements written.
Dettmers et al. 2023, arXiv:2305.14314, eq. 6.
"""

# ruff: noqa: C408 (tile tables are written with dict())

import triton
import triton.language as tl

from fastpeft.kernels._common import lookup_tile, tile_key, tile_product
from fastpeft.kernels._fourbit import block_absmax, decode, nested, packed_flags, scale_args, scale_bytes
from fastpeft.kernels._launch import Launch, Start, aligned, arch_of, plan

MODES = ("plain",)
# tiles: begin
TILES = {
    (80, "half", "plain", 0): dict(BLOCK=4096, num_warps=4),
    (80, "float32", "plain", 0): dict(BLOCK=4096, num_warps=8),
}
# tiles: end


def tile_space(arch, dtype, R=0, mode="plain"):
    """Candidate tiles; BLOCK is the elements of a program."""
    return tile_product(BLOCK=(1024, 2048, 4096, 8192), num_warps=(4, 8))


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr, absmax_ptr, code_ptr, scale_ptr, offset_ptr, out_ptr, n, packed_bytes, width, stride_out,
    BLOCK: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, WHOLE_RUNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FP4: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
    bytes_ = (rows * (RUN // 2))[:, None] + tl.arange(0, RUN // 2)[None, :]
    packed = tl.load(packed_ptr + bytes_, mask=bytes_ < packed_bytes, other=0)  # [BLOCK // RUN, RUN // 2]
    first = rows * RUN
    absmax = block_absmax(absmax_ptr, code_ptr, scale_ptr, offset_ptr, first // BLOCK_SIZE, first < n, NESTED)
    w = decode(packed, FP4) * absmax[:, None]
    offs = first[:, None] + tl.arange(0, RUN)[None, :]
    at = offs
    if ROWS and WHOLE_RUNS:
        at = (first // width * (stride_out - width))[:, None] + offs
    elif ROWS:
        at = offs // width * stride_out + offs % width
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=offs < n)


@plan
def _plan(device, n, dtype, width, stride, moved, nested, quant_type, block_size, tile):
    """A `Start`. width, stride: of rows that are not adjacent, or None; moved: bytes of the scales."""
    tile = dict(tile or lookup_tile(TILES, arch_of(device), dtype, 0))
    run, apart = min(block_size, tile["BLOCK"]), width is not None
    # If no run spans two rows, one 64-bit division per run suffices instead of one per weight.
    constants = {"RUN": run, "ROWS": apart, "WHOLE_RUNS": apart and width % run == 0}
    constants |= packed_flags(nested, quant_type, block_size)
    numbers = (n, (n + 1) // 2, width if apart else n, stride if apart else n)
    launch = Launch("dequantize_4bit", n, (n + 1) // 2 + moved, n * dtype.itemsize)
    grid = (-(-n // tile["BLOCK"]),)
    return Start(_dequantize_4bit_kernel, grid, device, numbers, {**tile, **constants}, launch)


def dequantize_4bit(packed, scales, quant_type, block_size, out, *, tile=None):
    """Fill `out`: contiguous, any shape of n elements; or a matrix with contiguous rows further apart."""
    n = out.numel()
    if n == 0:
        return
    width, stride = (None, None) if out.is_contiguous() else (out.shape[1], out.stride(0))
    start = _plan(
        out.device, n, out.dtype, width, stride, scale_bytes(scales), nested(scales), quant_type, block_size,
        tile_key(tile),
    )  # fmt: skip
    pointers = (packed, *scale_args(scales), out)
    start(pointers, aligned=aligned(*pointers))
