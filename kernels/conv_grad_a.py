"""da = conv_wgrad(drop(x), ds) and dx += mask ∘ conv_dgrad(ds, a) / keep: the backward of a convolution's adapter.

x [N, C, *in] channels-last, ds [N · out, groups · R] in x.dtype, a [R, C / groups, *kernel], da like a, dx like x.
Fused: the gather of windows, both ways, and the mask, drawn again from (row of x, channel). Not stored: windows, mask,
dropped x, the adapter's own dx.
da: a program owns a tap, a block of channels and a span of output rows, and reads the rows of x that the tap reads;
taps are adjacent on the grid, so the L2 cache serves all but one of them. A second launch then adds spans and groups in
a fixed order. dx: a program owns rows and channels of dx, and gathers ds, which is thin.
Floor: x read (da), dx read and written, 2 · M · C · taps · R FLOP each.
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3, differentiated.
"""

# ruff: noqa: C408 (tile tables are written with dict())

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    TARGET_PROGRAMS,
    Reduction,
    dtype_key,
    lookup_tile,
    narrow,
    rank_block,
    reduction,
    scratch_bytes,
    span_of,
    split_output,
    tile_key,
    tile_product,
)  # fmt: skip
from fastpeft.kernels._launch import Launch, Start, aligned, arch_of, plan
from fastpeft.kernels._windows import column_blocks, input_rows, last, output_rows, packed, position, windows_of
from fastpeft.kernels.dropout import drop, dropout_args, keep_tile

MODES = ("da", "da_dropout", "dx", "dx_dropout")
MAX_BLOCK_R = {"half": 64, "float32": 16}
# tiles: begin
TILES = {
    (80, "half", "da", 16): dict(BLOCK_M=64, SUBS=4, num_warps=4, num_stages=3),
    (80, "half", "da", 64): dict(BLOCK_M=32, SUBS=4, num_warps=4, num_stages=2),
    (80, "half", "da_dropout", 16): dict(BLOCK_M=32, SUBS=8, num_warps=4, num_stages=1),
    (80, "half", "da_dropout", 64): dict(BLOCK_M=16, SUBS=8, num_warps=8, num_stages=1),
    (80, "half", "dx", 16): dict(BLOCK_M=64, SUBS=4, num_warps=4, num_stages=2),
    (80, "half", "dx", 64): dict(BLOCK_M=64, SUBS=4, num_warps=4, num_stages=2),
    (80, "half", "dx_dropout", 16): dict(BLOCK_M=32, SUBS=8, num_warps=4, num_stages=2),
    (80, "half", "dx_dropout", 64): dict(BLOCK_M=16, SUBS=8, num_warps=4, num_stages=1),
    (80, "float32", "da", 16): dict(BLOCK_M=32, SUBS=4, num_warps=4, num_stages=1),
    (80, "float32", "da_dropout", 16): dict(BLOCK_M=16, SUBS=4, num_warps=4, num_stages=1),
    (90, "float32", "da_dropout", 16): dict(BLOCK_M=16, SUBS=4, num_warps=8, num_stages=2),
    (80, "float32", "dx", 16): dict(BLOCK_M=32, SUBS=4, num_warps=4, num_stages=1),
    (80, "float32", "dx_dropout", 16): dict(BLOCK_M=16, SUBS=8, num_warps=4, num_stages=1),
}
# tiles: end


