"""Shared by all Triton kernels of fastpeft: tile lookup, the split reduction.

Tuner interface. Every kernel module exposes
  `TILES`                                a dict literal between the comments `# tiles: begin` and `# tiles: end`,
                                         one entry per line, so that a tuner can rewrite it mechanically;
                                         key (arch or device name, "half" | "float32", mode, largest rank
                                         served), value a tile dict
  `tile_space(arch, dtype, R, mode)`     candidate tile dicts for that key, each compilable on its own
  `<launcher>(..., *, tile=dict)`        runs with that tile instead of the table's
A mode is a variant of one kernel that needs its own tile ("plain", "dropout", ...), named in the module's `MODES`.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastpeft.kernels._launch import Launch, Start, kept_with_plans, record

MAX_SPLITS = 32  # keeps partial buffers at a few per cent of the operand that is read
# A pass is split into at most two programs for each of an H100's 132 SMs: one program more would start an almost empty
# second wave. These are constants so that splits depend on the shape only.
TARGET_PROGRAMS = 264  # of four warps
LEAST_PROGRAMS = 120  # for a pass that is split only if it has fewer; almost every SM then has one

_HALF = (torch.float16, torch.bfloat16)


def dtype_key(dtype):
    return "half" if dtype in _HALF else "float32"


def lookup_tile(tiles, arch, dtype, R, mode="plain"):
    """The table's tile: by the device's name, else by the nearest lower arch that has this dtype and mode; of those,
    the smallest rank bucket that holds R.

    A rank beyond the last bucket uses the last. sm_86 and sm_89 use the entries of sm_80, which therefore fit 99 KB of
    shared memory; so do sm_120 and above, consumer parts with 99 KB and neither wgmma nor tcgen05.
    """
    found = _found.get((id(tiles), arch, dtype, R, mode))
    if found is None:
        found = _found[id(tiles), arch, dtype, R, mode] = tiles, _nearest(tiles, arch, dtype, R, mode)
    return found[1]


# (id of a table, the key) -> (the table, its tile); a plan for a new number of rows repeats the same look-up.
_found: dict[tuple, tuple] = {}
kept_with_plans(_found.clear)


def _nearest(tiles, arch, dtype, R, mode):
    key = dtype_key(dtype)
    owners = {a for a, d, m, _ in tiles if d == key and m == mode}
    best = getattr(arch, "name", "")
    if best not in owners:
        archs = {a for a in owners if isinstance(a, int)}
        best = max((a for a in archs if a <= (80 if arch >= 120 else arch)), default=min(archs))
    ranks = sorted(r for a, d, m, r in tiles if (a, d, m) == (best, key, mode))
    return tiles[best, key, mode, next((r for r in ranks if r >= R), ranks[-1])]


def ragged(even, *lengths):
    """Whether rows of these lengths or strides are read one element at a time: Triton only tests divisibility by 16.

    even: whether 16 divides the addresses too.

    Each element then has its own address in registers, and a table's tile spills (0.5 to 2 KB per thread, sm_90).
    """
    return not even or any(length % 16 for length in lengths)


def capped(tile, **most):
    """The tile with no side longer than the given limits."""
    return {**tile, **{side: min(tile[side], length) for side, length in most.items()}}


def tile_product(**choices):
    """Every combination of the listed choices, as tile dicts."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def rank_block(R, limit):
    """Padded rank of one tensor-core step: a power of two, at least 16, at most `limit`."""
    return min(max(16, 1 << (R - 1).bit_length()), limit)


def tile_key(tile):
    """A tile dict as a hashable argument of a plan; None, the table's tile, stays None."""
    return None if tile is None else tuple(tile.items())


def dense(*vectors):
    """The vectors (or None) with stride 1, as the kernels index them."""
    return (vector if vector is None else vector.contiguous() for vector in vectors)


def narrow(factor):
    """An adapter's factor in a dtype that the kernels take: fp64 as fp32, as its tiles would exceed shared memory."""
    if factor.dtype != torch.float64:
        return factor
    record("cast", 0, 8 * factor.numel(), 4 * factor.numel())
    return factor.float()


