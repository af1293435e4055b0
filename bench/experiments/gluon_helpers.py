"""y = x wᵀ + (x aᵀ) bᵀ in one launch, Gluon for Hopper: four helper warps shrink while eight matrix warps multiply.

Each program's helpers take blocks of rows of s = x aᵀ and count them in a flag for each row of output tiles; a tile
waits for its flag before its last K-step. Every helper runs beside the tiles from the start and needs nothing of them,
and all programs are resident, so the wait ends. The matrix warps ask for their own tiles. p = 0 only.
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

from experiments.gluon_gemm import descriptor, store_halves, tile_origin

# UNIT_M x UNIT_K: what a helper step takes of x, HELP_STAGES deep.
TILE = {
    "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "STAGES": 3, "R": 16, "UNIT_M": 64, "UNIT_K": 64, "HELP_STAGES": 4,
}  # fmt: skip


@gluon.jit
def _ask(
    x_desc, w_desc, xs, ws, full, slot, m, n, k, wanted,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(full.index(slot), (BLOCK_M + BLOCK_N) * BLOCK_K * 2, pred=wanted)
    tma.async_copy_global_to_shared(x_desc, [m, k], full.index(slot), xs.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(w_desc, [n, k], full.index(slot), ws.index(slot), pred=wanted)


@gluon.jit
def _multiply(
    x_desc, w_desc, b_desc, y_desc, s_ptr, flag_ptr, xs, ws, b_tile, y_tile, full, b_full, M, N, K, programs,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, R: gl.constexpr,
    UNIT_M: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(K, BLOCK_K)
    first = gl.program_id(0)
    total = gl.maximum(gl.cdiv(tiles - first, programs), 0) * steps
    for ahead in gl.static_range(STAGES - 1):
        m, n = tile_origin(first + ahead // steps * programs, M, N, BLOCK_M, BLOCK_N)
        k = ahead % steps * BLOCK_K
        _ask(x_desc, w_desc, xs, ws, full, ahead, m, n, k, ahead < total, BLOCK_M, BLOCK_N, BLOCK_K)
    i = 0
    for tile in range(first, tiles, programs):
        m, n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, mma)
        for _ in range(steps):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
            token = warpgroup_mma(xs.index(slot), ws.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
            gl.thread_barrier()
            later = i + STAGES - 1
            m2, n2 = tile_origin(first + later // steps * programs, M, N, BLOCK_M, BLOCK_N)
            k2 = later % steps * BLOCK_K
            _ask(x_desc, w_desc, xs, ws, full, later % STAGES, m2, n2, k2, later < total, BLOCK_M, BLOCK_N, BLOCK_K)
            i += 1
        mbarrier.expect(b_full.index(0), BLOCK_N * R * 2)
        tma.async_copy_global_to_shared(b_desc, [n, 0], b_full.index(0), b_tile)
        while gl.atomic_add(flag_ptr + m // BLOCK_M, 0, sem="acquire") < BLOCK_M // UNIT_M:
            pass
        rows = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, operand))
        columns = gl.arange(0, R, layout=gl.SliceLayout(0, operand))
        s = gl.load(s_ptr + rows[:, None] * R + columns[None, :], cache_modifier=".cg")  # not from an L1 of before
        mbarrier.wait(b_full.index(0), (tile - first) // programs & 1)
        token = warpgroup_mma(s, b_tile.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
        store_halves(y_desc, acc, y_tile, m, n, BLOCK_M, BLOCK_N)
    tma.store_wait(0)


@gluon.jit
def _ask_unit(
    x_desc, a_desc, xs, a_tiles, full, i, unit, k,
    UNIT_M: gl.constexpr, UNIT_K: gl.constexpr, R: gl.constexpr, HELP_STAGES: gl.constexpr,
):  # fmt: skip
    """Step k of a unit, the i-th that this helper asks for."""
    slot = i % HELP_STAGES
    mbarrier.expect(full.index(slot), (UNIT_M + R) * UNIT_K * 2)
    tma.async_copy_global_to_shared(x_desc, [unit * UNIT_M, k * UNIT_K], full.index(slot), xs.index(slot))
    tma.async_copy_global_to_shared(a_desc, [0, k * UNIT_K], full.index(slot), a_tiles.index(slot))


@gluon.jit
def _shrink(
    x_desc, a_desc, s_ptr, flag_ptr, xs, a_tiles, full, M, K, programs,
    BLOCK_M: gl.constexpr, UNIT_M: gl.constexpr, UNIT_K: gl.constexpr, R: gl.constexpr, HELP_STAGES: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, R, 16]
    )
    steps = gl.cdiv(K, UNIT_K)
    i = 0
    for unit in range(gl.program_id(0), M // UNIT_M, programs):
        acc = gl.zeros((UNIT_M, R), gl.float32, mma)
        for ahead in gl.static_range(HELP_STAGES - 1):
            _ask_unit(x_desc, a_desc, xs, a_tiles, full, i + ahead, unit, ahead, UNIT_M, UNIT_K, R, HELP_STAGES)
        for k in range(steps):
            if k + HELP_STAGES - 1 < steps:
                later = HELP_STAGES - 1
                _ask_unit(x_desc, a_desc, xs, a_tiles, full, i + later, unit, k + later, UNIT_M, UNIT_K, R, HELP_STAGES)
            slot = i % HELP_STAGES
            mbarrier.wait(full.index(slot), (i // HELP_STAGES) & 1)
            token = warpgroup_mma(xs.index(slot), a_tiles.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
            i += 1
        rows = unit * UNIT_M + gl.arange(0, UNIT_M, layout=gl.SliceLayout(1, mma))
        columns = gl.arange(0, R, layout=gl.SliceLayout(0, mma))
        gl.store(s_ptr + rows[:, None] * R + columns[None, :], acc.to(gl.bfloat16))
        gl.thread_barrier()
        gl.atomic_add(flag_ptr + unit * UNIT_M // BLOCK_M, 1, sem="release")


@gluon.jit
def _gemm_helped_kernel(
    x_desc, w_desc, b_desc, y_desc, x_unit_desc, a_desc, s_ptr, flag_ptr, M, N, K, programs,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, R: gl.constexpr,
    UNIT_M: gl.constexpr, UNIT_K: gl.constexpr, HELP_STAGES: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    b_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_N, R], b_desc.layout)
    y_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_N // 2], y_desc.layout)
    units = gl.allocate_shared_memory(gl.bfloat16, [HELP_STAGES, UNIT_M, UNIT_K], x_unit_desc.layout)
    a_tiles = gl.allocate_shared_memory(gl.bfloat16, [HELP_STAGES, R, UNIT_K], a_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    b_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    unit_full = gl.allocate_shared_memory(gl.int64, [HELP_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(HELP_STAGES):
        mbarrier.init(unit_full.index(i), count=1)
    mbarrier.init(b_full.index(0), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_multiply, (x_desc, w_desc, b_desc, y_desc, s_ptr, flag_ptr, xs, ws, b_tile, y_tile, full, b_full,
                         M, N, K, programs, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, R, UNIT_M)),
            (_shrink, (x_unit_desc, a_desc, s_ptr, flag_ptr, units, a_tiles, unit_full, M, K, programs,
                       BLOCK_M, UNIT_M, UNIT_K, R, HELP_STAGES)),
        ],
        [4],
        [168],
    )  # fmt: skip


def arguments(x, w, a, b, y, s, flags) -> tuple:
    """The kernel's, up to the number of programs."""
    (M, K), (N, _) = x.shape, w.shape
    m, n, k = (TILE[f"BLOCK_{side}"] for side in "MNK")
    R, unit_m, unit_k = TILE["R"], TILE["UNIT_M"], TILE["UNIT_K"]
    of = ((x, m, k), (w, n, k), (b, n, R, 32), (y, m, n // 2), (x, unit_m, unit_k), (a, R, unit_k))
    return (*(descriptor(*each) for each in of), s, flags, M, N, K)


def gemm_helped(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, processors: int) -> torch.Tensor:
    """bf16; M, N and K multiples of the tile, R = 16; b times the scale. One program a processor, all at once."""
    M, N = x.shape[0], w.shape[0]
    y, s = (torch.empty(M, width, dtype=x.dtype, device=x.device) for width in (N, TILE["R"]))
    flags = torch.zeros(M // TILE["BLOCK_M"], dtype=torch.int32, device=x.device)
    _gemm_helped_kernel[(processors,)](*arguments(x, w, a, b, y, s, flags), processors, **TILE, num_warps=8)
    return y
