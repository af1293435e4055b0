"""What a GPU has to prove about 4-bit weights: the bytes are the reference's, the products within its error budget.

Every backend that serves on the device is checked, "cuda" where the extension has its kernels. Bytes are compared with
those of the reference on the CPU, products with the reference on the device, where it takes milliseconds. A check
returns one line, or raises.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastpeft import dispatch, ops
from fastpeft.ops.weight4bit import Weight4bit
from fastpeft.testing import EPS, error

SCALE = 0.5
FORMATS = (("nf4", 64, True), ("fp4", 128, False), ("nf4", 32, True))
# M, N, K, R by tile of the kernels for few rows (16 rows, 32 or 64) and beyond; blocks and bytes straddle rows of w.
FEW = ((1, 1000, 1024, 16), (7, 1000, 1024, 16), (16, 1000, 1024, 16), (9, 514, 2048, 0), (5, 77, 301, 3))
SOME = ((33, 1000, 1024, 16), (64, 1000, 1024, 16), (40, 96, 4096, 64), (24, 4097, 544, 8))
MANY = ((65, 1000, 1024, 16), (300, 1000, 1024, 16), (200, 77, 301, 3), (2048, 4096, 4096, 16))
BYTES_SHAPES = ((7, 33), (4096, 1024), (1000, 1001))
BYTES_FORMATS = (("nf4", 64), ("fp4", 64), ("nf4", 32), ("nf4", 128), ("fp4", 4096))


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    p: float
    quant_type: str
    block_size: int
    double: bool


def linear_cases(backend: str, shapes: tuple, half: torch.dtype) -> list[Case]:
    """Products to check.

    Triton compiles anew for each format, dtype, p and kind of M, about 1 s a kernel: a format has one dtype and one p
    there, and a shape two formats, so that every kernel meets every kind of M. nvcc's kernels are compiled: all formats
    in both 16-bit dtypes, without dropout, which is not theirs.
    """
    cases = []
    for i, (M, N, K, R) in enumerate(shapes):
        if backend == "triton":
            kinds = [(FORMATS[0], half, 0.1), (FORMATS[1], half, 0.0), (FORMATS[2], torch.float32, 0.0)]
            kinds = [kinds[0], kinds[1 + i % 2]]
        else:
            kinds = [(each, dtype, 0.0) for each in FORMATS for dtype in (half, torch.float16)]
        if M * N * K > 1 << 30:
            kinds = kinds[:1]
        cases += [Case(M, N, K, R, dtype, p if R else 0.0, *each) for each, dtype, p in kinds]
    return cases


def backends(ctx, op: str) -> list[str]:
    """Those with kernels on this device."""
    able = [name for name in ("cuda", "triton") if dispatch.unmet(op, name, ctx.device, ctx.dtype) is None]
    assert able, f"no backend serves {op} on {ctx.device}"
    return able


def _without(ctx, backend: str) -> str:
    """A line for a dry run. AssertionError on a GPU, where nothing else would prove this backend."""
    missing = dispatch.unmet("linear4bit_fwd", backend, ctx.device, ctx.dtype)
    assert ctx.device == "cpu", f"{backend} requires {missing}"
    return f"left out: {backend} requires {missing}"


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Drawn on the CPU, so that the reference there has the same values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _equal(ours: Tensor, want: Tensor, what: str) -> None:
    same = torch.equal(ours.cpu().contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
    assert same, f"{what}: {int((ours.cpu() != want).sum())} of {want.numel()} values differ"


def check_bytes(ctx) -> str:
    """quantize_4bit, quantize_absmax and dequantize_4bit, bit for bit, for every format and dtype."""
    shapes, formats = (BYTES_SHAPES[:1], BYTES_FORMATS[:2]) if ctx.tiny else (BYTES_SHAPES, BYTES_FORMATS)
    dtypes = (torch.float16,) if ctx.tiny else (torch.float32, torch.bfloat16, torch.float16)
    values = 0
    for shape in shapes:
        for quant_type, block_size in formats:
            for double in (True, False):
                w = _random(*shape, seed=block_size) * 0.02
                want = ops.quantize_4bit(w, quant_type, block_size, double, backend="eager")
                what = f"{shape} {quant_type} {block_size} {'double' if double else 'plain'}"
                for backend in backends(ctx, "quantize_4bit"):
                    launcher = dispatch.load("quantize_4bit", backend)
                    packed, absmax = launcher(w.to(ctx.device), quant_type, block_size)
                    _equal(packed, want.packed, f"{backend} packed {what}")
                    if not double:
                        _equal(absmax, want.scales[0], f"{backend} absmax {what}")
                        continue
                    # The mean is torch's, and may differ between devices in its last bit: the reference's is used.
                    centred = absmax - want.scales[3].to(ctx.device)
                    code = want.scales[1].to(ctx.device)
                    codes, scale = dispatch.load("quantize_absmax", backend)(centred, code)
                    _equal(codes, want.scales[0], f"{backend} codes {what}")
                    _equal(scale, want.scales[2], f"{backend} scale {what}")
                there = want.to(ctx.device)
                for dtype in dtypes:
                    exact = ops.dequantize_4bit(want, dtype, backend="eager")
                    for backend in backends(ctx, "dequantize_4bit"):
                        out = ops.dequantize_4bit(there, dtype, backend=backend)
                        _equal(out, exact, f"{backend} {dtype} {what}")
                        values += out.numel()
    return f"{values:,} values equal bit for bit, {' and '.join(backends(ctx, 'dequantize_4bit'))}"


def check_bitsandbytes(ctx) -> str:
    """bitsandbytes on the device reads our bytes as we do."""
    try:
        from bitsandbytes import functional
    except ImportError as missing:
        return f"left out: {missing}"
    # On a CPU its kernel misreads blocks that straddle rows, so that K is a multiple of the block here.
    weight = ops.quantize_4bit(_random(64, 128, seed=1).to(ctx.dtype)).to(ctx.device)
    theirs = functional.dequantize_4bit(*weight.to_quant_state())
    for backend in ["eager"] if ctx.device == "cpu" else backends(ctx, "dequantize_4bit"):
        _equal(ops.dequantize_4bit(weight, backend=backend), theirs.cpu(), f"{backend} beside bitsandbytes")
    return "the same values as bitsandbytes"


def _step(weight: Weight4bit, t: dict, p: float, backend: str, device: str) -> dict[str, Tensor]:
    fwd, bwd = (dispatch.load(op, backend) for op in ("linear4bit_fwd", "linear4bit_bwd"))
    t = {name: None if value is None else value.to(device) for name, value in t.items()}
    weight = weight.to(device)
    packed = (weight.packed, weight.scales, weight.quant_type, weight.block_size)
    seed, (N, K) = t["seed"] if p else None, weight.shape
    y, s = fwd(t["x"], *packed, N, t["a"], t["b"], t["bias"], t["lora_bias"], SCALE, p, seed)
    adapter = t["a"] is not None
    grads = bwd(t["dy"], t["x"], *packed, K, t["a"], t["b"], s, SCALE, p, seed, True, adapter, adapter, True)
    return {name: v.cpu() for name, v in zip(("y", "dx", "da", "db", "dbias"), (y, *grads), strict=True)}


def _compare(ctx, case: Case, backend: str) -> float:
    """Worst share of the error budget. AssertionError beyond 1."""
    M, N, K, R, dtype, p = case.M, case.N, case.K, case.R, case.dtype, case.p
    w = (_random(N, K, seed=N + K) / K**0.5).to(ctx.device)
    weight = ops.quantize_4bit(w, case.quant_type, case.block_size, case.double, backend="eager")
    t = {"x": _random(M, K, seed=2, dtype=dtype), "dy": _random(M, N, seed=3, dtype=dtype),
         "bias": _random(N, seed=4, dtype=dtype), "a": None, "b": None, "lora_bias": None,
         "seed": torch.tensor([2**40 + R])}  # fmt: skip
    if R:
        a, b = _random(R, K, seed=5) / K**0.5, _random(N, R, seed=6) / R**0.5
        t |= {"a": a.to(dtype), "b": b.to(dtype), "lora_bias": _random(N, seed=7, dtype=dtype)}
    peer = _step(weight, t, p, "eager", ctx.device)
    # Exact operands: the weight as it is rounded to the tested dtype, everything then in fp64.
    w = ops.dequantize_4bit(weight, dtype, backend="eager").double()
    there = {n: v if v is None else v.to(ctx.device) for n, v in t.items()}
    wide = {n: v if v is None or n == "seed" else v.double() for n, v in there.items()}
    x, dy, seed = wide["x"], wide["dy"], wide["seed"] if p else None
    if R:
        fwd, bwd = (dispatch.load(op, "eager") for op in ("lora_linear_fwd", "lora_linear_bwd"))
        y, s = fwd(x, w, wide["a"], wide["b"], wide["bias"], wide["lora_bias"], SCALE, p, seed)
        grads = bwd(dy, x, w, wide["a"], wide["b"], s, SCALE, p, seed, True, True, True, True)
        gold = dict(zip(peer, (y, *grads), strict=True))
    else:
        gold = {"y": x @ w.t() + wide["bias"], "dx": dy @ w, "dbias": dy.sum(0)}
    ours, worst = _step(weight, t, p, backend, ctx.device), 0.0
    for name, exact in gold.items():
        exact = exact.cpu()
        budget = 2 * (error(peer[name], exact) + EPS[dtype] * float(exact.abs().max()))
        share = error(ours[name], exact) / budget
        assert share <= 1, f"{name}: {share:.2f} of the error budget, {backend} {case}"
        worst = max(worst, share)
    return worst


def check_linear(ctx, backend: str, shapes: tuple) -> str:
    """With and without an adapter."""
    if backend not in backends(ctx, "linear4bit_fwd"):
        return _without(ctx, backend)
    if ctx.tiny:
        shapes = {FEW: ((3, 24, 64, 4),), SOME: ((17, 24, 32, 0),), MANY: ((70, 24, 45, 4),)}[shapes]
    shares = [_compare(ctx, case, backend) for case in linear_cases(backend, shapes, ctx.dtype)]
    return f"{len(shares)} cases, worst {max(shares):.0%} of the error budget"


def check_mid(ctx) -> str:
    """The CUDA kernel of up to 512 rows wherever it serves, chosen or not."""
    if "cuda" not in backends(ctx, "linear4bit_fwd"):
        return _without(ctx, "cuda")
    from fastpeft.kernels import _fourbit_cost, _launch
    from fastpeft.kernels._cost import dtype_name
    from fastpeft.kernels._gpu import table_keys

    shapes = [(65, 1000, 1024, 16), (128, 513, 4096, 0), (129, 261, 192, 5), (300, 4096, 512, 64), (512, 96, 8192, 8)]
    shares = []
    for i, (M, N, K, R) in enumerate(shapes):
        case = Case(M, N, K, R, (torch.bfloat16, torch.float16)[i // 2 % 2], 0.0, "nf4", 64, i % 2 == 0)
        arch = _launch.arch_of(torch.empty(0, device=ctx.device))
        key = (table_keys(arch)[0], dtype_name(case.dtype), N, K)
        before = dict(_fourbit_cost.LARGEST_MID)
        _fourbit_cost.LARGEST_MID[key] = 512
        _fourbit_cost.choose_mid.cache_clear()
        try:
            assert _fourbit_cost.choose_mid(M, N, K, case.dtype, 64, arch)
            shares.append(_compare(ctx, case, "cuda"))
        finally:
            _fourbit_cost.LARGEST_MID.clear()
            _fourbit_cost.LARGEST_MID.update(before)
            _fourbit_cost.choose_mid.cache_clear()
    return f"{len(shares)} cases, worst {max(shares):.0%} of the error budget"


def check_deterministic(ctx) -> str:
    N, K = (24, 64) if ctx.tiny else (4096, 4096)
    weight = ops.quantize_4bit(_random(N, K, seed=8) / K**0.5, backend="eager").to(ctx.device)
    for M in (3,) if ctx.tiny else (1, 16, 64, 1024):
        x, dy = _random(M, K, seed=9, dtype=ctx.dtype), _random(M, N, seed=10, dtype=ctx.dtype)
        t = {"x": x, "dy": dy, "a": _random(16, K, seed=11), "b": _random(N, 16, seed=12), "bias": None,
             "lora_bias": None, "seed": torch.tensor([77])}  # fmt: skip
        for backend in backends(ctx, "linear4bit_fwd"):
            first, second = (_step(weight, t, 0.1, backend, ctx.device) for _ in range(2))
            for name in first:
                assert torch.equal(first[name], second[name]), f"{name} differs between two runs, {backend} M={M}"
    return "same bytes twice"


def check_graph(ctx) -> str:
    """A CUDA graph replays both paths on new values of x; what it captured stays its own."""
    if ctx.device != "cuda":
        return "left out: needs CUDA graphs"
    weight = ops.quantize_4bit(_random(512, 1024, seed=13) / 32).to("cuda")
    for backend in backends(ctx, "linear4bit_fwd"):
        for M in (4, 256):
            x = torch.randn(M, 1024, device="cuda", dtype=torch.bfloat16)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), torch.no_grad():
                ops.linear4bit(x, weight, backend=backend)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), torch.no_grad():
                y = ops.linear4bit(x, weight, backend=backend)
            x.normal_()
            ops.linear4bit(x[:1].repeat(300, 1), weight, backend=backend)  # another call between capture and replay
            graph.replay()
            call = ops.linear4bit(x, weight, backend=backend)
            gap = error(y, call) / float(call.abs().max())
            assert gap <= EPS[torch.bfloat16], f"{backend} M={M}: the replay differs by {gap:.3g} of the largest value"
    return "replays equal calls"


CHECKS = {
    "4-bit linear cuda": partial(check_linear, backend="cuda", shapes=FEW + SOME + MANY),
    "4-bit mid": check_mid,
    "4-bit 1-16 rows triton": partial(check_linear, backend="triton", shapes=FEW),
    "4-bit 24-64 rows triton": partial(check_linear, backend="triton", shapes=SOME),
    "4-bit many rows triton": partial(check_linear, backend="triton", shapes=MANY),
    "4-bit bytes": check_bytes,
    "4-bit deterministic": check_deterministic,
    "4-bit graph": check_graph,
    "4-bit bitsandbytes": check_bitsandbytes,
}
