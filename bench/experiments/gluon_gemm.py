"""y = x wᵀ + s bᵀ by a persistent, warp-specialised GEMM for Hopper in Gluon: one more K-step takes the rank-R product.

One warp asks for tiles by TMA, eight multiply; a barrier a slot says that it is full, another that it is free. s and b
are read as tiles of BLOCK_K columns, of which TMA fills those beyond R with zeros. Parity with the vendor's GEMM is the
condition for everything that would build on it.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TILE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "STAGES": 4}


@gluon.jit
def tile_origin(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(row, column) of an output tile: eight rows of tiles at a time, for their operands to stay in the L2."""
    columns = gl.cdiv(N, BLOCK_N)
    width = 8 * columns
    first = tile // width * 8
    rows = gl.minimum(gl.cdiv(M, BLOCK_M) - first, 8)
    return (first + tile % width % rows) * BLOCK_M, (tile % width // rows) * BLOCK_N


@gluon.jit
def store_halves(y_desc, acc, y_tile, m, n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The output tile in two parts through one buffer of half its width."""
    left, right = gl.split(gl.permute(gl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    tma.store_wait(0)
    y_tile.store(left.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(y_desc, [m, n], y_tile)
    tma.store_wait(0)
    y_tile.store(right.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(y_desc, [m, n + BLOCK_N // 2], y_tile)


@gluon.jit
def _produce(
    x_desc, w_desc, s_desc, b_desc, xs, ws, full, free, M, N, K, programs,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    steps = gl.cdiv(K, BLOCK_K)
    i = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), programs):
        m, n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
        for k in range(steps + 1):
            slot = i % STAGES
            mbarrier.wait(free.index(slot), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            if k < steps:
                tma.async_copy_global_to_shared(x_desc, [m, k * BLOCK_K], full.index(slot), xs.index(slot))
                tma.async_copy_global_to_shared(w_desc, [n, k * BLOCK_K], full.index(slot), ws.index(slot))
            else:
                tma.async_copy_global_to_shared(s_desc, [m, 0], full.index(slot), xs.index(slot))
                tma.async_copy_global_to_shared(b_desc, [n, 0], full.index(slot), ws.index(slot))
            i += 1


@gluon.jit
def _consume(
    y_desc, xs, ws, y_tile, full, free, M, N, K, programs,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    i = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), programs):
        m, n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, mma)
        for _ in range(gl.cdiv(K, BLOCK_K) + 1):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
            token = warpgroup_mma(xs.index(slot), ws.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
            mbarrier.arrive(free.index(slot), count=1)
            i += 1
        store_halves(y_desc, acc, y_tile, m, n, BLOCK_M, BLOCK_N)
    tma.store_wait(0)


@gluon.jit
def _gemm_kernel(
    x_desc, w_desc, s_desc, b_desc, y_desc, M, N, K, programs,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    y_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_N // 2], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_consume, (y_desc, xs, ws, y_tile, full, free, M, N, K, programs, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)),
            (_produce, (x_desc, w_desc, s_desc, b_desc, xs, ws, full, free, M, N, K, programs,
                        BLOCK_M, BLOCK_N, BLOCK_K, STAGES)),
        ],
        [1],
        [24],
    )  # fmt: skip


def descriptor(tensor: torch.Tensor, rows: int, columns: int, swizzle: int = 128) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)


def arguments(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> tuple:
    """The kernel's, up to the number of programs."""
    (M, K), (N, _) = x.shape, w.shape
    m, n, k = (TILE[f"BLOCK_{side}"] for side in "MNK")
    of = ((x, m, k), (w, n, k), (s, m, k), (b, n, k), (y, m, n // 2))
    return (*(descriptor(*each) for each in of), M, N, K)


def gemm(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, processors: int) -> torch.Tensor:
    """bf16; M, N and K multiples of the tile, s [M, R] and b [N, R] with R of 8 to BLOCK_K; b times the scale."""
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    tiles = -(-y.shape[0] // TILE["BLOCK_M"]) * -(-y.shape[1] // TILE["BLOCK_N"])
    programs = min(processors, tiles)
    _gemm_kernel[(programs,)](*arguments(x, w, s, b, y), programs, **TILE, num_warps=8)
    return y
