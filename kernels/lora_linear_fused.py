"""y = x wᵀ + scale * (s bᵀ + lora_bias) + bias and dx = dy w + mask ∘ (ds a) / keep, each one persistent GEMM.

x [M, K], w [N, K], s and ds [M, R], a [R, K], b [N, R], y and dy [M, N]; fp16 or bf16, sums in fp32.
The accumulator starts from the rank-R product, scaled or masked in fp32, and then adds the base product; so nothing is
rounded in between, and neither s bᵀ nor the mask is stored. The tiles of x, w and y move through TMA descriptors, the
rank-R operands through pointers, in any stride and dtype.
Compute-bound. Floor of forward: MK + NK elements read, MN written, 2MNK + 2MNR FLOP; of dx: MN + NK read, MK written.
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3.
"""

# ruff: noqa: C408 (tile tables: dict() calls, one entry a line)

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpeft.kernels._common import (
    dense,
    lookup_tile,
    narrow,
    rank_block,
    tile_key,
    tile_product,
)  # fmt: skip
from fastpeft.kernels._cost import FUSED_NEEDS, fused_serves
from fastpeft.kernels._launch import Launch, Start, aligned, arch_of, plan, sm_count
from fastpeft.kernels.dropout import dropout_args, keep_bytes

MODES = ("fwd", "dx")
MAX_BLOCK_R = 16  # of one unpipelined step; with the mask, 32 spills (Triton 3.6)
# tiles: begin
TILES = {
    (90, "half", "fwd", 64): dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, HALVES=1, num_warps=8, num_stages=3),
    (90, "half", "dx", 64): dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, HALVES=1, num_warps=8, num_stages=3),
    (100, "half", "fwd", 64): dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, HALVES=1, num_warps=8, num_stages=3),
    (100, "half", "dx", 64): dict(BLOCK_M=64, BLOCK_N=256, BLOCK_K=64, HALVES=1, num_warps=8, num_stages=3),
}
# tiles: end


def tile_space(arch, dtype, R, mode):
    """Candidate tiles; dx needs BLOCK_N = 256, one dropout group. HALVES stores the output tile in two parts."""
    return tile_product(
        BLOCK_M=(128,), BLOCK_N=(256,), BLOCK_K=(64,), HALVES=(1, 0), num_warps=(8,), num_stages=(3, 4),
    )  # fmt: skip


def _row_stride(t):
    """A row stride for TMA: a single row may carry any stride, but TMA still checks it."""
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]


def gpus_unmet():
    """What the GPUs of this machine lack for the fused GEMM; None if one of them can run it, as `fuse_unmet` needs."""
    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return f"a GPU of {FUSED_NEEDS}" if found and not any(map(fused_serves, found)) else None


def fuse_unmet(x, w, name="x"):
    """Why the fused GEMM cannot take x [M, K] (or dy [M, N]) with w [N, K], as (argument, rule, value); None if it can.

    TMA reads x, which an error calls `name`, and w: base address and row stride must be 16-byte aligned, rows
    contiguous; the same holds for the output.
    """
    arch = arch_of(x)
    if not fused_serves(arch):
        return name, f"be on a GPU of {FUSED_NEEDS}", f"{arch // 10}.{arch % 10}"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return name, "be fp16 or bf16", x.dtype
    if w.dtype != x.dtype:
        return "w", f"have the dtype of {name}, {x.dtype}", w.dtype
    for side, length in (("N", w.shape[0]), ("K", w.shape[1])):
        if length % 8 or length == 0:
            return "w", f"have a positive multiple of 8 (16-byte rows for TMA) as {side}", length
    for argument, t in ((name, x), ("w", w)):
        if t.stride(1) != 1:
            return argument, "have contiguous rows", f"strides {tuple(t.stride())}"
        if _row_stride(t) % 8 or _row_stride(t) < t.shape[1]:
            return argument, "have a row stride that is a multiple of 8 and at least its row", t.stride(0)
        if not t.is_meta and t.data_ptr() % 16:
            return argument, "start at a multiple of 16 bytes", f"address {t.data_ptr():#x}"
    return None


def can_fuse(x, w):
    """`fuse_unmet` in words; an empty string where it serves."""
    unmet = fuse_unmet(x, w)
    return "needs {} to {}, got {}".format(*unmet) if unmet else ""


