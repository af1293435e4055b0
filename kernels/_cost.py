"""Time of a LoRA linear from bytes, FLOP, launches and the machine's ceilings; picks how its two products are combined.

A pass that reads (or writes) an [M, C] activation once, with rank-R products on the way:

    t = launch + (dirty + bytes) / bandwidth + mask uses * M * C * seconds per mask     (FLOP / skinny MMA rate replaces
                                                                                         bytes / bandwidth, if longer)
    t_GEMM = launch + max(bytes / bandwidth, boost FLOP / boost rate + remaining FLOP / sustained rate)

dirty: bytes that the previous kernel left unwritten in the L2: a GEMM's output in training, a benchmark's flush by
writing.

The H100 constants are fitted once to the measured rows that `make model` prints beside the predictions; each constant
serves every row (none belongs to a single shape). The other GPUs are scaled from data sheets by the same fractions of
peak and marked in `measured`; there the fused GEMM has not been measured, so they accumulate.

Strategies (measured: the vendor GEMM costs the same with beta = 1 as with 0; its read of C hides in the epilogue):
    accumulate   shrink, expand, GEMM += | grad_b, grad_a with dx0 = mask * (ds a), GEMM +=
    fused        shrink, fused GEMM      | grad_b, fused GEMM with a masked K-step, grad_a without dx0
Only the standard library is imported: the dispatch path asks this file once per shape and must not pay for it.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, log2

from fastpeft.kernels._gpu import Gpu, as_gpu, table_keys
from fastpeft.kernels._gpu_table import COPY_RATE
from fastpeft.kernels._strategy_table import TABLE

STRATEGIES = ("accumulate", "fused")
SIDES = {"forward": "fwd", "backward": "bwd"}  # a strategy is chosen separately for each pass

# A GEMM moves 5 % from run to run and with heat, so a smaller predicted gain than this is no reason to leave the
# vendor's GEMM, which also serves every alignment. A tuned table knows better.
FUSED_MARGIN = 0.05

_DTYPES = {
    "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16", "float32": "fp32",
    "fp32": "fp32", "float": "fp32",
}  # fmt: skip
_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

FUSED_NEEDS = "compute capability 9.0 to 11.x (TMA, and a tile of more shared memory than the 99 KB of 12.x)"


def fused_serves(cc) -> bool:
    """Whether GPUs of a compute capability, 90 or (9, 0), run the fused GEMM; only this tests `FUSED_NEEDS`."""
    return 90 <= as_gpu(cc) < 120


@dataclass(frozen=True)
class Arch:
    """Ceilings of one GPU. Seconds, bytes per second, FLOP per second."""

    name: str
    cc: int  # compute capability, 90 for 9.0
    sms: int
    gemm_boost: float  # dense 16-bit GEMM while the clock still boosts
    gemm_sustained: float  # ... once the power limit holds
    boost_flop: float  # FLOP a GEMM does before the power limit holds
    gemm_fp32: float  # GEMM of fp32 without TF32
    fused_over_vendor: float | None  # time of the TMA Triton GEMM with its K-step over the vendor's; None: not measured
    copy_bw: float  # device copy; a pass over an activation reaches it too
    mma_shared: float  # rank-R product whose wide operand goes from shared memory to the tensor cores
    mma_registers: float  # ... whose wide operand was masked and so comes from registers
    mask_seconds: float  # to draw and apply one element's keep mask: integer issue slots, not hidden under memory
    launch: float  # from one kernel's last block to the next kernel's first
    dirty: float  # bytes of the previous kernel that the L2 still holds and writes back while a pass begins
    measured: bool


# Fit: facts in the docstring of bench/gpu/model.py. 0.28 ps per mask is 3.6e12 masks/s, that is 4 integer operations
# per element at 132 SM * 64 lanes * 1.7 GHz: the sum of 7 Philox rounds for 8 masks, compare and select.
H100 = Arch(
    name="H100 80GB HBM3", cc=90, sms=132,
    gemm_boost=765e12, gemm_sustained=700e12, boost_flop=2.75e11, gemm_fp32=50e12, fused_over_vendor=1.057,
    copy_bw=3.0e12, mma_shared=195e12, mma_registers=115e12, mask_seconds=0.28e-12,
    launch=3.5e-6, dirty=40e6, measured=True,
)  # fmt: skip


SHARE = H100.copy_bw / 3.35e12  # of the data sheet's bandwidth


def _scaled(name: str, cc: int, sms: int, tensor_tflops: float, fp32_tflops: float, tb_s: float) -> Arch:
    """An Arch from data-sheet numbers, with the H100's fractions of peak (989 and 67 TFLOP/s, 3.35 TB/s)."""
    f, g = tensor_tflops / 989, fp32_tflops / 67
    return replace(
        H100, name=name, cc=cc, sms=sms, gemm_boost=H100.gemm_boost * f, gemm_sustained=H100.gemm_sustained * f,
        boost_flop=H100.boost_flop * f, gemm_fp32=H100.gemm_fp32 * g, fused_over_vendor=None,
        copy_bw=SHARE * tb_s * 1e12, mma_shared=H100.mma_shared * f, mma_registers=H100.mma_registers * f,
        mask_seconds=H100.mask_seconds / g, measured=False,
    )  # fmt: skip