def tile_space(arch, dtype, R, mode):
    """Candidate tiles."""
    return tile_product(BLOCK_M=(16, 32, 64, 128), SUBS=(2, 4, 8), num_warps=(4, 8), num_stages=(1, 2, 3))


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _conv_da_kernel(
    x_ptr, ds_ptr, da_ptr, seed_ptr, M, C, CT, R, span, ID, IH, IW, OD, OH, OW, stride_dsm, stride_dsg, stride_split,
    stride_group, threshold, factor, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, SUBS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    group = tl.program_id(2)
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    tap = tl.program_id(0) % TAPS
    first = group * C
    block = first // (32 * SUBS) + tl.program_id(0) // TAPS
    offs_r = tl.arange(0, BLOCK_R)
    lanes = block * (32 * SUBS) + tl.arange(0, 32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    da = ()
    for _ in tl.static_range(SUBS):
        da = da + (tl.zeros((BLOCK_R, 32), tl.float32),)  # noqa: RUF005 (Triton has no unpacking)
    begin = split * span
    for m in range(begin, tl.minimum(begin + span, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        n, d, h, w = position(rows, OD, OH, OW)
        row, inside = input_rows(n, d, h, w, tap, ID, IH, IW, KERNEL, STRIDE, PADDING, DILATION)
        mask_m = (rows < M) & inside
        ds_ptrs = ds_ptr + rows[:, None].to(tl.int64) * stride_dsm + group * stride_dsg + offs_r[None, :]
        ds = tl.load(ds_ptrs, mask=mask_m[:, None] & (offs_r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        ds_t = tl.trans(ds)
        x_rows = x_ptr + row[:, None] * CT
        new_da = ()
        for j in tl.static_range(SUBS):
            cols = lanes + j * 32
            mask_k = (cols >= first) & (cols < first + C)
            x = tl.load(x_rows + cols[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, 32]
            if DROPOUT:
                x = drop(x, keep_tile(seed, row, block * (32 * SUBS) + j * 32, threshold, 32))
            new_da = new_da + (tl.dot(ds_t, x, da[j], input_precision="ieee"),)  # noqa: RUF005
        da = new_da
    da_tap = da_ptr + split.to(tl.int64) * stride_split + group.to(tl.int64) * stride_group + (tap * C - first)
    for j in tl.static_range(SUBS):
        cols = lanes + j * 32
        mask = (offs_r < R)[:, None] & ((cols >= first) & (cols < first + C))[None, :]
        ptrs = da_tap + offs_r[:, None].to(tl.int64) * (TAPS * C) + cols[None, :]
        tl.store(ptrs, (da[j] * factor).to(da_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _conv_dx_kernel(
    ds_ptr, a_ptr, dx_ptr, seed_ptr, M, C, CT, R, ID, IH, IW, OD, OH, OW, stride_dsm, threshold, factor,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, SUBS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(2)
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    first = group * C
    block = first // (32 * SUBS) + tl.program_id(1)
    lanes = block * (32 * SUBS) + tl.arange(0, 32)
    n, d, h, w = position(rows, ID, IH, IW)
    acc = ()
    for _ in tl.static_range(SUBS):
        acc = acc + (tl.zeros((BLOCK_M, 32), tl.float32),)  # noqa: RUF005 (Triton has no unpacking)
    for step in range(0, TAPS * tl.cdiv(R, BLOCK_R)):
        tap = step % TAPS
        offs_r = step // TAPS * BLOCK_R + tl.arange(0, BLOCK_R)
        row, inside = output_rows(n, d, h, w, tap, OD, OH, OW, KERNEL, STRIDE, PADDING, DILATION)
        mask_ds = ((rows < M) & inside)[:, None] & (offs_r < R)[None, :]
        ds_ptrs = ds_ptr + row[:, None] * stride_dsm + group * R + offs_r[None, :]
        ds = tl.load(ds_ptrs, mask=mask_ds, other=0.0)  # [BLOCK_M, BLOCK_R]
        a_tap = a_ptr + (tap * C - first) + offs_r[:, None].to(tl.int64) * (TAPS * C)
        new_acc = ()
        for j in tl.static_range(SUBS):
            cols = lanes + j * 32
            mask_a = (offs_r < R)[:, None] & ((cols >= first) & (cols < first + C))[None, :]
            a = tl.load(a_tap + cols[None, :], mask=mask_a, other=0.0)  # [BLOCK_R, 32]
            new_acc = new_acc + (tl.dot(ds, a, acc[j], input_precision="ieee"),)  # noqa: RUF005
        acc = new_acc
    if DROPOUT:
        seed = tl.load(seed_ptr)
    dx_rows = dx_ptr + rows[:, None].to(tl.int64) * CT
    for j in tl.static_range(SUBS):
        cols = lanes + j * 32
        mask = (rows < M)[:, None] & ((cols >= first) & (cols < first + C))[None, :]
        share = acc[j] * factor
        if DROPOUT:
            keep = keep_tile(seed, rows.to(tl.int64), block * (32 * SUBS) + j * 32, threshold, 32)
            share = drop(share, keep)
        old = tl.load(dx_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_rows + cols[None, :], (old + share).to(dx_ptr.dtype.element_ty), mask=mask)


class _Plan(NamedTuple):
    steps: tuple  # (first rank, Start)
    parts: int  # spans and groups, whose sums are added
    total: Reduction | None
    dropout: bool


@plan
def _da_plan(device, where, CT, R, C, dtype, a_dtype, groups, p, tile):
    threshold, factor = dropout_args(p)
    dropout, M = threshold > 0, where.M
    tile = dict(tile or lookup_tile(TILES, arch_of(device), dtype, R, MODES[dropout]))
    tile["SUBS"], blocks = column_blocks(C, CT, groups, tile["SUBS"])
    # A block of 32 ranks spills; the next larger one does not.
    block_r = rank_block(64 if 16 < R < 64 else R, MAX_BLOCK_R[dtype_key(dtype)])
    programs = blocks * where.taps * groups
    span, splits = span_of(M, TARGET_PROGRAMS // programs, tile["BLOCK_M"], 4 * tile["BLOCK_M"])
    parts, numel, item, chunks = splits * groups, R * where.taps * C, dtype.itemsize, -(-R // block_r)
    launch = Launch(
        "conv_grad_a", 2 * M * C * groups * where.taps * R, (chunks * where.rows * CT + M * groups * R) * item,
        numel * a_dtype.itemsize * (parts == 1), scratch_bytes=scratch_bytes((parts, numel)),
    )  # fmt: skip
    constants, steps = {**tile, **where.constants, "BLOCK_R": block_r, "DROPOUT": dropout}, []
    for first in range(0, R, block_r):
        numbers = (
            M, C, CT, min(block_r, R - first), span, *where.sizes, groups * R, R, groups * numel, numel, threshold,
            factor,
        )  # fmt: skip
        grid = (blocks * where.taps, splits, groups)
        steps.append((first, Start(_conv_da_kernel, grid, device, numbers, constants, None if first else launch)))
    return _Plan(tuple(steps), parts, reduction("conv_grad_a_reduce", device, (parts, numel, a_dtype)), dropout)


def _da(x, ds, a, where, groups, p, seed, tile):
    """da [R, taps, C / groups] in a.dtype."""
    (R, C), x = a.shape[:2], last(x)
    made = _da_plan(x.device, where, x.shape[1], R, C, x.dtype, a.dtype, groups, p, tile_key(tile))
    da = torch.empty((R, where.taps, C), device=x.device, dtype=a.dtype)
    out, seed, even = split_output(da, made.parts), seed if made.dropout else x, aligned(x, ds)
    for first, start in made.steps:
        parts = (ds[:, first:], out[..., first:, :, :]) if first else (ds, out)
        start((x, *parts, seed), aligned=even)
    if made.total is not None:
        made.total((out, da))
    return da


@plan
def _dx_plan(device, where, CT, R, C, dtype, groups, p, tile):
    """(Start, whether there is dropout)."""
    threshold, factor = dropout_args(p)
    dropout, M = threshold > 0, where.M
    tile = dict(tile or lookup_tile(TILES, arch_of(device), dtype, R, MODES[2 + dropout]))
    tile["SUBS"], blocks = column_blocks(C, CT, groups, tile["SUBS"])
    wide = where.rows * CT
    launch = Launch(
        "conv_grad_x", 2 * M * C * groups * where.taps * R,
        (wide + M * groups * R + R * C * where.taps) * dtype.itemsize, wide * dtype.itemsize,
    )  # fmt: skip
    numbers = (where.rows, C, CT, R, *where.sizes, groups * R, threshold, factor)
    block_r = rank_block(R, MAX_BLOCK_R[dtype_key(dtype)])
    constants = {**tile, **where.constants, "BLOCK_R": block_r, "DROPOUT": dropout}
    grid = (-(-where.rows // tile["BLOCK_M"]), blocks, groups)
    return Start(_conv_dx_kernel, grid, device, numbers, constants, launch), dropout


def _dx(ds, a, dx, where, groups, p, seed, tile):
    """dx [N, C, *in], channels-last, plus the adapter's share."""
    (R, C), thin = a.shape[:2], packed(a, ds.dtype)
    start, dropout = _dx_plan(dx.device, where, dx.shape[1], R, C, dx.dtype, groups, p, tile_key(tile))
    start((ds, thin, dx, seed if dropout else ds), aligned=aligned(ds, thin, dx))


def conv_grad_a(
    x, ds, a, dx, stride, padding, dilation, groups, p, seed, need_dx, need_da, *, tile=None, dx_tile=None
):  # fmt: skip
    """da like a in a.dtype, or [0]; with need_dx, the adapter's share is added to dx [N, C, *in], dense, channels-last.

    x [N, C, *in] is read only with need_da; ds [N · out, groups · R] contiguous; a any float dtype and strides; seed
    int64 [1], or None at p = 0.
    """
    shape = (dx if need_dx else x).shape
    where = windows_of(tuple(shape), tuple(a.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
    da = torch.empty(a.shape if need_da else 0, device=a.device, dtype=a.dtype)
    if where.M == 0 or 0 in a.shape:
        return da.zero_()
    if need_dx:
        _dx(ds, a, dx, where, groups, p, seed, dx_tile)
    if need_da:
        wide = _da(x, ds, narrow(a), where, groups, p, seed, tile)
        da.copy_(wide.transpose(1, 2).reshape(a.shape))
    return da
