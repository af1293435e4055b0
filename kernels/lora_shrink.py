"""s = drop(x) aᵀ: the thin product that every LoRA forward starts with.

x [M, K], a [R, K], s [M, R] in x.dtype; drop(x) = mask ∘ x / keep, the mask a pure function of (seed, row, column).
Fused: dropout, the cast of a to x.dtype, and on demand a copy of x as it is. Not stored: the mask, dropped x, a cast
copy of a.
Memory-bound below R of about 200. Floor: MK + RK elements read, MR written, 2MKR FLOP.
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3. Philox-4x32: Salmon et al. 2011, doi:10.1145/2063384.2063405.
"""

# ruff: noqa: C408 (tile tables are written with dict())

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    LEAST_PROGRAMS,
    Reduction,
    capped,
    dtype_key,
    lookup_tile,
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

MODES = ("plain", "dropout", "copy", "copy_dropout")  # copying, registers hold x until it is written
# Ranks of one launch: with more, the masked columns of x and the accumulator do not fit the registers.
MAX_BLOCK_R = {("half", "plain"): 256, ("half", "dropout"): 128, ("float32", "plain"): 64, ("float32", "dropout"): 64}
# tiles: begin
TILES = {
    (80, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (80, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
    (80, "half", "plain", 256): dict(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=3),
    (80, "half", "dropout", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=2),
    (80, "half", "dropout", 64): dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
    (80, "half", "dropout", 128): dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=2),
    (80, "float32", "plain", 16): dict(BLOCK_M=64, BLOCK_K=32, num_warps=4, num_stages=3),
    (80, "float32", "plain", 64): dict(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=2),
    (80, "float32", "dropout", 16): dict(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=2),
    (80, "float32", "dropout", 64): dict(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=2),
    (90, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=4),
    (90, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=2),
    (90, "half", "plain", 256): dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=2),
    (90, "half", "dropout", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (90, "half", "dropout", 64): dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
    (90, "half", "dropout", 128): dict(BLOCK_M=64, BLOCK_K=128, num_warps=8, num_stages=2),
    (100, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=4),
    (100, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=2),
    (100, "half", "plain", 256): dict(BLOCK_M=64, BLOCK_K=128, num_warps=8, num_stages=1),
    (100, "half", "dropout", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (100, "half", "dropout", 64): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=2),
    (100, "half", "dropout", 128): dict(BLOCK_M=64, BLOCK_K=128, num_warps=8, num_stages=1),
    (80, "half", "copy", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (80, "half", "copy", 64): dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
    (80, "half", "copy", 256): dict(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=3),
    (80, "half", "copy_dropout", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=2),
    (80, "half", "copy_dropout", 64): dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=2),
    (80, "half", "copy_dropout", 128): dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=2),
    (80, "float32", "copy", 16): dict(BLOCK_M=32, BLOCK_K=32, num_warps=4, num_stages=3),
    (80, "float32", "copy", 64): dict(BLOCK_M=32, BLOCK_K=32, num_warps=4, num_stages=2),
    (80, "float32", "copy_dropout", 16): dict(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=2),
    (80, "float32", "copy_dropout", 64): dict(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=2),
    (90, "half", "copy", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (90, "half", "copy", 64): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=2),
    (90, "half", "copy", 256): dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=2),
    (90, "half", "copy_dropout", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (90, "half", "copy_dropout", 64): dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
    (90, "half", "copy_dropout", 128): dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=3),
    (100, "half", "copy", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (100, "half", "copy", 64): dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
    (100, "half", "copy", 256): dict(BLOCK_M=64, BLOCK_K=128, num_warps=8, num_stages=1),
    (100, "half", "copy_dropout", 16): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (100, "half", "copy_dropout", 64): dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=2),
    (100, "half", "copy_dropout", 128): dict(BLOCK_M=64, BLOCK_K=128, num_warps=8, num_stages=1),
}
# tiles: end


def tile_space(arch, dtype, R, mode):
    """Candidate tiles."""
    if mode.endswith("dropout"):
        return tile_product(BLOCK_M=(32, 64, 128), BLOCK_K=(64, 128, 256), num_warps=(4, 8), num_stages=(2, 3, 4))
    return tile_product(BLOCK_M=(32, 64, 128), BLOCK_K=(64, 128, 256), num_warps=(4, 8), num_stages=(2, 3, 4, 5))


