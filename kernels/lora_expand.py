"""y = bias + scale * (s bᵀ + lora_bias), and y += scale * s bᵀ in place: the wide product of LoRA beside any base op.

s [M, R], b [N, R], bias and lora_bias [N], y [M, N] in s.dtype. Written before the base GEMM, which runs with beta = 1.
Fused: both biases, the scale, the cast of b. Not stored: s bᵀ.
Memory-bound. Floor: MN elements written (and read, in place), MR + NR read, 2MNR FLOP.
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3.
"""

# ruff: noqa: C408 (tile tables are written with dict())

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    capped,
    dense,
    lookup_tile,
    narrow,
    ragged,
    rank_block,
    tile_key,
    tile_product,
)  # fmt: skip
from fastpeft.kernels._launch import Launch, Start, aligned, arch_of, plan

MODES = ("plain",)
MAX_BLOCK_R = 64
# tiles: begin
TILES = {
    (80, "half", "plain", 16): dict(BLOCK_M=32, BLOCK_N=128, num_warps=4, num_stages=2),
    (80, "half", "plain", 64): dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
    (80, "float32", "plain", 64): dict(BLOCK_M=32, BLOCK_N=64, num_warps=8, num_stages=1),
    (90, "half", "plain", 16): dict(BLOCK_M=64, BLOCK_N=256, num_warps=4, num_stages=2),
    (90, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_N=256, num_warps=8, num_stages=2),
    (100, "half", "plain", 64): dict(BLOCK_M=64, BLOCK_N=256, num_warps=8, num_stages=2),
}
# tiles: end


def tile_space(arch, dtype, R, mode="plain"):
    """Candidate tiles."""
    return tile_product(BLOCK_M=(32, 64, 128), BLOCK_N=(64, 128, 256), num_warps=(4, 8), num_stages=(2,))


@triton.jit
def _lora_expand_kernel(
    y_ptr, s_ptr, b_ptr, bias_ptr, lora_bias_ptr, M, N, R, stride_ym, stride_sm, stride_bn, stride_br, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LORA_BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs write neighbouring columns of the same rows, so they share those rows of s in L2.
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = (rows < M)[:, None]
    mask_n = cols < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + rows[:, None] * stride_sm + offs_r[None, :], mask=mask_m & (offs_r < R)[None, :], other=0.0)
        b_ptrs = b_ptr + cols[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br
        b = tl.load(b_ptrs, mask=mask_n[None, :] & (offs_r < R)[:, None], other=0.0).to(s.dtype)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s, b, acc, input_precision="ieee")
    if HAS_LORA_BIAS:
        acc += tl.load(lora_bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    acc *= scale
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
    mask = mask_m & mask_n[None, :]
    if ADD:
        acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@plan
def _plan(
    name, device, M, N, R, dtype, b_dtype, bias_dtype, lora_bias_dtype, stride_ym, stride_sm, stride_b, even, tile
):
    """One `Start`. The dtype of a missing bias is None; even: as in `ragged`."""
    if tile is None:
        tile = lookup_tile(TILES, arch_of(device), dtype, R)
        tile = capped(tile, BLOCK_M=32, BLOCK_N=128) if ragged(even, N, stride_ym) else tile
    tile = dict(tile)
    add, biases = name == "lora_expand_add", [each for each in (bias_dtype, lora_bias_dtype) if each is not None]
    item = dtype.itemsize
    read = (M * R + add * M * N) * item + N * R * b_dtype.itemsize + sum(N * each.itemsize for each in biases)
    flags = {"HAS_BIAS": bias_dtype is not None, "HAS_LORA_BIAS": lora_bias_dtype is not None, "ADD": add}
    constants = {**tile, "BLOCK_R": rank_block(R, MAX_BLOCK_R), **flags}
    grid = (-(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"]),)
    numbers = (M, N, R, stride_ym, stride_sm, *stride_b)
    return Start(_lora_expand_kernel, grid, device, numbers, constants, Launch(name, 2 * M * N * R, read, M * N * item))


def _launch(name, y, s, b, bias, lora_bias, scale, tile):
    (M, N), R = y.shape, s.shape[1]
    if M == 0 or N == 0:
        return
    b, (bias, lora_bias) = narrow(b), dense(bias, lora_bias)
    bias_ptr, lora_bias_ptr = s if bias is None else bias, s if lora_bias is None else lora_bias
    even = aligned(y, s, b, bias_ptr, lora_bias_ptr)
    start = _plan(
        name, y.device, M, N, R, y.dtype, b.dtype, None if bias is None else bias.dtype,
        None if lora_bias is None else lora_bias.dtype, y.stride(0), s.stride(0), b.stride(), even, tile_key(tile),
    )  # fmt: skip
    start((y, s, b, bias_ptr, lora_bias_ptr), (float(scale),), even)


def lora_expand(s, b, bias, lora_bias, scale, *, tile=None):
    """y [M, N] = bias + scale * (s bᵀ + lora_bias); biases ([N] or None) and b in any float dtype and strides."""
    y = torch.empty((s.shape[0], b.shape[0]), device=s.device, dtype=s.dtype)
    _launch("lora_expand", y, s, b, bias, lora_bias, scale, tile)
    return y


def lora_expand_add(y, s, b, scale, *, tile=None):
    """y [M, N] += scale * s bᵀ in place; y with contiguous rows and any row stride."""
    _launch("lora_expand_add", y, s, b, None, None, scale, tile)
