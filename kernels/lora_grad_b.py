"""ds = scale * dy b, db = scale * dyᵀ s, dbias = sum over m of dy: what backward needs from one read of dy.

dy [M, N], s [M, R] and ds [M, R] in dy.dtype, b [N, R], db [N, R] in b.dtype, dbias [N] fp32.
Fused: the three reductions and the cast of b. Not stored: anything of size M N.
A program owns a block of columns and a span of rows: db stays in registers, ds leaves as fp32 partial sums, one set per
column block, added in a fixed order by a second launch. Those sums cost 8 R / BLOCK_N bytes an element of dy, so above
rank 64 a second read of dy is cheaper: `_lora_grad_b_rows_kernel` then makes ds alone with its sum over N in registers.
Memory-bound below R of about 100. Floor: MN elements read, MR + NR written, 4MNR FLOP.
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3, differentiated.
"""

# ruff: noqa: C408 (tile tables are written with dict())

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    LEAST_PROGRAMS,
    TARGET_PROGRAMS,
    Reduction,
    lookup_tile,
    mask_bits,
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

MODES = ("plain", "rows")
MAX_BLOCK_R = {"plain": 128, "rows": 256}
ONE_PASS_RANK = 64
# tiles: begin
TILES = {
    (80, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_N=256, num_warps=4, num_stages=2),
    (80, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
    (80, "half", "plain", 128): dict(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=2),
    (80, "half", "rows", 16): dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=5),
    (80, "half", "rows", 64): dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=4),
    (80, "half", "rows", 256): dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=3),
    (80, "float32", "plain", 16): dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
    (80, "float32", "plain", 128): dict(BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=1),
    (80, "float32", "rows", 16): dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=3),
    (80, "float32", "rows", 256): dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
    (90, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_N=256, num_warps=4, num_stages=2),
    (90, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_N=256, num_warps=8, num_stages=2),
    (90, "half", "plain", 128): dict(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=3),
    (90, "half", "rows", 16): dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=5),
    (90, "half", "rows", 64): dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=4),
    (90, "half", "rows", 256): dict(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=3),
}
# tiles: end


def tile_space(arch, dtype, R, mode="plain"):
    """Candidate tiles."""
    if mode == "rows":
        return tile_product(BLOCK_M=(32, 64, 128), BLOCK_N=(64, 128, 256), num_warps=(4, 8), num_stages=(2, 3, 4, 5))
    return tile_product(BLOCK_M=(32, 64, 128), BLOCK_N=(128, 256, 512), num_warps=(4, 8), num_stages=(1, 2, 3))