@triton.jit
def _a_tile(a_ptr, cols, offs_r, K, R, stride_ar, stride_ak):
    mask = (cols < K)[:, None] & (offs_r < R)[None, :]
    ptrs = a_ptr + offs_r[None, :].to(tl.int64) * stride_ar + cols[:, None].to(tl.int64) * stride_ak
    return tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_R]


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr, copy_ptr, M, K, R, span, stride_xm, stride_ar, stride_ak, stride_split, stride_om,
    threshold, factor, stride_cm,
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
        cols = k + tl.arange(0, BLOCK_K)
        mask = mask_m & (cols < K)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if COPY:
            tl.store(copy_rows + cols[None, :], x, mask=mask)
        if DROPOUT:
            x = drop(x, keep_tile(seed, rows, k, threshold, BLOCK_K))
        a = _a_tile(a_ptr, cols, offs_r, K, R, stride_ar, stride_ak).to(x.dtype)
        acc = tl.dot(x, a, acc, input_precision="ieee")
    ptrs = out_ptr + split.to(tl.int64) * stride_split + rows[:, None] * stride_om + offs_r[None, :]
    tl.store(ptrs, (acc * factor).to(out_ptr.dtype.element_ty), mask=mask_m & (offs_r < R)[None, :])


class _Plan(NamedTuple):
    steps: tuple  # (first rank, Start); one launch takes block_r ranks
    block_r: int
    splits: int
    total: Reduction | None
    dropout: bool


@plan
def _plan(device, M, K, R, dtype, a_dtype, p, stride_xm, stride_a, stride_cm, even, tile):
    """stride_cm: of the copy, or None; even: as of `ragged`."""
    threshold, factor = dropout_args(p)
    dropout, copied = threshold > 0, stride_cm is not None
    if tile is None:
        tile = lookup_tile(TILES, arch_of(device), dtype, R, MODES[dropout + 2 * copied])
        if ragged(even, K, stride_xm):
            tile = capped(tile, BLOCK_M=32, BLOCK_K=64)
    tile = dict(tile)
    block_r = rank_block(R, MAX_BLOCK_R[dtype_key(dtype), MODES[dropout]])
    chunks, tiles_m = -(-R // block_r), -(-M // tile["BLOCK_M"])
    # One program an SM is wanted, not two: where none is split, a second launch is saved.
    span, splits = span_of(K, -(-LEAST_PROGRAMS // tiles_m), 256, 1024)
    launch = Launch(
        "lora_shrink", 2 * M * K * R, chunks * M * K * dtype.itemsize + R * K * a_dtype.itemsize,
        (M * R * (splits == 1) + M * K * copied) * dtype.itemsize, scratch_bytes=scratch_bytes((splits, M * R)),
    )  # fmt: skip
    steps = []
    for first in range(0, R, block_r):
        numbers = (
            M, K, min(block_r, R - first), span, stride_xm, *stride_a, M * R if splits > 1 else 0, R, threshold, factor,
            stride_cm if copied else stride_xm,
        )  # fmt: skip
        constants = {**tile, "BLOCK_R": block_r, "DROPOUT": dropout, "COPY": copied and first == 0}
        start = Start(_lora_shrink_kernel, (tiles_m, splits), device, numbers, constants, None if first else launch)
        steps.append((first, start))
    total = reduction("lora_shrink_reduce", device, (splits, M * R, dtype))
    return _Plan(tuple(steps), block_r, splits, total, dropout)


def lora_shrink(x, a, p, seed, *, copy=None, tile=None):
    """s [M, R] = drop(x) aᵀ; x [M, K] with contiguous rows, a any float dtype and strides, seed int64 [1] or None.

    copy: [M, K] with contiguous rows, in x.dtype, that x is written to as it is; only where R > 0.
    """
    (M, K), R = x.shape, a.shape[0]
    s = torch.empty((M, R), device=x.device, dtype=x.dtype)
    if 0 in (M, R):
        return s
    a, to = narrow(a), x if copy is None else copy
    even = aligned(x, a, to)
    made = _plan(
        x.device, M, K, R, x.dtype, a.dtype, p, x.stride(0), a.stride(), None if copy is None else to.stride(0), even,
        tile_key(tile),
    )  # fmt: skip
    out, seed = split_output(s, made.splits), seed if made.dropout else x
    for first, start in made.steps:
        last = first + made.block_r
        part_a, part_out = (a, out) if last >= R and not first else (a[first:last], out[..., first:last])
        start((x, part_a, part_out, seed, to), aligned=even)
    if made.total is not None:
        made.total((out, s))
    return s