def span_of(total, wanted, quantum, least):
    """(span, splits): the length of a reduction that one program takes, a multiple of `quantum` and at least `least`.

    Makes `wanted` splits, at most MAX_SPLITS, or fewer if spans would get too short; depends on shapes only.
    """
    wanted = min(MAX_SPLITS, max(1, wanted))
    span = max(-(-total // wanted), least)
    span = -(-span // quantum) * quantum
    return span, max(1, -(-total // span))


@triton.jit
def mask_bits(mask_ptr, rows, cols, C, inside):
    """Whether elements (rows, cols) of a parameter of C columns are kept: one bit each, rows in whole bytes."""
    # 32-bit offsets suffice, as a mask has less than 2 GB; 64-bit ones spilled.
    byte = tl.load(mask_ptr + (rows * ((C + 7) // 8) + cols // 8), mask=inside, other=0)
    return ((byte.to(tl.int32) >> (cols % 8)) & 1) != 0


@triton.jit
def _sum_job(part_ptr, out_ptr, numel, splits, pid, BLOCK: tl.constexpr, STEP: tl.constexpr):
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, STEP):
        split = first + tl.arange(0, STEP)
        mask = (split < splits)[:, None] & (offs < numel)[None, :]
        part = tl.load(part_ptr + split[:, None].to(tl.int64) * numel + offs[None, :], mask=mask, other=0.0)
        acc += tl.sum(part, axis=0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < numel)


# The code does not depend on the number of splits; specialised, a multiple of 16 would compile another kernel.
@triton.jit(do_not_specialize=["splits0", "splits1", "splits2"])
def _reduce_splits_kernel(
    part0_ptr, out0_ptr, part1_ptr, out1_ptr, part2_ptr, out2_ptr, numel0, splits0, numel1, splits1, numel2, splits2,
    BLOCK: tl.constexpr, STEP: tl.constexpr, JOBS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first1 = tl.cdiv(numel0, BLOCK)
    first2 = first1 + tl.cdiv(numel1, BLOCK)
    if JOBS == 1 or pid < first1:
        _sum_job(part0_ptr, out0_ptr, numel0, splits0, pid, BLOCK, STEP)
    elif JOBS == 2 or pid < first2:
        _sum_job(part1_ptr, out1_ptr, numel1, splits1, pid - first1, BLOCK, STEP)
    else:
        _sum_job(part2_ptr, out2_ptr, numel2, splits2, pid - first2, BLOCK, STEP)


class Reduction(NamedTuple):
    """The launch that adds the sums of splits; made by `reduction`. kept: which of the pairs were split."""

    start: Start
    kept: tuple[int, ...]

    def __call__(self, *pairs):
        """out = sum over axis 0 of part, in fixed order, cast to out's dtype, for every (part, out) that was split."""
        pointers = [tensor for index in self.kept for tensor in pairs[index]]
        self.start(pointers + pointers[:2] * (3 - len(self.kept)))


def reduction(name, device, *jobs):
    """The `Reduction` of up to three (splits, numel of out, dtype of out); None if nothing was split.

    part  [splits, *out.shape] fp32 contiguous        out  contiguous, any float dtype
    """
    kept = tuple(index for index, (splits, numel, _) in enumerate(jobs) if splits > 1 and numel)
    if not kept:
        return None
    block, numbers, programs, partial, written = 256, [], 0, 0, 0
    for splits, numel, dtype in (jobs[index] for index in kept):
        numbers += [numel, splits]
        programs += -(-numel // block)
        partial += splits * numel
        written += numel * dtype.itemsize
    numbers += [0, 1] * (3 - len(kept))
    constants = {"BLOCK": block, "STEP": 16, "JOBS": len(kept), "num_warps": 4}
    launch = Launch(name, partial, 0, written, scratch_bytes=4 * partial)
    return Reduction(Start(_reduce_splits_kernel, (programs,), device, tuple(numbers), constants, launch), kept)


def split_output(out, splits):
    """Where a kernel writes `out`: out itself for one split, else fp32 partial sums [splits, *out.shape]."""
    if splits == 1:
        return out
    return torch.empty((splits, *out.shape), device=out.device, dtype=torch.float32)


def scratch_bytes(*jobs):
    """Bytes of the partial sums of (splits, numel) jobs."""
    return sum(4 * splits * numel for splits, numel in jobs if splits > 1)
