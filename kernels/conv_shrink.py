"""s = conv(drop(x), a): the thin convolution that every convolution's adapter starts with, an implicit GEMM.

x [N, C, *in] channels-last, a [R, C / groups, *kernel], s [N · out, groups · R] in x.dtype.
Fused: the gather of each window as the sum runs over its taps, dropout, zeros of the padding. Not stored: the windows
(taps times as many elements as x), the mask, dropped x. An element's mask is drawn for each tap that reads it.
Memory: x is read once, because taps are the inner loop and channel blocks the outer: a program's taps read rows that it
or its neighbours on the grid have just brought into L2. Floor: x read, s written, 2 · M · C · taps · R FLOP.
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3. Implicit GEMM: Chetlur et al. 2014, arXiv:1410.0759, section 3.
"""

# ruff: noqa: C408 (tile tables are written with dict())

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    LEAST_PROGRAMS,
    Reduction,
    dtype_key,
    lookup_tile,
    rank_block,
    reduction,
    scratch_bytes,
    span_of,
    split_output,
    tile_key,
    tile_product,
)  # fmt: skip
from fastpeft.kernels._launch import Launch, Start, aligned, arch_of, plan
from fastpeft.kernels._windows import column_blocks, input_rows, last, packed, position, windows_of
from fastpeft.kernels.dropout import drop, dropout_args, keep_tile

MODES = ("plain", "dropout")
MAX_BLOCK_R = {"half": 64, "float32": 64}
# tiles: begin
TILES = {
    (80, "half", "plain", 16): dict(BLOCK_M=64, SUBS=2, num_warps=4, num_stages=3),
    (80, "half", "plain", 64): dict(BLOCK_M=64, SUBS=2, num_warps=4, num_stages=3),
    (80, "half", "dropout", 16): dict(BLOCK_M=64, SUBS=8, num_warps=4, num_stages=1),
    (80, "half", "dropout", 64): dict(BLOCK_M=64, SUBS=4, num_warps=4, num_stages=1),
    (80, "float32", "plain", 16): dict(BLOCK_M=32, SUBS=1, num_warps=4, num_stages=3),
    (80, "float32", "plain", 64): dict(BLOCK_M=32, SUBS=1, num_warps=4, num_stages=2),
    (80, "float32", "dropout", 16): dict(BLOCK_M=32, SUBS=8, num_warps=4, num_stages=1),
    (80, "float32", "dropout", 64): dict(BLOCK_M=16, SUBS=8, num_warps=8, num_stages=1),
}
# tiles: end


def tile_space(arch, dtype, R, mode):
    """Candidate tiles."""
    return tile_product(BLOCK_M=(32, 64, 128), SUBS=(1, 2, 4, 8), num_warps=(4, 8), num_stages=(1, 2, 3, 4))


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _conv_shrink_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr, M, C, CT, R, steps, span, ID, IH, IW, OD, OH, OW, stride_ar, stride_split,
    stride_om, stride_og, threshold, factor, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, SUBS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    group = tl.program_id(2)
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    n, d, h, w = position(rows, OD, OH, OW)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = (offs_r < R)[None, :]
    first = group * C
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    begin = split * span
    for step in range(begin, tl.minimum(begin + span, steps)):
        tap = step % TAPS
        block = first // (32 * SUBS) + step // TAPS
        row, inside = input_rows(n, d, h, w, tap, ID, IH, IW, KERNEL, STRIDE, PADDING, DILATION)
        mask_m = ((rows < M) & inside)[:, None]
        x_rows = x_ptr + row[:, None] * CT
        a_tap = a_ptr + (tap * C - first)
        for j in tl.static_range(SUBS):
            cols = block * (32 * SUBS) + j * 32 + tl.arange(0, 32)
            mask_k = (cols >= first) & (cols < first + C)
            x = tl.load(x_rows + cols[None, :], mask=mask_m & mask_k[None, :], other=0.0)  # [BLOCK_M, 32]
            if DROPOUT:
                x = drop(x, keep_tile(seed, row, block * (32 * SUBS) + j * 32, threshold, 32))
            a = tl.load(a_tap + cols[:, None] + offs_r[None, :] * stride_ar, mask=mask_k[:, None] & mask_r, other=0.0)
            acc = tl.dot(x, a, acc, input_precision="ieee")
    ptrs = out_ptr + split.to(tl.int64) * stride_split + rows[:, None].to(tl.int64) * stride_om
    ptrs += group * stride_og + offs_r[None, :]
    tl.store(ptrs, (acc * factor).to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & mask_r)


class _Plan(NamedTuple):
    steps: tuple  # (first rank, Start)
    splits: int
    total: Reduction | None
    dropout: bool
    M: int


@plan
def _plan(device, shape, a_shape, dtype, stride, padding, dilation, groups, p, tile):
    (_, CT, *_), (R, C, *kernel) = shape, a_shape
    where = windows_of(shape, tuple(kernel), stride, padding, dilation)
    threshold, factor = dropout_args(p)
    dropout, M = threshold > 0, where.M
    if 0 in (M, groups * R):
        return _Plan((), 1, None, dropout, M)
    tile = dict(tile or lookup_tile(TILES, arch_of(device), dtype, R, MODES[dropout]))
    tile["SUBS"], blocks = column_blocks(C, CT, groups, tile["SUBS"])
    block_r = rank_block(R, MAX_BLOCK_R[dtype_key(dtype)])
    chunks, tiles_m, count = -(-R // block_r), -(-M // tile["BLOCK_M"]), blocks * where.taps
    # Aim at one program per SM: if nothing is split, the second launch is saved.
    span, splits = span_of(count, -(-LEAST_PROGRAMS // (tiles_m * groups)), 1, 4)
    item, wide, numel = dtype.itemsize, where.rows * CT, M * groups * R
    launch = Launch(
        "conv_shrink", 2 * M * C * groups * where.taps * R, (chunks * wide + R * C * where.taps) * item,
        numel * (splits == 1) * item, scratch_bytes=scratch_bytes((splits, numel)),
    )  # fmt: skip
    constants, steps = {**tile, **where.constants, "BLOCK_R": block_r, "DROPOUT": dropout}, []
    for first in range(0, R, block_r):
        numbers = (
            M, C, CT, min(block_r, R - first), count, span, *where.sizes, where.taps * C, numel if splits > 1 else 0,
            groups * R, R, threshold, factor,
        )  # fmt: skip
        grid = (tiles_m, splits, groups)
        steps.append((first, Start(_conv_shrink_kernel, grid, device, numbers, constants, None if first else launch)))
    total = reduction("conv_shrink_reduce", device, (splits, numel, dtype))
    return _Plan(tuple(steps), splits, total, dropout, M)


def conv_shrink(x, a, stride, padding, dilation, groups, p, seed, *, tile=None):
    """s [N · out, groups · R]; x [N, C, *in], a [R, C / groups, *kernel] any float dtype, seed int64 [1] or None."""
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    made = _plan(x.device, tuple(x.shape), tuple(a.shape), x.dtype, *geometry, p, tile_key(tile))
    s = torch.empty((made.M, groups * a.shape[0]), device=x.device, dtype=x.dtype)
    if s.numel() == 0:
        return s
    x, thin = last(x), packed(a, x.dtype)
    out, seed, even = split_output(s, made.splits), seed if made.dropout else x, aligned(x, thin)
    for first, start in made.steps:
        start((x, thin[first:] if first else thin, out[..., first:] if first else out, seed), aligned=even)
    if made.total is not None:
        made.total((out, s))
    return s
