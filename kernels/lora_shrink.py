"""s = drop(x) aᵀ: the thin product that every LoRA forward starts with.

x [M, K], a [R, K], s [M, R] in x.dtype; drop(x) = mask ∘ x / keep, the mask a pure function of (seed, row, column).
Fused: dropout, the cast of a to x.dtype, and on demand a copy of x as it is. Not stored: the mask, dropped x, a cast
copy of a.
Memory-bound below R of about 200. Floor: MK + RK elements read, MR written, 2MKR FLOP.
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3. Philox-4x32: Salmon et al. 2011, doi:10.1145/2063384.2063405.
"""

# ruff: noqa: C408 (tile tables are written with dict())

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    GROUP,
    TARGET_PROGRAMS,
    arch_of,
    capped,
    drop,
    dropout_args,
    dtype_key,
    keep_bits,
    launch,
    lookup_tile,
    narrow,
    ragged,
    rank_block,
    record,
    reduce_splits,
    scratch_bytes,
    span_of,
    split_output,
    tile_product,
)  # fmt: skip

MODES = ("plain", "dropout", "copy", "copy_dropout")  # copying, registers hold x until it is written
# Ranks of one launch: with more, the masked columns of x and the accumulator do not fit the registers.
MAX_BLOCK_R = {("half", "plain"): 256, ("half", "dropout"): 128, ("float32", "plain"): 64, ("float32", "dropout"): 64}
# tiles: begin
TILES = {
    (80, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=5),
    (80, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=4),
    (80, "half", "plain", 256): dict(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=3),
    (80, "half", "dropout", 16): dict(BLOCK_M=64, BLOCK_K=256, num_warps=4, num_stages=2),
    (80, "half", "dropout", 64): dict(BLOCK_M=32, BLOCK_K=256, num_warps=4, num_stages=2),
    (80, "half", "dropout", 128): dict(BLOCK_M=16, BLOCK_K=256, num_warps=8, num_stages=1),
    (80, "float32", "plain", 16): dict(BLOCK_M=64, BLOCK_K=32, num_warps=4, num_stages=3),
    (80, "float32", "plain", 64): dict(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=2),
    (80, "float32", "dropout", 16): dict(BLOCK_M=32, BLOCK_K=256, num_warps=4, num_stages=1),
    (80, "float32", "dropout", 64): dict(BLOCK_M=16, BLOCK_K=256, num_warps=8, num_stages=1),
    (90, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=5),
    (90, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=4),
    (90, "half", "plain", 256): dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=3),
    (90, "half", "dropout", 16): dict(BLOCK_M=64, BLOCK_K=256, num_warps=4, num_stages=3),
    (90, "half", "dropout", 64): dict(BLOCK_M=64, BLOCK_K=256, num_warps=4, num_stages=2),
    (90, "half", "dropout", 128): dict(BLOCK_M=64, BLOCK_K=256, num_warps=8, num_stages=1),
    (100, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=5),
    (100, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_K=128, num_warps=8, num_stages=4),
    (100, "half", "plain", 256): dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=3),
    (100, "half", "dropout", 16): dict(BLOCK_M=64, BLOCK_K=256, num_warps=4, num_stages=3),
    (100, "half", "dropout", 128): dict(BLOCK_M=64, BLOCK_K=256, num_warps=8, num_stages=1),
    (80, "half", "copy", 16): dict(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=5),
    (80, "half", "copy", 64): dict(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=4),
    (80, "half", "copy", 256): dict(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=3),
    (80, "half", "copy_dropout", 16): dict(BLOCK_M=32, BLOCK_K=256, num_warps=4, num_stages=2),
    (80, "half", "copy_dropout", 64): dict(BLOCK_M=32, BLOCK_K=256, num_warps=4, num_stages=2),
    (80, "half", "copy_dropout", 128): dict(BLOCK_M=16, BLOCK_K=256, num_warps=8, num_stages=1),
    (80, "float32", "copy", 16): dict(BLOCK_M=32, BLOCK_K=32, num_warps=4, num_stages=3),
    (80, "float32", "copy", 64): dict(BLOCK_M=32, BLOCK_K=32, num_warps=4, num_stages=2),
    (80, "float32", "copy_dropout", 16): dict(BLOCK_M=32, BLOCK_K=256, num_warps=4, num_stages=1),
    (80, "float32", "copy_dropout", 64): dict(BLOCK_M=16, BLOCK_K=256, num_warps=8, num_stages=1),
    (90, "half", "copy", 16): dict(BLOCK_M=32, BLOCK_K=128, num_warps=4, num_stages=5),
    (90, "half", "copy", 64): dict(BLOCK_M=32, BLOCK_K=128, num_warps=4, num_stages=4),
    (90, "half", "copy", 256): dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=3),
    (90, "half", "copy_dropout", 16): dict(BLOCK_M=32, BLOCK_K=256, num_warps=4, num_stages=3),
    (90, "half", "copy_dropout", 64): dict(BLOCK_M=32, BLOCK_K=256, num_warps=4, num_stages=2),
    (90, "half", "copy_dropout", 128): dict(BLOCK_M=64, BLOCK_K=256, num_warps=8, num_stages=1),
    (100, "half", "copy", 16): dict(BLOCK_M=32, BLOCK_K=128, num_warps=4, num_stages=5),
    (100, "half", "copy", 64): dict(BLOCK_M=32, BLOCK_K=128, num_warps=4, num_stages=4),
    (100, "half", "copy", 256): dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=3),
    (100, "half", "copy_dropout", 16): dict(BLOCK_M=32, BLOCK_K=256, num_warps=4, num_stages=3),
    (100, "half", "copy_dropout", 128): dict(BLOCK_M=64, BLOCK_K=256, num_warps=8, num_stages=1),
}
# tiles: end