@triton.jit
def _lora_grad_b_kernel(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, dbias_ptr, mask_ptr, M, N, R, span, stride_dym, stride_sm, stride_bn,
    stride_br, stride_ds_split, stride_dsm, stride_db_split, stride_dbn, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    NEED_DS: tl.constexpr, NEED_DB: tl.constexpr, NEED_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0)
    split = tl.program_id(1)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = cols < N
    mask_r = offs_r < R
    if NEED_DS:
        b_ptrs = b_ptr + cols[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0).to(dy_ptr.dtype.element_ty)
        ds_base = ds_ptr + pid_n.to(tl.int64) * stride_ds_split
    if NEED_DB:
        db = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if NEED_BIAS:
        # Column sums on the matrix units: a row of ones needs an eighth of the registers of dy in fp32.
        ones = tl.full((16, BLOCK_M), 1.0, dy_ptr.dtype.element_ty)
        dbias = tl.zeros((16, BLOCK_N), tl.float32)
    begin = split * span
    for m in range(begin, tl.minimum(begin + span, M), BLOCK_M):
        rows = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :]
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        if NEED_DS:
            ds = tl.dot(dy, b, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_R]
            ds_ptrs = ds_base + rows[:, None] * stride_dsm + offs_r[None, :]
            tl.store(ds_ptrs, ds.to(ds_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
        if NEED_DB:
            st_ptrs = s_ptr + rows[None, :] * stride_sm + offs_r[:, None]
            st = tl.load(st_ptrs, mask=mask_m[None, :] & mask_r[:, None], other=0.0)  # [BLOCK_R, BLOCK_M]
            db = tl.dot(st, dy, db, input_precision="ieee")
        if NEED_BIAS:
            dbias = tl.dot(ones, dy, dbias, input_precision="ieee")
    if NEED_DB:
        db_ptrs = db_ptr + split.to(tl.int64) * stride_db_split
        db_ptrs += cols[None, :].to(tl.int64) * stride_dbn + offs_r[:, None]
        inside = mask_n[None, :] & mask_r[:, None]
        db = db * scale
        if MASKED:
            db = tl.where(mask_bits(mask_ptr, offs_r[:, None], cols[None, :], N, inside), db, 0.0)
        tl.store(db_ptrs, db.to(db_ptr.dtype.element_ty), mask=inside)
    if NEED_BIAS:
        first = tl.arange(0, 16)[:, None] == 0
        dbias_ptrs = dbias_ptr + split.to(tl.int64) * N + cols[None, :] + tl.zeros((16, 1), tl.int32)
        tl.store(dbias_ptrs, dbias, mask=mask_n[None, :] & first)


@triton.jit
def _lora_grad_b_rows_kernel(
    dy_ptr, b_ptr, ds_ptr, M, N, R, span, stride_dym, stride_bn, stride_br, stride_ds_split, stride_dsm, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = (rows < M)[:, None]
    mask_r = (offs_r < R)[None, :]
    begin = split * span
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n in range(begin, tl.minimum(begin + span, N), BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :]
        dy = tl.load(dy_ptrs, mask=mask_m & (cols < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        b_ptrs = b_ptr + cols[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
        b = tl.load(b_ptrs, mask=(cols < N)[:, None] & mask_r, other=0.0).to(dy.dtype)  # [BLOCK_N, BLOCK_R]
        acc = tl.dot(dy, b, acc, input_precision="ieee")
    ptrs = ds_ptr + split.to(tl.int64) * stride_ds_split + rows[:, None] * stride_dsm + offs_r[None, :]
    tl.store(ptrs, (acc * scale).to(ds_ptr.dtype.element_ty), mask=mask_m & mask_r)


class _Plan(NamedTuple):
    steps: tuple  # (first rank, Start); one launch takes block_r ranks
    block_r: int
    splits: tuple  # of ds, db and dbias
    total: Reduction | None


@plan
def _rows_plan(device, M, N, R, dtype, b_dtype, stride_dym, stride_b, tile):
    tile = dict(tile or lookup_tile(TILES, arch_of(device), dtype, R, "rows"))
    block_r = rank_block(R, MAX_BLOCK_R["rows"])
    tiles_m = -(-M // tile["BLOCK_M"])
    span, splits = span_of(N, -(-LEAST_PROGRAMS // tiles_m), 256, 1024)  # as lora_shrink
    item, chunks = dtype.itemsize, -(-R // block_r)
    launch = Launch(
        "lora_grad_b_rows", 2 * M * N * R, chunks * M * N * item + N * R * b_dtype.itemsize,
        M * R * item if splits == 1 else 0, scratch_bytes=scratch_bytes((splits, M * R)),
    )  # fmt: skip
    steps, constants = [], {**tile, "BLOCK_R": block_r}
    for first in range(0, R, block_r):
        numbers = M, N, min(block_r, R - first), span, stride_dym, *stride_b, M * R if splits > 1 else 0, R
        start = Start(
            _lora_grad_b_rows_kernel, (tiles_m, splits), device, numbers, constants, None if first else launch
        )
        steps.append((first, start))
    total = reduction("lora_grad_b_reduce", device, (splits, M * R, dtype))
    return _Plan(tuple(steps), block_r, (splits,), total)


def _rows(dy, b, scale, tile):
    """ds [M, R] alone, one read of dy for each 256 ranks."""
    (M, N), R = dy.shape, b.shape[1]
    ds = torch.empty((M, R), device=dy.device, dtype=dy.dtype)
    made = _rows_plan(dy.device, M, N, R, dy.dtype, b.dtype, dy.stride(0), b.stride(), tile_key(tile))
    out, even = split_output(ds, made.splits[0]), aligned(dy, b)
    for first, start in made.steps:
        last = first + made.block_r
        start((dy, b[:, first:last], out[..., first:last]), (float(scale),), even)
    if made.total is not None:
        made.total((out, ds))
    return ds


@plan
def _columns_plan(device, M, N, R, dtype, b_dtype, needs, masked, stride_dym, stride_sm, stride_b, tile):
    """needs: of ds, db and dbias; stride_sm: 0 where s is not read."""
    need_ds, need_db, need_bias = needs
    tile = dict(tile or lookup_tile(TILES, arch_of(device), dtype, R))
    block_r = rank_block(R, MAX_BLOCK_R["plain"])
    tiles_n = -(-N // tile["BLOCK_N"])
    span, splits = span_of(M, TARGET_PROGRAMS // tiles_n, tile["BLOCK_M"], 4 * tile["BLOCK_M"])
    jobs = tuple(
        (parts if need else 1, numel if need else 0, kind)
        for need, parts, numel, kind in zip(
            needs, (tiles_n, splits, splits), (M * R, N * R, N), (dtype, b_dtype, torch.float32), strict=True
        )
    )
    item, chunks = dtype.itemsize, -(-R // block_r) if need_ds or need_db else 1
    launch = Launch(
        "lora_grad_b", 2 * M * N * R * (need_ds + need_db) + M * N * need_bias,
        chunks * M * N * item + N * R * b_dtype.itemsize * need_ds + M * R * item * need_db,
        sum(numel * kind.itemsize for parts, numel, kind in jobs if parts == 1),
        scratch_bytes=scratch_bytes(*(job[:2] for job in jobs)),
    )  # fmt: skip
    steps = []
    for first in range(0, chunks * block_r, block_r):
        numbers = (
            M, N, min(block_r, R - first), span, stride_dym, stride_sm, *stride_b, M * R if tiles_n > 1 else 0, R,
            N * R if splits > 1 else 0, R,
        )  # fmt: skip
        flags = {"NEED_DS": need_ds, "NEED_DB": need_db, "NEED_BIAS": need_bias and first == 0}
        flags["MASKED"] = need_db and masked
        constants = {**tile, "BLOCK_R": block_r, **flags}
        start = Start(_lora_grad_b_kernel, (tiles_n, splits), device, numbers, constants, None if first else launch)
        steps.append((first, start))
    total = reduction("lora_grad_b_reduce", device, *jobs)
    return _Plan(tuple(steps), block_r, tuple(parts for parts, _, _ in jobs), total)


def _columns(dy, s, b, scale, need_ds, need_db, need_bias, mask, tile):
    """ds, db and dbias in one read of dy for each 128 ranks; ds only up to rank 64, where it is the cheaper way."""
    (M, N), R, device = dy.shape, b.shape[1], dy.device
    s = s if need_db else dy
    made = _columns_plan(
        device, M, N, R, dy.dtype, b.dtype, (need_ds, need_db, need_bias), mask is not None, dy.stride(0),
        s.stride(0) if need_db else 0, b.stride(), tile_key(tile),
    )  # fmt: skip
    ds = torch.empty((M, R) if need_ds else 0, device=device, dtype=dy.dtype)
    db = torch.empty((N, R) if need_db else 0, device=device, dtype=b.dtype)
    dbias = torch.empty(N if need_bias else 0, device=device, dtype=torch.float32)
    ds_out, db_out, dbias_out = map(split_output, (ds, db, dbias), made.splits)
    bits = dy if mask is None else mask
    even, scale = aligned(dy, s, b, bits), (float(scale),)
    for first, start in made.steps:
        last = first + made.block_r
        if last >= R and not first:
            start((dy, s, b, ds_out, db_out if need_db else dy, dbias_out, bits), scale, even)
            continue
        parts = (s[:, first:last], db_out[..., first:last]) if need_db else (dy, dy)
        start(
            (dy, parts[0], b[:, first:last], ds_out, parts[1], dbias_out, dy if mask is None else mask[first:]), scale,
            even,
        )  # fmt: skip
    if made.total is not None:
        made.total((ds_out, ds), (db_out, db), (dbias_out, dbias))
    return ds, db, dbias


def lora_grad_b(dy, s, b, scale, need_db, need_bias, mask=None, *, tile=None):
    """(ds [M, R], db [N, R] in b.dtype, dbias [N] fp32); dy [M, N] with contiguous rows, b any float dtype and strides.

    What was not asked for is an empty tensor. A `tile` applies to the pass that reads dy first. mask: bits
    [R, ceil(N / 8)] of dbᵀ, zero where the bit is, or None.
    """
    (M, N), R = dy.shape, b.shape[1]
    if 0 in (M, N, R):
        zeros = (dy.new_zeros((M, R)), b.new_zeros((N, R) if need_db else 0))
        dbias = torch.zeros(N if need_bias else 0, device=dy.device, dtype=torch.float32)
        return *zeros, dbias if R else dbias.copy_(dy.sum(0, dtype=torch.float32)) if need_bias else dbias
    if b.dtype == torch.float64:
        ds, db, dbias = lora_grad_b(dy, s, narrow(b), scale, need_db, need_bias, mask, tile=tile)
        return ds, db.double(), dbias
    if R <= ONE_PASS_RANK and (need_db or need_bias):
        return _columns(dy, s, b, scale, True, need_db, need_bias, mask, tile)
    ds = _rows(dy, b, scale, tile)
    if not (need_db or need_bias):
        return ds, b.new_empty(0), torch.empty(0, device=dy.device, dtype=torch.float32)
    return ds, *_columns(dy, s, b, scale, False, need_db, need_bias, mask, None)[1:]
