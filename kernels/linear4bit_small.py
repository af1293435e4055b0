"""y = x wᵀ + bias + scale * (s bᵀ + lora_bias) and dx += dy w for few rows, directly from the packed 4-bit weight.

x [M, K], dy [M, N], packed and scales of w [N, K] as in _fourbit.py, s [M, R], b [N, R], y [M, N], dx [M, K].
Fused: decoding, both forms of scales, the rank-R term, both biases. Not stored: any of w; the multiplied values are
those that dequantize_4bit would write. A program owns a block of output columns and a span of the reduction; a second
launch adds the spans in a fixed order.
Forward multiplies w [BLOCK_N, BLOCK_K] by xᵀ, so that the decoded tile is the left operand, which tensor cores take
from registers; its two halves are interleaved there, so that x needs no reordering.
Bound by the integer units that decode. Floor: n / 2 bytes, the scales, x and y; 2MNK FLOP.
Dettmers et al. 2023, arXiv:2305.14314, eq. 5.
"""

# ruff: noqa: C408 (tile tables are written with dict())

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    TARGET_PROGRAMS,
    Reduction,
    dense,
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
from fastpeft.kernels._fourbit import block_absmax, decode, nested, packed_flags, scale_args, scale_bytes, scale_rows
from fastpeft.kernels._launch import Launch, Start, aligned, arch_of, plan

MODES = ("fwd", "dx")
MAX_M = 64
MIN_GROUP = 32  # columns that share an absmax in a tile; fewer cost more loads of scales than of weights
MAX_BLOCK_R = {"half": 64, "float32": 16}  # beyond that, an fp32 step, multiplied without tensor cores, spills
# Keyed by the rows of a tile (16, 32 or 64) where the other tables have the rank.
# tiles: begin
TILES = {
    (80, "half", "fwd", 16): dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (80, "half", "fwd", 64): dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (80, "float32", "fwd", 64): dict(BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=2),
    (80, "half", "dx", 16): dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
    (80, "half", "dx", 64): dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
    (80, "float32", "dx", 32): dict(BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=2),
    (80, "float32", "dx", 64): dict(BLOCK_N=16, BLOCK_K=64, num_warps=8, num_stages=2),
    (100, "float32", "fwd", 64): dict(BLOCK_N=16, BLOCK_K=64, num_warps=4, num_stages=2),
    (100, "half", "fwd", 16): dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
    (100, "half", "fwd", 64): dict(BLOCK_N=64, BLOCK_K=128, num_warps=8, num_stages=3),
}
# tiles: end


def tile_space(arch, dtype, R, mode):
    """Candidate tiles."""
    return tile_product(BLOCK_N=(16, 32, 64, 128), BLOCK_K=(64, 128, 256), num_warps=(4, 8), num_stages=(2, 3, 4))


def group_of(K, block_size):
    """Length of aligned groups of columns that share an absmax: the power of two in K, at most block_size."""
    return min(block_size, K & -K)


def small_unmet(M, K, block_size):
    """Why the packed weight cannot be multiplied without dequantising it; an empty string if it can."""
    if M > MAX_M:
        return f"needs at most {MAX_M} rows, got {M}"
    if group_of(K, block_size) < MIN_GROUP:
        return f"needs K to be a multiple of {MIN_GROUP}, so that no byte and few blocks straddle rows, got {K}"
    return ""


