"""A LoRA linear's forward, and its backward, in one persistent Triton launch each, p = 0: units of unlike work.

Programs take work from an atomic counter. Forward: blocks of rows of s = x aᵀ, then tiles of y = x wᵀ + s bᵀ.
Backward: blocks of rows of ds = scale dy b, with db; then tiles of dx = dy w + ds a; then blocks of da. A tile waits
for the flag of its rows before its last K-step: units come before the tiles that need them and all programs are
resident, so the wait ends. db and da are sums by atomics, whose order is not fixed: not the same bytes twice, which is
one reason why it is no operator's.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

TILE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
UNIT_M, UNIT_K, DA_M, DA_K = 64, 128, 512, 128


@triton.jit
def _tile_at(tile, rows, columns):
    """(row, column) of tiles, eight rows at a time."""
    width = 8 * columns
    first = tile // width * 8
    size = min(rows - first, 8)
    return first + tile % width % size, tile % width // size


@triton.jit
def _store_halves(out_desc, acc, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    out_desc.store([m, n], left.to(out_desc.dtype))
    out_desc.store([m, n + BLOCK_N // 2], right.to(out_desc.dtype))


@triton.jit
def _wait(flag_ptr, wanted):
    while tl.atomic_add(flag_ptr, 0, sem="acquire") < wanted:
        pass


@triton.jit
def _forward_kernel(
    x_desc, w_desc, b_desc, y_desc, x_ptr, a_ptr, s_ptr, sync_ptr, M, N, K, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNIT_M: tl.constexpr, UNIT_K: tl.constexpr,
):  # fmt: skip
    """sync_ptr: the counter, then a flag for each row of tiles."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    units = M // UNIT_M
    offs_r = tl.arange(0, R)
    work = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    while work < units + rows * columns:
        if work < units:
            offs_m = work * UNIT_M + tl.arange(0, UNIT_M)
            unit = tl.zeros((UNIT_M, R), tl.float32)
            for k in range(0, K, UNIT_K):
                offs_k = k + tl.arange(0, UNIT_K)
                x = tl.load(x_ptr + offs_m[:, None].to(tl.int64) * K + offs_k[None, :])
                a = tl.load(a_ptr + offs_r[None, :] * K + offs_k[:, None]).to(x.dtype)
                unit = tl.dot(x, a, unit)
            tl.store(s_ptr + offs_m[:, None] * R + offs_r[None, :], unit.to(s_ptr.dtype.element_ty))
            tl.debug_barrier()
            tl.atomic_add(sync_ptr + 1 + work // (BLOCK_M // UNIT_M), 1, sem="release")
        else:
            row, column = _tile_at(work - units, rows, columns)
            m, n = row * BLOCK_M, column * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, K, BLOCK_K):
                acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc)
            _wait(sync_ptr + 1 + row, BLOCK_M // UNIT_M)
            s = tl.load(s_ptr + (m + tl.arange(0, BLOCK_M))[:, None] * R + offs_r[None, :], cache_modifier=".cg")
            acc = tl.dot(s, b_desc.load([n, 0]).T, acc)
            _store_halves(y_desc, acc, m, n, BLOCK_M, BLOCK_N)
        work = tl.atomic_add(sync_ptr, 1, sem="relaxed")


@triton.jit
def _backward_kernel(
    dy_desc, w_desc, a_desc, dx_desc, dy_ptr, x_ptr, b_ptr, s_ptr, ds_ptr, da_ptr, db_ptr, sync_ptr, scale, M, N, K,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNIT_M: tl.constexpr,
    UNIT_N: tl.constexpr, DA_M: tl.constexpr, DA_K: tl.constexpr,
):  # fmt: skip
    """da [R, K] and db [R, N] fp32, zero before."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    units, tiles = M // UNIT_M, rows * columns
    offs_r = tl.arange(0, R)
    work = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    while work < units + tiles + (M // DA_M) * (K // DA_K):
        if work < units:
            offs_m = work * UNIT_M + tl.arange(0, UNIT_M)
            s = tl.load(s_ptr + offs_m[None, :] * R + offs_r[:, None])
            ds = tl.zeros((UNIT_M, R), tl.float32)
            for n in range(0, N, UNIT_N):
                offs_n = n + tl.arange(0, UNIT_N)
                dy = tl.load(dy_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :])
                b = tl.load(b_ptr + offs_n[:, None] * R + offs_r[None, :]).to(dy.dtype)
                ds = tl.dot(dy, b, ds)
                tl.atomic_add(db_ptr + offs_r[:, None] * N + offs_n[None, :], scale * tl.dot(s, dy), sem="relaxed")
            tl.store(ds_ptr + offs_m[:, None] * R + offs_r[None, :], (scale * ds).to(ds_ptr.dtype.element_ty))
            tl.debug_barrier()
            tl.atomic_add(sync_ptr + 1 + work // (BLOCK_M // UNIT_M), 1, sem="release")
        elif work < units + tiles:
            row, column = _tile_at(work - units, rows, columns)
            m, k = row * BLOCK_M, column * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for n in range(0, N, BLOCK_K):
                acc = tl.dot(dy_desc.load([m, n]), w_desc.load([n, k]), acc)
            _wait(sync_ptr + 1 + row, BLOCK_M // UNIT_M)
            ds = tl.load(ds_ptr + (m + tl.arange(0, BLOCK_M))[:, None] * R + offs_r[None, :], cache_modifier=".cg")
            acc = tl.dot(ds, a_desc.load([0, k]), acc)
            _store_halves(dx_desc, acc, m, k, BLOCK_M, BLOCK_N)
        else:
            block = work - units - tiles
            first = block // (K // DA_K) * DA_M
            offs_k = block % (K // DA_K) * DA_K + tl.arange(0, DA_K)
            da = tl.zeros((R, DA_K), tl.float32)
            for m in range(first, first + DA_M, 64):
                _wait(sync_ptr + 1 + m // BLOCK_M, BLOCK_M // UNIT_M)
                offs_m = m + tl.arange(0, 64)
                x = tl.load(x_ptr + offs_m[:, None].to(tl.int64) * K + offs_k[None, :])
                ds = tl.load(ds_ptr + offs_m[None, :] * R + offs_r[:, None], cache_modifier=".cg")
                da = tl.dot(ds, x, da)
            tl.atomic_add(da_ptr + offs_r[:, None] * K + offs_k[None, :], da, sem="relaxed")
        work = tl.atomic_add(sync_ptr, 1, sem="relaxed")


def _sync(M: int, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1 + M // TILE["BLOCK_M"], dtype=torch.int32, device=like.device)


def forward(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, processors: int) -> tuple:
    """(y, s); sizes multiples of the tile, a [R, K] any float dtype, b [N, R] of x's with the scale in it."""
    (M, K), (N, R) = x.shape, b.shape
    m, n, k = (TILE[f"BLOCK_{side}"] for side in "MNK")
    y, s = (torch.empty(M, width, dtype=x.dtype, device=x.device) for width in (N, R))
    of = ((x, [m, k]), (w, [n, k]), (b, [n, R]), (y, [m, n // 2]))
    descriptors = (TensorDescriptor.from_tensor(*each) for each in of)
    _forward_kernel[(processors,)](
        *descriptors, x, a, s, _sync(M, x), M, N, K, R, **TILE, UNIT_M=UNIT_M, UNIT_K=UNIT_K, num_warps=8, num_stages=3
    )
    return y, s


def backward(dy, x, w, a, b, s, scale: float, processors: int) -> tuple:
    """(dx, da, dbᵀ); a [R, K] and b [N, R] of x's dtype, without the scale; s = x aᵀ."""
    (M, K), (N, R) = x.shape, b.shape
    m, n, k = (TILE[f"BLOCK_{side}"] for side in "MNK")
    dx, ds = (torch.empty(M, width, dtype=x.dtype, device=x.device) for width in (K, R))
    da, db = (torch.zeros(R, width, dtype=torch.float32, device=x.device) for width in (K, N))
    of = ((dy, [m, k]), (w, [k, n]), (a, [R, n]), (dx, [m, n // 2]))
    descriptors = (TensorDescriptor.from_tensor(*each) for each in of)
    _backward_kernel[(processors,)](
        *descriptors, dy, x, b, s, ds, da, db, _sync(M, x), scale, M, N, K, R, **TILE, UNIT_M=UNIT_M, UNIT_N=UNIT_K,
        DA_M=DA_M, DA_K=DA_K, num_warps=8, num_stages=3,
    )  # fmt: skip
    return dx, da, db