ARCHES = {
    "a100": _scaled("A100 80GB SXM", 80, 108, 312, 19.5, 2.04),
    "a10": _scaled("A10", 86, 72, 125, 31.2, 0.60),
    "l40s": _scaled("L40S", 89, 142, 362, 91.6, 0.864),
    "h100": H100,
    # H200: the H100's chip with faster memory, so the same GEMM measurements hold.
    "h200": replace(H100, name="H200", copy_bw=SHARE * 4.8e12, measured=False),
    "b200": _scaled("B200", 100, 148, 2250, 80, 8.0),
}
# Words of a device's name are looked up first: compute capability 9.0 may be an H100, an H200, a GH200 and more.
_BY_NAME = {"A100": "a100", "A10": "a10", "A10G": "a10", "L40S": "l40s", "H100": "h100", "H200": "h200", "B200": "b200"}
_BY_CC = {80: "a100", 86: "a10", 87: "a10", 89: "l40s", 90: "h100"}


def dtype_name(dtype) -> str:
    """Short name (bf16, fp16, fp32) of a torch.dtype or of a name. TypeError for any other."""
    try:
        return _DTYPES[str(dtype).removeprefix("torch.")]
    except KeyError:
        raise TypeError(f"cost: dtype must be float16, bfloat16 or float32, got {dtype}") from None


def _named(gpu: Gpu) -> Arch | None:
    words = (_BY_NAME.get(word) for word in gpu.name.replace("-", " ").split())
    return next((ARCHES[word] for word in words if word), None)


def arch_of(cc) -> Arch:
    """The Arch that represents a device (`Gpu`) or a compute capability, 90 or (9, 0).

    Found by name, else by compute capability. Its copy rate is the one measured on a device of that name, else the
    device's memory clock times bus width times `SHARE`, else that of the Arch.
    """
    gpu = as_gpu(cc)
    arch = _named(gpu) or ARCHES[_BY_CC.get(int(gpu), "b200" if gpu > 90 else "a100")]
    rate = COPY_RATE.get(gpu.name) or SHARE * gpu.bytes_per_s
    return replace(arch, copy_bw=rate) if rate else arch


def padded_rank(R: int) -> int:
    """Rank that the tensor cores see: a power of two, at least 16 (the smallest side of a tl.dot)."""
    return max(16, 1 << (R - 1).bit_length()) if R else 16


def pass_bytes(name: str, M: int, N: int, K: int, R: int, itemsize: int) -> int:
    """Bytes that pass `name` must move: the wide activation once, the narrow operands once."""
    narrow = itemsize * M * R
    wide = {
        "shrink": M * K, "expand": M * N, "expand_add": 2 * M * N, "grad_b": M * N, "grad_a": M * K,
        "grad_a_dx": 2 * M * K,
    }[name]  # fmt: skip
    side = {"shrink": K, "expand": N, "expand_add": N, "grad_b": 2 * N, "grad_a": K, "grad_a_dx": 2 * K}[name]
    return itemsize * wide + narrow * (2 if name == "grad_b" else 1) + 4 * side * R