def tile_space(arch, dtype, R, mode):
    """Candidate tiles; a dropout step always takes one group of 256 columns."""
    if mode.endswith("dropout"):
        return tile_product(BLOCK_M=(32, 64, 128), BLOCK_K=(GROUP,), num_warps=(4, 8), num_stages=(1, 2, 3))
    return tile_product(BLOCK_M=(32, 64, 128), BLOCK_K=(64, 128, 256), num_warps=(4, 8), num_stages=(2, 3, 4, 5))


@triton.jit
def _a_tile(a_ptr, cols, offs_r, K, R, stride_ar, stride_ak):
    mask = (cols < K)[:, None] & (offs_r < R)[None, :]
    ptrs = a_ptr + offs_r[None, :].to(tl.int64) * stride_ar + cols[:, None].to(tl.int64) * stride_ak
    return tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_R]


@triton.jit(do_not_specialize=["threshold"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr, M, K, R, span, stride_xm, stride_ar, stride_ak, stride_split, stride_om,
    threshold, factor, copy_ptr, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    mask_m = (rows < M)[:, None]
    offs_r = tl.arange(0, BLOCK_R)
    x_rows = x_ptr + rows[:, None] * stride_xm
    copy_rows = copy_ptr + rows[:, None] * stride_cm
    begin = split * span
    end = tl.minimum(begin + span, K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for k in range(begin, end, BLOCK_K):
        if DROPOUT:
            bits = keep_bits(seed, rows, k // BLOCK_K, threshold)
            for j in tl.static_range(8):
                cols = k + j * 32 + tl.arange(0, 32)
                mask = mask_m & (cols < K)[None, :]
                x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0)  # [BLOCK_M, 32]
                if COPY:
                    tl.store(copy_rows + cols[None, :], x, mask=mask)
                x = drop(x, bits, j)
                a = _a_tile(a_ptr, cols, offs_r, K, R, stride_ar, stride_ak).to(x.dtype)
                acc = tl.dot(x, a, acc, input_precision="ieee")
        else:
            cols = k + tl.arange(0, BLOCK_K)
            mask = mask_m & (cols < K)[None, :]
            x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            if COPY:
                tl.store(copy_rows + cols[None, :], x, mask=mask)
            a = _a_tile(a_ptr, cols, offs_r, K, R, stride_ar, stride_ak).to(x.dtype)
            acc = tl.dot(x, a, acc, input_precision="ieee")
    ptrs = out_ptr + split.to(tl.int64) * stride_split + rows[:, None] * stride_om + offs_r[None, :]
    tl.store(ptrs, (acc * factor).to(out_ptr.dtype.element_ty), mask=mask_m & (offs_r < R)[None, :])


def lora_shrink(x, a, p, seed, *, copy=None, tile=None):
    """s [M, R] = drop(x) aᵀ; x [M, K] with contiguous rows, a any float dtype and strides, seed int64 [1] or None.

    copy: [M, K] with contiguous rows, in x.dtype, that x is written to as it is; only where R > 0.
    """
    (M, K), R = x.shape, a.shape[0]
    s = torch.empty((M, R), device=x.device, dtype=x.dtype)
    if s.numel() == 0:
        return s
    a = narrow(a)
    threshold, factor = dropout_args(p)
    dropout = threshold > 0
    if tile is None:
        tile = lookup_tile(TILES, arch_of(x), x.dtype, R, MODES[dropout + 2 * (copy is not None)])
        if ragged(K, x.stride(0)):
            tile = capped(tile, BLOCK_M=32, BLOCK_K=GROUP if dropout else 64)
    block_r = rank_block(R, MAX_BLOCK_R[dtype_key(x.dtype), MODES[dropout]])
    chunks = -(-R // block_r)
    tiles_m = -(-M // tile["BLOCK_M"])
    # One program an SM is wanted, not two: where none is split, a second launch is saved.
    span, splits = span_of(K, triton.cdiv(TARGET_PROGRAMS // 2, tiles_m), GROUP, 1024)
    out = split_output(s, splits)
    record(
        "lora_shrink", 2 * M * K * R, (chunks * M * K) * x.element_size() + R * K * a.element_size(),
        (s.numel() * (splits == 1) + M * K * (copy is not None)) * x.element_size(),
        scratch_bytes=scratch_bytes((out, s)),
    )  # fmt: skip
    to = x if copy is None else copy
    for first in range(0, R, block_r):
        part_a, part_out = a[first : first + block_r], out[..., first : first + block_r]
        args = (
            x, part_a, part_out, seed if dropout else x, M, K, part_a.shape[0], span, x.stride(0), *a.stride(),
            out.stride(0) if splits > 1 else 0, R, threshold, factor, to, to.stride(0),
        )  # fmt: skip
        constants = {"BLOCK_R": block_r, "DROPOUT": dropout, "COPY": copy is not None and first == 0}
        launch(_lora_shrink_kernel, (tiles_m, splits), x, args, {**tile, **constants})
    reduce_splits("lora_shrink_reduce", [(out, s)])
    return s
