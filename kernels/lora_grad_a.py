"""da = dsᵀ drop(x) and dx = mask ∘ (ds a) / keep: what backward needs from one read of x.

x [M, K], ds [M, R] in x.dtype, a [R, K], da [R, K] in a.dtype, dx [M, K] in x.dtype. A mask of da, a bit
an element, is applied where da is written.
Fused: both products and the mask, drawn again from (seed, row, column). Not stored: mask, dropped x, unmasked ds a.
A program owns one dropout group of 256 columns and a span of rows: da stays in registers as eight accumulators of
32 columns, one a sub-block, so that the eight masks of a Philox call need no change of layout; spans are then added in
a fixed order by a second launch. dx alone (frozen A) reads no x; da alone writes no dx.
Memory-bound below R of about 100. Floor: MK elements read (da), MK written (dx), 2MKR FLOP each.
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3, differentiated.
"""

# ruff: noqa: C408 (tile tables are written with dict())

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    GROUP,
    TARGET_PROGRAMS,
    Reduction,
    capped,
    drop,
    dropout_args,
    dtype_key,
    keep_bits,
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

MODES = ("plain", "dropout")
MAX_BLOCK_R = {"half": 128, "float32": 16}
# Largest rank of a launch that makes both. Without the tile's ONE_PASS da and dx are two launches: the mask is drawn
# twice, the bytes moved stay the same (dx alone reads no x), and neither spills.
ONE_PASS_RANK = {"half": 64, "float32": 16}
# tiles: begin
TILES = {
    (80, "half", "plain", 16): dict(BLOCK_M=64, ONE_PASS=False, num_warps=4, num_stages=2),
    (80, "half", "plain", 64): dict(BLOCK_M=16, ONE_PASS=False, num_warps=8, num_stages=2),
    (80, "half", "plain", 128): dict(BLOCK_M=16, ONE_PASS=False, num_warps=8, num_stages=1),
    (80, "half", "dropout", 16): dict(BLOCK_M=32, ONE_PASS=False, num_warps=4, num_stages=2),
    (80, "half", "dropout", 64): dict(BLOCK_M=32, ONE_PASS=False, num_warps=8, num_stages=2),
    (80, "half", "dropout", 128): dict(BLOCK_M=32, ONE_PASS=False, num_warps=8, num_stages=1),
    (80, "float32", "plain", 16): dict(BLOCK_M=32, ONE_PASS=False, num_warps=8, num_stages=1),
    (80, "float32", "dropout", 16): dict(BLOCK_M=16, ONE_PASS=False, num_warps=8, num_stages=1),
    (90, "half", "plain", 16): dict(BLOCK_M=64, ONE_PASS=True, num_warps=4, num_stages=2),
    (90, "half", "plain", 64): dict(BLOCK_M=64, ONE_PASS=True, num_warps=8, num_stages=2),
    (90, "half", "plain", 128): dict(BLOCK_M=32, ONE_PASS=False, num_warps=8, num_stages=1),
    (90, "half", "dropout", 16): dict(BLOCK_M=32, ONE_PASS=False, num_warps=4, num_stages=2),
    (90, "half", "dropout", 64): dict(BLOCK_M=64, ONE_PASS=True, num_warps=8, num_stages=2),
    (90, "half", "dropout", 128): dict(BLOCK_M=32, ONE_PASS=False, num_warps=8, num_stages=1),
    (90, "float32", "dropout", 16): dict(BLOCK_M=16, ONE_PASS=False, num_warps=8, num_stages=2),
    (100, "half", "plain", 16): dict(BLOCK_M=64, ONE_PASS=False, num_warps=4, num_stages=2),
    (100, "half", "dropout", 16): dict(BLOCK_M=32, ONE_PASS=False, num_warps=8, num_stages=2),
    (100, "half", "dropout", 64): dict(BLOCK_M=64, ONE_PASS=True, num_warps=8, num_stages=2),
    (100, "half", "dropout", 128): dict(BLOCK_M=32, ONE_PASS=False, num_warps=8, num_stages=1),
    (100, "half", "plain", 64): dict(BLOCK_M=64, ONE_PASS=True, num_warps=8, num_stages=2),
    (100, "half", "plain", 128): dict(BLOCK_M=32, ONE_PASS=False, num_warps=8, num_stages=1),
}
# tiles: end


def tile_space(arch, dtype, R, mode="plain"):
    """Candidate tiles; the columns of a program are fixed by the dropout group."""
    return tile_product(BLOCK_M=(16, 32, 64, 128), ONE_PASS=(True, False), num_warps=(4, 8), num_stages=(1, 2, 3))


@triton.jit
def _add_da(x_ptr, local, cols, rows_left, K, stride_xm, ds_t, bits, da, j: tl.constexpr, DROPOUT: tl.constexpr):
    """da [BLOCK_R, 32] plus this block's share: dsᵀ drop(x), without the 1 / keep."""
    mask = (local < rows_left)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + (local[:, None] * stride_xm + cols[None, :]), mask=mask, other=0.0)  # [BLOCK_M, 32]
    if DROPOUT:
        x = drop(x, bits, j)
    return tl.dot(ds_t, x, da, input_precision="ieee")