@triton.jit
def _weight_tile(
    packed_ptr, absmax_ptr, code_ptr, scale_ptr, offset_ptr, rows, k, N, K,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, FP4: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """w fp32 [rows, BLOCK_K] from column k, zero outside the weight."""
    first = rows * K + k
    mask_n = (rows < N)[:, None]
    cols = tl.arange(0, BLOCK_K // 2)
    ptrs = packed_ptr + (first // 2)[:, None] + cols[None, :]
    packed = tl.load(ptrs, mask=mask_n & (k // 2 + cols < K // 2)[None, :], other=0)  # [BLOCK_N, BLOCK_K // 2]
    groups = tl.arange(0, BLOCK_K // GROUP) * GROUP
    absmax = block_absmax(
        absmax_ptr, code_ptr, scale_ptr, offset_ptr, (first[:, None] + groups[None, :]) // BLOCK_SIZE,
        mask_n & (k + groups < K)[None, :], NESTED,
    )  # fmt: skip
    return scale_rows(decode(packed, FP4), absmax)


@triton.jit
def _linear4bit_small_fwd_kernel(
    x_ptr, packed_ptr, absmax_ptr, code_ptr, scale_ptr, offset_ptr, s_ptr, b_ptr, bias_ptr, lora_bias_ptr, out_ptr,
    M, N, K, R, span, stride_xm, stride_sm, stride_bn, stride_br, stride_split, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FP4: tl.constexpr, NESTED: tl.constexpr,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LORA_BIAS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    mask_m, mask_n = (rows < M)[None, :], (cols < N)[:, None]
    x_rows = x_ptr + rows[None, :] * stride_xm
    begin = split * span
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(begin, tl.minimum(begin + span, K), BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K))[:, None]
        x = tl.load(x_rows + offs_k, mask=mask_m & (offs_k < K), other=0.0)  # [BLOCK_K, BLOCK_M]
        w = _weight_tile(
            packed_ptr, absmax_ptr, code_ptr, scale_ptr, offset_ptr, cols.to(tl.int64), k, N, K,
            BLOCK_K, GROUP, BLOCK_SIZE, FP4, NESTED,
        )  # fmt: skip
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    if split == 0:
        if HAS_LORA:
            lora = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for r in tl.range(0, R, BLOCK_R, num_stages=1):
                offs_r = r + tl.arange(0, BLOCK_R)
                s_ptrs = s_ptr + rows[None, :] * stride_sm + offs_r[:, None]
                s = tl.load(s_ptrs, mask=mask_m & (offs_r < R)[:, None], other=0.0)  # [BLOCK_R, BLOCK_M]
                b_ptrs = b_ptr + cols[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
                b = tl.load(b_ptrs, mask=mask_n & (offs_r < R)[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
                lora = tl.dot(b.to(s.dtype), s, lora, input_precision="ieee")
            if HAS_LORA_BIAS:
                lora += tl.load(lora_bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
            acc += scale * lora
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    ptrs = out_ptr + split.to(tl.int64) * stride_split + rows[None, :] * N + cols[:, None]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m & mask_n)


@triton.jit
def _linear4bit_small_dx_kernel(
    dy_ptr, packed_ptr, absmax_ptr, code_ptr, scale_ptr, offset_ptr, dx_ptr, out_ptr, M, N, K, span, stride_dym,
    stride_split, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FP4: tl.constexpr, NESTED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_K
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
    cols = (first + tl.arange(0, BLOCK_K))[None, :]
    begin = split * span
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in range(begin, tl.minimum(begin + span, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        dy_ptrs = dy_ptr + rows * stride_dym + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=(rows < M) & (offs_n < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        w = _weight_tile(
            packed_ptr, absmax_ptr, code_ptr, scale_ptr, offset_ptr, offs_n.to(tl.int64), first, N, K,
            BLOCK_K, GROUP, BLOCK_SIZE, FP4, NESTED,
        )  # fmt: skip
        acc = tl.dot(dy, w.to(dy.dtype), acc, input_precision="ieee")
    offs = rows * K + cols
    mask = (rows < M) & (cols < K)
    if ADD and split == 0:
        acc += tl.load(dx_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + split.to(tl.int64) * stride_split + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _spans(device, dtype, mode, M, N, K, block_size, tile):
    """(tile with BLOCK_M and GROUP, output blocks, span, splits) of the mode."""
    block_m = rank_block(M, MAX_M)
    tile = {"BLOCK_M": block_m, **dict(tile or lookup_tile(TILES, arch_of(device), dtype, block_m, mode))}
    out_cols, depth, names = (N, K, ("BLOCK_N", "BLOCK_K")) if mode == "fwd" else (K, N, ("BLOCK_K", "BLOCK_N"))
    tile["GROUP"] = min(group_of(K, block_size), tile["BLOCK_K"])
    columns = -(-out_cols // tile[names[0]])
    # At most, not at least, TARGET_PROGRAMS: with few rows the second launch of a split costs more than idle SMs.
    span, splits = span_of(depth, TARGET_PROGRAMS // columns, tile[names[1]], 512)
    return tile, columns, span, splits


class _Plan(NamedTuple):
    start: Start
    splits: int
    total: Reduction | None


@plan
def _fwd_plan(
    device, M, N, K, R, dtype, b_dtype, bias_dtype, lora_bias_dtype, stride_xm, stride_sm, stride_b, weight_bytes,
    nested, quant_type, block_size, tile,
):  # fmt: skip
    """R is 0 without an adapter; the dtype of a missing bias is None."""
    tile, columns, span, splits = _spans(device, dtype, "fwd", M, N, K, block_size, tile)
    item = dtype.itemsize
    thin = sum(N * each.itemsize for each in (bias_dtype, lora_bias_dtype) if each is not None)
    launch = Launch(
        "linear4bit_small", 2 * M * N * (K + R),
        M * K * item + (M * R * item + N * R * b_dtype.itemsize if R else 0) + thin,
        M * N * item if splits == 1 else 0, weight_bytes, scratch_bytes((splits, M * N)),
    )  # fmt: skip
    flags = {"HAS_LORA": R > 0, "HAS_BIAS": bias_dtype is not None, "HAS_LORA_BIAS": lora_bias_dtype is not None}
    constants = {
        **tile, **packed_flags(nested, quant_type, block_size), **flags,
        "BLOCK_R": rank_block(R, MAX_BLOCK_R[dtype_key(dtype)]),
    }  # fmt: skip
    numbers = (M, N, K, R, span, stride_xm, stride_sm, *stride_b, M * N if splits > 1 else 0)
    start = Start(_linear4bit_small_fwd_kernel, (columns, splits), device, numbers, constants, launch)
    return _Plan(start, splits, reduction("linear4bit_small_reduce", device, (splits, M * N, dtype)))


def linear4bit_small(x, packed, scales, quant_type, block_size, N, s, b, bias, lora_bias, scale, *, tile=None):
    """y [M, N]; shapes as `small_unmet` requires, x with contiguous rows; b any float dtype and strides, or None."""
    M, K = x.shape
    R = 0 if b is None else b.shape[1]
    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    b, (bias, lora_bias) = b if b is None else narrow(b), dense(bias, lora_bias)
    s, b = (s, b) if R else (x, x)
    made = _fwd_plan(
        x.device, M, N, K, R, x.dtype, b.dtype, None if bias is None else bias.dtype,
        None if lora_bias is None else lora_bias.dtype, x.stride(0), s.stride(0) if R else 0,
        b.stride() if R else (0, 0), packed.numel() + scale_bytes(scales), nested(scales), quant_type, block_size,
        tile_key(tile),
    )  # fmt: skip
    out = split_output(y, made.splits)
    given = (
        x, packed, *scale_args(scales), s, b, x if bias is None else bias, x if lora_bias is None else lora_bias,
    )  # fmt: skip
    made.start((*given, out), (float(scale),), aligned(*given))
    if made.total is not None:
        made.total((out, y))
    return y


@plan
def _dx_plan(device, M, N, K, dtype, add, stride_dym, weight_bytes, nested, quant_type, block_size, tile):
    tile, columns, span, splits = _spans(device, dtype, "dx", M, N, K, block_size, tile)
    item = dtype.itemsize
    launch = Launch(
        "linear4bit_small_dx", 2 * M * N * K, (M * N + add * M * K) * item, M * K * item if splits == 1 else 0,
        weight_bytes, scratch_bytes((splits, M * K)),
    )  # fmt: skip
    constants = {**tile, **packed_flags(nested, quant_type, block_size), "ADD": add}
    numbers = (M, N, K, span, stride_dym, M * K if splits > 1 else 0)
    start = Start(_linear4bit_small_dx_kernel, (columns, splits), device, numbers, constants, launch)
    return _Plan(start, splits, reduction("linear4bit_small_dx_reduce", device, (splits, M * K, dtype)))


def linear4bit_small_dx(dy, packed, scales, quant_type, block_size, K, dx, *, tile=None):
    """dx [M, K] += dy w in place, or a new dx = dy w; shapes as `small_unmet` requires, dy with contiguous rows."""
    M, N = dy.shape
    add = dx is not None
    dx = dx if add else torch.empty((M, K), device=dy.device, dtype=dy.dtype)
    if dx.numel() == 0:
        return dx
    made = _dx_plan(
        dy.device, M, N, K, dy.dtype, add, dy.stride(0), packed.numel() + scale_bytes(scales), nested(scales),
        quant_type, block_size, tile_key(tile),
    )  # fmt: skip
    out = split_output(dx, made.splits)
    given = (dy, packed, *scale_args(scales), dx)
    made.start((*given, out), aligned=aligned(*given))
    if made.total is not None:
        made.total((out, dx))
    return dx