def pass_flop(name: str, M: int, N: int, K: int, R: int) -> int:
    """FLOP of the rank-R products of pass `name`."""
    width = N if name in ("expand", "expand_add", "grad_b") else K
    return 2 * M * width * R * (2 if name in ("grad_b", "grad_a_dx") else 1)


_MASK_USES = {"shrink": 1, "grad_a": 1, "grad_a_dx": 2}  # dx0 = mask * (ds a) applies it a second time
_LAUNCHES = {"grad_b": 2, "grad_a": 2, "grad_a_dx": 2}  # split buffers, then the sum in a fixed order


def pass_time(name: str, M: int, N: int, K: int, R: int, p: float, dtype, arch: Arch = H100) -> float:
    """Seconds of one primitive: shrink, expand, expand_add, grad_b, grad_a, grad_a_dx (with dx0)."""
    dt = dtype_name(dtype)
    masked = p > 0 and name in _MASK_USES
    rate = arch.mma_registers if masked else arch.mma_shared
    if dt == "fp32":  # fp32 operands are multiplied at full precision, on the CUDA cores
        rate = arch.gemm_fp32
    moved = pass_bytes(name, M, N, K, R, _ITEMSIZE[dt])
    seconds = max(moved / arch.copy_bw, pass_flop(name, M, N, K, padded_rank(R)) / rate)
    seconds += arch.launch * _LAUNCHES.get(name, 1)
    # The previous kernel wrote about as much as this one moves. Before an expand, that kernel is a shrink, which writes
    # little; the half stands for the first stores, each of which needs a free line.
    seconds += min(arch.dirty, moved) / arch.copy_bw * (0.5 if name == "expand" else 1.0)
    return seconds + (_MASK_USES[name] * M * K * arch.mask_seconds if masked else 0.0)


def _gemm_seconds(flop: float, boost: float, arch: Arch) -> float:
    """A GEMM's arithmetic: at the boost clock first, then at the power limit's rate (never faster than `boost`)."""
    head = min(flop, arch.boost_flop)
    return head / boost + (flop - head) / min(boost, arch.gemm_sustained)