@triton.jit
def _ds_tile(ds_ptr, local, offs_r, rows_left, R, stride_dsm):
    mask = (local < rows_left)[:, None] & (offs_r < R)[None, :]
    return tl.load(ds_ptr + (local[:, None] * stride_dsm + offs_r[None, :]), mask=mask, other=0.0)  # [BLOCK_M, BLOCK_R]


@triton.jit
def _add_product(a_ptr, ds, cols, offs_r, K, R, stride_ar, stride_ak, acc):
    """acc [BLOCK_M, 32] += ds a over BLOCK_R ranks."""
    a_ptrs = a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + cols[None, :].to(tl.int64) * stride_ak
    a = tl.load(a_ptrs, mask=(offs_r < R)[:, None] & (cols < K)[None, :], other=0.0).to(ds.dtype)
    return tl.dot(ds, a, acc, input_precision="ieee")


# No instruction depends on whether 16 divides M (sm_90, Triton 3.6 and 3.9); elsewhere masks of rows become cheaper.
@triton.jit(do_not_specialize=["M", "threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _lora_grad_a_kernel(
    x_ptr, ds_ptr, a_ptr, da_ptr, dx_ptr, seed_ptr, mask_ptr, M, K, R, span, stride_xm, stride_ar, stride_ak,
    stride_dsm, stride_split, threshold, factor, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    split = tl.program_id(1)
    offs_r = tl.arange(0, BLOCK_R)
    lanes = group * 256 + tl.arange(0, 32)
    local = tl.arange(0, BLOCK_M)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    zero = tl.zeros((BLOCK_R, 32), tl.float32)
    da = (zero, zero, zero, zero, zero, zero, zero, zero)
    begin = split * span
    for m in range(begin, tl.minimum(begin + span, M), BLOCK_M):
        # 64-bit addresses a row block, 32-bit offsets within it: half the registers.
        first = tl.full((), m, tl.int64)
        rows_left = M - m
        x_rows = x_ptr + first * stride_xm
        ds_rows = ds_ptr + first * stride_dsm
        dx_rows = dx_ptr + first * K
        if NEED_DA:
            ds = _ds_tile(ds_rows, local, offs_r, rows_left, R, stride_dsm)
            ds_t = tl.trans(ds)
        if DROPOUT:
            bits = keep_bits(seed, first + local, group, threshold)
        else:
            bits = 0
        new_da = ()
        for j in tl.static_range(8):
            cols = lanes + j * 32
            if NEED_DA:
                part = _add_da(x_rows, local, cols, rows_left, K, stride_xm, ds_t, bits, da[j], j, DROPOUT)
                new_da = new_da + (part,)  # noqa: RUF005 (Triton has no unpacking)
            if NEED_DX:
                acc = tl.zeros((BLOCK_M, 32), tl.float32)
                if NEED_DA:  # one rank block, already loaded
                    acc = _add_product(a_ptr, ds, cols, offs_r, K, R, stride_ar, stride_ak, acc)
                else:
                    for r in range(0, R, BLOCK_R):
                        step = _ds_tile(ds_rows, local, r + offs_r, rows_left, R, stride_dsm)
                        acc = _add_product(a_ptr, step, cols, r + offs_r, K, R, stride_ar, stride_ak, acc)
                if DROPOUT:
                    acc = drop(acc * factor, bits, j)
                mask = (local < rows_left)[:, None] & (cols < K)[None, :]
                tl.store(dx_rows + (local[:, None] * K + cols[None, :]), acc.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DA:
            da = new_da
    if NEED_DA:
        for j in tl.static_range(8):
            cols = lanes + j * 32
            ptrs = da_ptr + split.to(tl.int64) * stride_split + offs_r[:, None].to(tl.int64) * K + cols[None, :]
            mask = (offs_r < R)[:, None] & (cols < K)[None, :]
            value = da[j] * factor
            if MASKED:
                value = tl.where(mask_bits(mask_ptr, offs_r[:, None], cols[None, :], K, mask), value, 0.0)
            tl.store(ptrs, value.to(da_ptr.dtype.element_ty), mask=mask)


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
    block_r = rank_block(64 if 16 < R < 64 else R, (MAX_BLOCK_R if need_da else ONE_PASS_RANK)[dtype_key(dtype)])
    groups = -(-K // GROUP)
    # Partial sums grow with the rank, and above 16 a program has twice the warps: half as many are wanted.
    programs = TARGET_PROGRAMS if R <= 16 else TARGET_PROGRAMS // 2
    span, splits = span_of(M, -(-programs // groups), tile["BLOCK_M"], 4 * tile["BLOCK_M"])
    item, chunks, sums = dtype.itemsize, -(-R // block_r), splits if need_da else 1
    launch = Launch(
        "lora_grad_a", 2 * M * K * R * (need_da + need_dx),
        chunks * M * K * item * need_da + M * R * item + R * K * a_dtype.itemsize * need_dx,
        M * K * item * need_dx + R * K * a_dtype.itemsize * (need_da and splits == 1),
        scratch_bytes=scratch_bytes((sums, R * K)),
    )  # fmt: skip
    flags = {"DROPOUT": threshold > 0, "NEED_DX": need_dx, "NEED_DA": need_da, "MASKED": masked}
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
            most = 16 if R <= 16 or dtype == torch.float32 else 32
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