@triton.jit
def _tile_origin(tile, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row tile, column tile), eight row tiles at a time, so that a wave of programs shares its operands in L2."""
    tiles_n = tl.cdiv(cols, BLOCK_N)
    width = 8 * tiles_n
    first = tile // width * 8
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, 8)
    return first + tile % width % size, tile % width // size


@triton.jit
def _rank_product(
    s_ptr, b_ptr, rows, cols, M, N, R, stride_sm, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s bᵀ [BLOCK_M, BLOCK_N] in fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Not pipelined, because the buffers of the base product fill the shared memory.
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        s_ptrs = s_ptr + rows[:, None] * stride_sm + offs_r[None, :]
        s = tl.load(s_ptrs, mask=(rows < M)[:, None] & (offs_r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        b_ptrs = b_ptr + cols[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br
        b = tl.load(b_ptrs, mask=(cols < N)[None, :] & (offs_r < R)[:, None], other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s, b.to(s.dtype), acc)
    return acc


@triton.jit
def _store_tile(y_desc, acc, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """Two stores of half the columns need half the staging memory, which makes room for a pipeline stage."""
    if HALVES:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        y_desc.store([m, n], left.to(y_desc.dtype))
        y_desc.store([m, n + BLOCK_N // 2], right.to(y_desc.dtype))
    else:
        y_desc.store([m, n], acc.to(y_desc.dtype))


# No instruction depends on whether 16 divides M: TMA masks.
@triton.jit(do_not_specialize=["M", "programs"])
def _lora_linear_fused_fwd_kernel(
    x_desc, w_desc, y_desc, s_ptr, b_ptr, bias_ptr, lora_bias_ptr, M, N, K, R, stride_sm, stride_bn, stride_br,
    programs, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LORA_BIAS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, programs):
        pid_m, pid_n = _tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        rows = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        cols = n + tl.arange(0, BLOCK_N)
        acc = _rank_product(
            s_ptr, b_ptr, rows, cols, M, N, R, stride_sm, stride_bn, stride_br, BLOCK_M, BLOCK_N, BLOCK_R
        )
        acc *= scale
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([m, k])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([n, k])  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x, w.T, acc)
        if HAS_LORA_BIAS:
            acc += scale * tl.load(lora_bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        _store_tile(y_desc, acc, m, n, BLOCK_M, BLOCK_N, HALVES)


@triton.jit(do_not_specialize=["M", "threshold", "programs"], do_not_specialize_on_alignment=["seed_ptr"])
def _lora_linear_fused_dx_kernel(
    dy_desc, w_desc, dx_desc, ds_ptr, a_ptr, seed_ptr, M, N, K, R, stride_dsm, stride_ar, stride_ak, threshold, factor,
    programs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N runs over the K columns of dx, BLOCK_K over the reduction length N."""
    if DROPOUT:
        seed = tl.load(seed_ptr)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, programs):
        pid_m, pid_k = _tile_origin(tile, M, K, BLOCK_M, BLOCK_N)
        m, k = pid_m * BLOCK_M, pid_k * BLOCK_N
        rows = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        cols = k + tl.arange(0, BLOCK_N)
        acc = _rank_product(
            ds_ptr, a_ptr, rows, cols, M, K, R, stride_dsm, stride_ak, stride_ar, BLOCK_M, BLOCK_N, BLOCK_R
        )
        if DROPOUT:
            shifts = tl.arange(0, 8).to(tl.uint8)[None, None, :]
            bits = (keep_bytes(seed, rows, k, threshold, BLOCK_N)[:, :, None] >> shifts) & 1
            acc = tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0, acc * factor, 0.0)
        for n in range(0, N, BLOCK_K):
            dy = dy_desc.load([m, n])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([n, k])  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(dy, w, acc)
        _store_tile(dx_desc, acc, m, k, BLOCK_M, BLOCK_N, HALVES)


def _descriptor(shape, stride, dtype, block):
    """A TMA descriptor of rows `stride` apart, without memory; Triton's constructor checks it once for all calls."""
    made = TensorDescriptor(torch.empty(0, dtype=dtype), list(shape), [stride, 1], block)
    made.base = None
    return made


def _descriptors(templates, *tensors):
    """The templates on the memory of `tensors`; asserts what `fuse_unmet` checks, for graphs that skip that check."""
    assert aligned(*tensors), "TMA reads from multiples of 16 bytes"
    out = []
    for template, tensor in zip(templates, tensors, strict=True):
        assert tensor.stride(1) == 1, "TMA reads contiguous rows"
        made = object.__new__(TensorDescriptor)
        made.__dict__.update(template.__dict__)
        made.base = tensor
        out.append(made)
    return out