def gemm_time(M: int, N: int, K: int, dtype, arch: Arch = H100) -> float:
    """Seconds of the vendor's [M, K] x [K, N] product, with beta 0 or 1 alike."""
    dt = dtype_name(dtype)
    flop, moved = 2 * M * N * K, _ITEMSIZE[dt] * (M * K + K * N + M * N)
    # 64 x 64 tiles and split K keep the SMs busy even for small products; below one such tile per SM some idle.
    busy = min(1.0, max(1, ceil(M / 64)) * max(1, ceil(N / 64)) * max(1, K // 1024) / arch.sms)
    seconds = flop / arch.gemm_fp32 if dt == "fp32" else _gemm_seconds(flop, arch.gemm_boost, arch)
    return arch.launch + max(seconds / busy, moved / arch.copy_bw)


def fused_gemm_time(M: int, N: int, K: int, R: int, dtype, arch: Arch = H100, p: float = 0.0) -> float:
    """Seconds of the persistent Triton GEMM with a rank-R K-step; p > 0 masks that step (backward's dX, [M, N] out)."""
    if arch.fused_over_vendor is None or dtype_name(dtype) == "fp32":
        return float("inf")
    # Below one tile per SM some SMs idle, as K is not split. The ratio was measured at some eight waves, the last not
    # full.
    busy = min(1.0, max(1, ceil(M / 128) * ceil(N / 256)) / arch.sms)
    flop = 2 * M * N * (K + padded_rank(R))
    moved = 2 * (M * K + K * N + M * N)
    seconds = max(arch.fused_over_vendor * _gemm_seconds(flop, arch.gemm_boost, arch) / busy, moved / arch.copy_bw)
    return arch.launch + seconds + (M * N * arch.mask_seconds if p > 0 else 0.0)


def predict(M: int, N: int, K: int, R: int, p: float = 0.0, dtype="bf16", arch: Arch | str = H100,
            strategy: str = "accumulate") -> dict[str, float]:  # fmt: skip
    """Seconds of every part of lora_linear, forward and backward (dx, dA, dB), and of the frozen linear.

    Returns  fwd_* and bwd_* parts, "fwd", "bwd", "total", "frozen_fwd", "frozen_bwd" (dX alone), "frozen", "ratio".
    Raises   ValueError: strategy or arch name.  TypeError: dtype.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"cost: strategy must be one of {STRATEGIES}, got {strategy!r}")
    if isinstance(arch, str):
        if arch not in ARCHES:
            raise ValueError(f"cost: arch must be one of {tuple(ARCHES)}, got {arch!r}")
        arch = ARCHES[arch]
    fused = strategy == "fused"
    parts = {"fwd_shrink": pass_time("shrink", M, N, K, R, p, dtype, arch)}
    if fused:
        parts["fwd_gemm"] = fused_gemm_time(M, N, K, R, dtype, arch)
    else:
        parts["fwd_expand"] = pass_time("expand", M, N, K, R, p, dtype, arch)
        parts["fwd_gemm"] = gemm_time(M, N, K, dtype, arch)
    parts["bwd_grad_b"] = pass_time("grad_b", M, N, K, R, p, dtype, arch)
    parts["bwd_grad_a"] = pass_time("grad_a" if fused else "grad_a_dx", M, N, K, R, p, dtype, arch)
    parts["bwd_gemm"] = fused_gemm_time(M, K, N, R, dtype, arch, p) if fused else gemm_time(M, K, N, dtype, arch)
    out = dict(parts)
    for side in ("fwd", "bwd"):
        out[side] = sum(t for name, t in parts.items() if name.startswith(side))
    out["total"] = out["fwd"] + out["bwd"]
    out["frozen_fwd"], out["frozen_bwd"] = gemm_time(M, N, K, dtype, arch), gemm_time(M, K, N, dtype, arch)
    out["frozen"] = out["frozen_fwd"] + out["frozen_bwd"]
    out["ratio"] = out["total"] / out["frozen"]
    return out


def size_bucket(M: int) -> int:
    """The power of two nearest to M by ratio. Choices are kept per bucket: a new batch length needs no new choice."""
    return 1 << ((M * M).bit_length() // 2) if M else 0


def strategy_key(side: str, M: int, N: int, K: int, R: int, p: float, dtype, cc) -> tuple[str, str, str, tuple]:
    """Key of the tuned table: pass, device, sizes rounded to a power of two, padded rank, whether there is dropout."""
    near = tuple(round(log2(max(1, n))) for n in (M, N, K))
    return side, table_keys(cc)[0], dtype_name(dtype), (*near, padded_rank(R), p > 0)


@lru_cache(maxsize=4096)
def choose_strategy(side: str, M: int, N: int, K: int, R: int, p: float, dtype, arch_cc) -> str:
    """Strategy of one pass, "accumulate" or "fused": the tuned table first, else the prediction. Cached.

    side   "forward" or "backward";  M  a `size_bucket`, or every M needs its own choice
    dtype  torch.dtype or its name;  arch_cc  a Gpu, 90 or (9, 0).  What `fused_serves` refuses, and fp32, accumulate.
    """
    gpu = as_gpu(arch_cc)
    if not fused_serves(gpu) or dtype_name(dtype) == "fp32" or 0 in (M, N, K, R):
        return "accumulate"
    _, _, *size = strategy_key(side, M, N, K, R, p, dtype, gpu)
    for device in table_keys(gpu):
        if (tuned := TABLE.get((side, device, *size))) is not None:
            return tuned
    arch = arch_of(gpu)
    if arch.fused_over_vendor is None:
        return "accumulate"
    base = predict(M, N, K, R, p, dtype, arch, "accumulate")[SIDES[side]]
    fused = predict(M, N, K, R, p, dtype, arch, "fused")[SIDES[side]]
    return "fused" if fused < base * (1 - FUSED_MARGIN) else "accumulate"
