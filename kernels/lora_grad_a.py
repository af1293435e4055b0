"""da = dsᵀ drop(x) and dx = mask ∘ (ds a) / keep: what backward needs from one read of x.

x [M, K], ds [M, R] in x.dtype, a [R, K], da [R, K] in a.dtype, dx [M, K] in x.dtype. A mask of da, a bit
an element, is applied where da is written.
Fused: both products and the mask, drawn again from (seed, row, column). Not stored: mask, dropped x, unmasked ds a.
A program owns a block of columns and a span of rows: its columns of a are read once, its share of da stays in
registers, and spans are then added in a fixed order by a second launch. dx alone (frozen A) reads no x; da alone writes
no dx.
Memory-bound below R of about 100. Floor: MK elements read (da), MK written (dx), 2MKR FLOP each.
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
    capped,
    dtype_key,
    lookup_tile,
    mask_bits,
    narrow,
    ragged,
    rank_block,
    reduction,
    scratch_bytes,
    span_of,
    split_output,
    tile_key,
    tile_product,
)  # fmt: skip
from fastpeft.kernels._launch import Launch, Start, aligned, arch_of, plan
from fastpeft.kernels.dropout import drop, dropout_args, keep_tile

MODES = ("plain", "dropout")
MAX_BLOCK_R = {"half": 128, "float32": 16}
# Largest rank of a launch that makes both. Without the tile's ONE_PASS da and dx are two launches: the mask is drawn
# twice, the bytes moved stay the same (dx alone reads no x), and neither spills.
ONE_PASS_RANK = {"half": 64, "float32": 16}
# tiles: begin
TILES = {
    (80, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_K=128, ONE_PASS=True, num_warps=4, num_stages=2),
    (80, "half", "plain", 64): dict(BLOCK_M=32, BLOCK_K=128, ONE_PASS=False, num_warps=4, num_stages=2),
    (80, "half", "plain", 128): dict(BLOCK_M=64, BLOCK_K=128, ONE_PASS=False, num_warps=8, num_stages=1),
    (80, "half", "dropout", 16): dict(BLOCK_M=32, BLOCK_K=128, ONE_PASS=True, num_warps=4, num_stages=2),
    (80, "half", "dropout", 64): dict(BLOCK_M=32, BLOCK_K=128, ONE_PASS=False, num_warps=4, num_stages=2),
    (80, "half", "dropout", 128): dict(BLOCK_M=64, BLOCK_K=128, ONE_PASS=False, num_warps=8, num_stages=1),
    (80, "float32", "plain", 16): dict(BLOCK_M=32, BLOCK_K=128, ONE_PASS=False, num_warps=4, num_stages=2),
    (80, "float32", "dropout", 16): dict(BLOCK_M=16, BLOCK_K=128, ONE_PASS=False, num_warps=4, num_stages=2),
    (90, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_K=128, ONE_PASS=True, num_warps=4, num_stages=2),
    (90, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_K=128, ONE_PASS=True, num_warps=4, num_stages=2),
    (90, "half", "plain", 128): dict(BLOCK_M=64, BLOCK_K=128, ONE_PASS=False, num_warps=8, num_stages=1),
    (90, "half", "dropout", 16): dict(BLOCK_M=32, BLOCK_K=128, ONE_PASS=True, num_warps=4, num_stages=2),
    (90, "half", "dropout", 64): dict(BLOCK_M=32, BLOCK_K=128, ONE_PASS=True, num_warps=4, num_stages=2),
    (90, "half", "dropout", 128): dict(BLOCK_M=64, BLOCK_K=128, ONE_PASS=False, num_warps=8, num_stages=1),
    (100, "half", "plain", 16): dict(BLOCK_M=32, BLOCK_K=128, ONE_PASS=True, num_warps=4, num_stages=2),
    (100, "half", "plain", 64): dict(BLOCK_M=128, BLOCK_K=128, ONE_PASS=False, num_warps=8, num_stages=2),
    (100, "half", "plain", 128): dict(BLOCK_M=64, BLOCK_K=128, ONE_PASS=False, num_warps=8, num_stages=1),
    (100, "half", "dropout", 16): dict(BLOCK_M=32, BLOCK_K=128, ONE_PASS=True, num_warps=4, num_stages=2),
    (100, "half", "dropout", 64): dict(BLOCK_M=128, BLOCK_K=128, ONE_PASS=False, num_warps=8, num_stages=2),
    (100, "half", "dropout", 128): dict(BLOCK_M=64, BLOCK_K=128, ONE_PASS=False, num_warps=8, num_stages=1),
}
# tiles: end


def tile_space(arch, dtype, R, mode="plain"):
    """Candidate tiles."""
    return tile_product(
        BLOCK_M=(16, 32, 64, 128), BLOCK_K=(64, 128, 256), ONE_PASS=(True, False), num_warps=(4, 8),
        num_stages=(1, 2, 3),
    )  # fmt: skip


@triton.jit
def _a_tile(a_ptr, cols, offs_r, K, R, stride_ar, stride_ak, dtype: tl.constexpr):
    ptrs = a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + cols[None, :].to(tl.int64) * stride_ak
    return tl.load(ptrs, mask=(offs_r < R)[:, None] & (cols < K)[None, :], other=0.0).to(dtype)  # [BLOCK_R, BLOCK_K]


@triton.jit
def _ds_tile(ds_ptr, local, offs_r, rows_left, R, stride_dsm):
    mask = (local < rows_left)[:, None] & (offs_r < R)[None, :]
    return tl.load(ds_ptr + (local[:, None] * stride_dsm + offs_r[None, :]), mask=mask, other=0.0)  # [BLOCK_M, BLOCK_R]


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _lora_grad_a_kernel(
    x_ptr, ds_ptr, a_ptr, da_ptr, dx_ptr, seed_ptr, mask_ptr, M, K, R, span, stride_xm, stride_ar, stride_ak,
    stride_dsm, stride_split, threshold, factor, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, NEED_DX: tl.constexpr, NEED_DA: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """WHOLE: the ranks are one block."""
    first_col = tl.program_id(0) * BLOCK_K
    split = tl.program_id(1)
    offs_r = tl.arange(0, BLOCK_R)
    cols = first_col + tl.arange(0, BLOCK_K)
    mask_k = (cols < K)[None, :]
    local = tl.arange(0, BLOCK_M)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    if NEED_DX and WHOLE:
        a = _a_tile(a_ptr, cols, offs_r, K, R, stride_ar, stride_ak, ds_ptr.dtype.element_ty)
    if NEED_DA:
        da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    begin = split * span
    for m in range(begin, tl.minimum(begin + span, M), BLOCK_M):
        # 64-bit addresses a row block, 32-bit offsets within it: half the registers.
        first = tl.full((), m, tl.int64)
        rows_left = M - m
        mask = (local < rows_left)[:, None] & mask_k
        ds_rows = ds_ptr + first * stride_dsm
        if DROPOUT:
            keep = keep_tile(seed, first + local, first_col, threshold, BLOCK_K)
        if NEED_DA or WHOLE:
            ds = _ds_tile(ds_rows, local, offs_r, rows_left, R, stride_dsm)
        if NEED_DA:
            offsets = local[:, None] * stride_xm + cols[None, :]
            x = tl.load(x_ptr + first * stride_xm + offsets, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            if DROPOUT:
                x = drop(x, keep)
            da = tl.dot(tl.trans(ds), x, da, input_precision="ieee")
        if NEED_DX:
            if WHOLE:
                dx = tl.dot(ds, a, input_precision="ieee")
            else:
                dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                for r in range(0, R, BLOCK_R):
                    step = _ds_tile(ds_rows, local, r + offs_r, rows_left, R, stride_dsm)
                    tile = _a_tile(a_ptr, cols, r + offs_r, K, R, stride_ar, stride_ak, step.dtype)
                    dx = tl.dot(step, tile, dx, input_precision="ieee")
            if DROPOUT:  # after the rounding, as an AND of two elements
                value = drop((dx * factor).to(dx_ptr.dtype.element_ty), keep)
            else:
                value = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + first * K + (local[:, None] * K + cols[None, :]), value, mask=mask)
    if NEED_DA:
        ptrs = da_ptr + split.to(tl.int64) * stride_split + offs_r[:, None].to(tl.int64) * K + cols[None, :]
        mask = (offs_r < R)[:, None] & mask_k
        da = da * factor
        if MASKED:
            da = tl.where(mask_bits(mask_ptr, offs_r[:, None], cols[None, :], K, mask), da, 0.0)
        tl.store(ptrs, da.to(da_ptr.dtype.element_ty), mask=mask)


class _Pass(NamedTuple):
    """What fills da, one read of x for each block of ranks, or dx, or both at once for one block of ranks."""

    steps: tuple  # (first rank, Start)
    splits: int
    total: Reduction | None
    need_dx: bool
    need_da: bool


def _pass(device, M, K, R, dtype, a_dtype, p, need_dx, need_da, masked, stride_xm, stride_a, stride_dsm, tile):
    threshold, factor = dropout_args(p)
    # A block of 32 ranks compiles to spills where the next, which wgmma serves on sm_90, does not.
    block_r = rank_block(64 if 16 < R < 64 else R, MAX_BLOCK_R[dtype_key(dtype)])
    groups = -(-K // tile["BLOCK_K"])
    programs = TARGET_PROGRAMS * 4 // tile["num_warps"]
    span, splits = span_of(M, programs // groups, tile["BLOCK_M"], 4 * tile["BLOCK_M"])
    item, chunks, sums = dtype.itemsize, -(-R // block_r), splits if need_da else 1
    launch = Launch(
        "lora_grad_a", 2 * M * K * R * (need_da + need_dx),
        chunks * M * K * item * need_da + M * R * item + R * K * a_dtype.itemsize * need_dx,
        M * K * item * need_dx + R * K * a_dtype.itemsize * (need_da and splits == 1),
        scratch_bytes=scratch_bytes((sums, R * K)),
    )  # fmt: skip
    flags = {"DROPOUT": threshold > 0, "NEED_DX": need_dx, "NEED_DA": need_da, "MASKED": masked}
    flags["WHOLE"] = block_r >= R or not need_dx
    constants, steps = {**tile, "BLOCK_R": block_r, **flags}, []
    for first in range(0, R if need_da else block_r, block_r):
        numbers = (
            M, K, R - first, span, stride_xm, *stride_a, stride_dsm, R * K if splits > 1 else 0, threshold, factor,
        )  # fmt: skip
        start = Start(_lora_grad_a_kernel, (groups, splits), device, numbers, constants, None if first else launch)
        steps.append((first, start))
    total = reduction("lora_grad_a_reduce", device, (sums, R * K, a_dtype))
    return _Pass(tuple(steps), sums, total, need_dx, need_da)


class _Plan(NamedTuple):
    passes: tuple[_Pass, ...]
    dropout: bool
    copied: bool  # whether x is first made contiguous


@plan
def _plan(device, M, K, R, dtype, a_dtype, p, need_dx, need_da, masked, stride_xm, stride_a, stride_dsm, even, tile):
    """even: as of `ragged`."""
    dropout = dropout_args(p)[0] > 0
    if tile is None:
        tile = lookup_tile(TILES, arch_of(device), dtype, R, MODES[dropout])
        if ragged(even, K, stride_xm if need_da else K):
            most = 16 if dtype == torch.float32 else 32
            tile = {**capped(tile, BLOCK_M=most), "ONE_PASS": False}
    tile = dict(tile)
    if masked and not tile["ONE_PASS"] and dtype != torch.float32:
        tile = capped(tile, num_stages=1)  # a second stage of 64 ranks spilled on sm_80 beside the mask
    # One token of every long sequence: the kernel's offsets within a row block have 32 bits.
    copied = need_da and stride_xm * (min(M, tile["BLOCK_M"]) - 1) + K > 2**31
    together = tile.pop("ONE_PASS") and need_da and need_dx and ONE_PASS_RANK[dtype_key(dtype)] >= R
    sizes, strides = (device, M, K, R, dtype, a_dtype, p), (K if copied else stride_xm, stride_a, stride_dsm)
    passes = []
    if need_da:
        passes.append(_pass(*sizes, together, True, masked, *strides, tile))
    if need_dx and not together:
        passes.append(_pass(*sizes, True, False, False, *strides, tile))
    return _Plan(tuple(passes), dropout, copied)


def lora_grad_a(x, ds, a, p, seed, need_dx, need_da, mask=None, *, tile=None):
    """(da [R, K] in a.dtype, dx [M, K] in x.dtype); x [M, K] with contiguous rows, a any float dtype and strides.

    What was not asked for is an empty tensor. Without need_da x is not read, and may be empty. seed: int64 [1], or None
    at p = 0. mask: bits [R, ceil(K / 8)] of da, zero where the bit is, or None.
    """
    M, (R, K) = ds.shape[0], a.shape
    if a.dtype == torch.float64:
        da, dx = lora_grad_a(x, ds, narrow(a), p, seed, need_dx, need_da, mask, tile=tile)
        return da.double(), dx
    da = torch.empty((R, K) if need_da else 0, device=x.device, dtype=a.dtype)
    dx = torch.empty((M, K) if need_dx else 0, device=x.device, dtype=x.dtype)
    if 0 in (M, K, R):
        return da.zero_(), dx.zero_()
    even = aligned(x, ds, a, x if mask is None else mask)
    made = _plan(
        x.device, M, K, R, x.dtype, a.dtype, p, need_dx, need_da, mask is not None, x.stride(0), a.stride(),
        ds.stride(0), even, tile_key(tile),
    )  # fmt: skip
    x, seed = x.contiguous() if made.copied else x, seed if made.dropout else x
    for each in made.passes:
        out = split_output(da, each.splits) if each.need_da else x
        bits = mask if each.need_da and mask is not None else x
        for first, start in each.steps:
            if first == 0:
                start((x, ds, a, out, dx, seed, bits), aligned=even)
            else:  # of da alone
                part = x if mask is None else mask[first:]
                start((x, ds[:, first:], a, out[..., first:, :], dx, seed, part), aligned=even)
        if each.total is not None:
            each.total((out, da))
    return da, dx
