"""The launches of the parts, the headline and the checks on meta tensors: what `make gpu` has to compile, each once."""

from functools import lru_cache

import torch

from checks import fourbit as fourbit_checks
from checks import lora as checks
from compile.cases import meta, packed_weight
from compile.pool import Specialisation, captured
from fastpeft.kernels._cost import fused_serves
from fastpeft.kernels._gpu import Gpu, as_gpu
from fastpeft.kernels._launch import arch_of
from gpu import parts

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def lora(M: int, K: int, N: int, R: int, dtype: torch.dtype, p: float, strategy: str, bias: bool = True) -> None:
    """The launches of checks._step; without a bias those of a benchmark's step."""
    from fastpeft.kernels.lora_linear import lora_linear_bwd, lora_linear_fwd

    x, dy, w = meta((M, K), dtype), meta((M, N), dtype), meta((N, K), dtype)
    a, b, seed = meta((R, K), FP32), meta((N, R), FP32), meta((1,), torch.int64) if p else None
    _, s = lora_linear_fwd(x, w, a, b, meta((N,), dtype) if bias else None, None, 2.0, p, seed, strategy=strategy)
    lora_linear_bwd(dy, x, w, a, b, s, 2.0, p, seed, True, True, True, bias, strategy=strategy)


def fourbit(backend: str, case: fourbit_checks.Case) -> None:
    """The launches of checks.fourbit._step; those of "cuda" less what nvcc compiles."""
    from fastpeft.kernels import linear4bit

    M, N, K, R, dtype = case.M, case.N, case.K, case.R, case.dtype
    weight = (*packed_weight(case.block_size, case.double, N * K), case.quant_type, case.block_size)
    x, dy, bias = meta((M, K), dtype), meta((M, N), dtype), meta((N,), dtype)
    a, b, lora_bias = (meta((R, K), dtype), meta((N, R), dtype), meta((N,), dtype)) if R else (None, None, None)
    seed, primitives = meta((1,), torch.int64) if case.p else None, linear4bit.TRITON
    if backend == "cuda":
        primitives = linear4bit.Primitives(
            lambda *_: None, lambda *_: meta((M, N), dtype), lambda *_: meta((M, K), dtype), lambda K, _: K % 32 == 0
        )
    _, s = linear4bit.linear4bit_fwd(x, *weight, N, a, b, bias, lora_bias, 0.5, case.p, seed, primitives)
    needs = (True, R > 0, R > 0, True)
    linear4bit.linear4bit_bwd(dy, x, *weight, K, a, b, s, 0.5, case.p, seed, *needs, primitives)


def launch_bytes() -> None:
    """Those of checks.fourbit.check_bytes."""
    from fastpeft.kernels import dequantize_4bit, quantize_4bit

    for shape in fourbit_checks.BYTES_SHAPES:
        for quant_type, block_size in fourbit_checks.BYTES_FORMATS:
            quantize_4bit.quantize_4bit(meta(shape, FP32), quant_type, block_size)
            for double in (True, False):
                packed, scales = packed_weight(block_size, double, shape[0] * shape[1])
                if double:
                    quantize_4bit.quantize_absmax(meta(scales[0].shape, FP32), meta((256,), FP32))
                for dtype in (FP32, BF16, FP16):
                    dequantize_4bit.dequantize_4bit(packed, scales, quant_type, block_size, meta(shape, dtype))


def replay(name: str, strategies: tuple[str, ...] = ("accumulate", "fused")) -> bool:
    """Launches what a check does on a GPU; False where it is not known here."""
    check = checks.CHECKS[name]
    given = getattr(check, "keywords", {})
    if "ranks" in given:
        for R in given["ranks"]:
            for p in (0.0, 0.1):
                for strategy in strategies:
                    lora(*checks.RANK_SHAPE, R, BF16, p, strategy)
    elif "backend" in given:
        for case in fourbit_checks.linear_cases(given["backend"], given["shapes"], BF16):
            fourbit(given["backend"], case)
    elif "dtype" in given:
        for shape in checks.SHAPES:
            lora(*shape, 16, given["dtype"], 0.1, "auto")
    elif name == "4-bit bytes":
        launch_bytes()
    else:
        return False
    return True


@lru_cache
def specialisations(gpu: Gpu) -> dict[str, Specialisation]:
    """Every kernel of these stages on such a GPU, once, by key, in the order in which the stages need them."""
    strategies = ("accumulate", "fused") if fused_serves(gpu) else ("accumulate",)
    with captured(gpu) as found:
        parts.launch_all(strategies)
        for R in (16, 64):
            for M, N, K in parts.SHAPES:
                for p in (0.1, 0.0):
                    for strategy in strategies:
                        lora(M, K, N, R, BF16, p, strategy, bias=False)
        for name in checks.CHECKS:
            replay(name, strategies)
    return found


def here() -> Gpu:
    """The GPU of this process; in a dry run one of compute capability 9.0."""
    return as_gpu(arch_of(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")))


def compile_one(key: str) -> None:
    """A task of the pool."""
    specialisations(here())[key].compile()