@plan
def _fwd_plan(device, M, N, K, R, dtype, b_dtype, bias_dtype, lora_bias_dtype, strides, stride_b, tile):
    """(Start, descriptors of x, w and y); the dtype of a missing bias is None; strides: of x, w, s."""
    tile = dict(tile or lookup_tile(TILES, arch_of(device), dtype, R, "fwd"))
    item = dtype.itemsize
    thin = sum(N * each.itemsize for each in (bias_dtype, lora_bias_dtype) if each is not None)
    launch = Launch(
        "lora_linear_fused_fwd", 2 * M * N * (K + R), (M * K + M * R) * item + N * R * b_dtype.itemsize + thin,
        M * N * item, weight_bytes=N * K * item,
    )  # fmt: skip
    programs = min(sm_count(device), -(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"]))
    flags = {"HAS_BIAS": bias_dtype is not None, "HAS_LORA_BIAS": lora_bias_dtype is not None}
    constants = {**tile, "BLOCK_R": rank_block(R, MAX_BLOCK_R), **flags}
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    descriptors = (
        _descriptor((M, K), strides[0], dtype, [m, k]), _descriptor((N, K), strides[1], dtype, [n, k]),
        _descriptor((M, N), N, dtype, [m, n // 2 if tile["HALVES"] else n]),
    )  # fmt: skip
    numbers = (M, N, K, R, strides[2], *stride_b, programs)
    return Start(_lora_linear_fused_fwd_kernel, (programs,), device, numbers, constants, launch), descriptors


def lora_linear_fused_fwd(x, w, s, b, bias, lora_bias, scale, *, tile=None):
    """y [M, N] = x wᵀ + scale * (s bᵀ + lora_bias) + bias; x, w pass `fuse_unmet`; b any float dtype and strides."""
    (M, K), (N, R) = x.shape, b.shape
    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    b, (bias, lora_bias) = narrow(b), dense(bias, lora_bias)
    start, descriptors = _fwd_plan(
        x.device, M, N, K, R, x.dtype, b.dtype, None if bias is None else bias.dtype,
        None if lora_bias is None else lora_bias.dtype, (_row_stride(x), _row_stride(w), s.stride(0)), b.stride(),
        tile_key(tile),
    )  # fmt: skip
    thin = (s, b, s if bias is None else bias, s if lora_bias is None else lora_bias)
    start((*_descriptors(descriptors, x, w, y), *thin), (float(scale),), aligned(*thin))
    return y


@plan
def _dx_plan(device, M, N, K, R, dtype, a_dtype, p, strides, stride_a, tile):
    """(Start, descriptors of dy, w and dx, whether there is dropout); strides: of dy, w, ds."""
    threshold, factor = dropout_args(p)
    tile = dict(tile or lookup_tile(TILES, arch_of(device), dtype, R, "dx"))
    item = dtype.itemsize
    launch = Launch(
        "lora_linear_fused_dx", 2 * M * K * (N + R), (M * N + M * R) * item + R * K * a_dtype.itemsize, M * K * item,
        weight_bytes=N * K * item,
    )  # fmt: skip
    programs = min(sm_count(device), -(-M // tile["BLOCK_M"]) * -(-K // tile["BLOCK_N"]))
    constants = {**tile, "BLOCK_R": rank_block(R, MAX_BLOCK_R), "DROPOUT": threshold > 0}
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    descriptors = (
        _descriptor((M, N), strides[0], dtype, [m, k]), _descriptor((N, K), strides[1], dtype, [k, n]),
        _descriptor((M, K), K, dtype, [m, n // 2 if tile["HALVES"] else n]),
    )  # fmt: skip
    numbers = (M, N, K, R, strides[2], *stride_a, threshold, factor, programs)
    start = Start(_lora_linear_fused_dx_kernel, (programs,), device, numbers, constants, launch)
    return start, descriptors, threshold > 0


def lora_linear_fused_dx(dy, w, ds, a, p, seed, *, tile=None):
    """dx [M, K] = dy w + mask ∘ (ds a) / keep; dy and w pass `fuse_unmet`; a any float dtype and strides."""
    (M, N), (R, K) = dy.shape, a.shape
    dx = torch.empty((M, K), device=dy.device, dtype=dy.dtype)
    if dx.numel() == 0:
        return dx
    a = narrow(a)
    strides = _row_stride(dy), _row_stride(w), ds.stride(0)
    start, descriptors, dropout = _dx_plan(
        dy.device, M, N, K, R, dy.dtype, a.dtype, p, strides, a.stride(), tile_key(tile)
    )
    pointers = (*_descriptors(descriptors, dy, w, dx), ds, a, seed if dropout else ds)
    start(pointers, aligned=aligned(ds, a))
    return dx
