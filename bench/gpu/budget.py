"""What the correctness stage of `make gpu` has to compile on a cold cache, and how long it should take; no GPU needed.

    python bench budget

The launchers of each check run on meta tensors with their `launch` captured, as in compile/kernels.py; a kernel counts
what its like (same kernel, with or without dropout) took for sm_90 in bench/results/kernels_triton*.json, the slower of
the releases there.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heapreplace

import torch

from checks import fourbit as fourbit_checks
from checks import lora as checks
from common import tree
from compile.kernels import meta, packed_weight
from compile.signature import signature
from fastpeft.kernels import _launch

STARTUP = 8  # seconds: a process imports torch and triton and makes a CUDA context
# Seconds of checks that are not replayed here: imports, a second compiler; ten kernels.
OTHER = {"PEFT": 40, "torch.compile": 40, "rank space": 14}
REST = 20  # of each of the others, some with a dozen kernels
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@contextmanager
def captured() -> Iterator[dict[str, tuple[str, bool]]]:
    """Distinct specialisations launched within, told on leaving: (kernel, with dropout) by what the JIT tells apart."""
    found: dict[str, tuple[str, bool]] = {}
    with _launch.captured() as launches:
        yield found
    for kernel, _, args, given in launches:
        constants = {name: value for name, value in given.items() if name not in ("num_warps", "num_stages")}
        key = (kernel.__name__, signature(kernel, args, constants), sorted(given.items()))
        found.setdefault(repr(key), (kernel.__name__, bool(constants.get("DROPOUT"))))


def lora(M: int, K: int, N: int, R: int, dtype: torch.dtype, p: float, strategy: str) -> None:
    """The launches of checks._step."""
    from fastpeft.kernels.lora_linear import lora_linear_bwd, lora_linear_fwd

    x, dy, w, bias = meta((M, K), dtype), meta((M, N), dtype), meta((N, K), dtype), meta((N,), dtype)
    a, b, seed = meta((R, K), FP32), meta((N, R), FP32), meta((1,), torch.int64) if p else None
    _, s = lora_linear_fwd(x, w, a, b, bias, None, 2.0, p, seed, strategy=strategy)
    lora_linear_bwd(dy, x, w, a, b, s, 2.0, p, seed, True, True, True, True, strategy=strategy)


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


def replay(name: str) -> bool:
    """Launches what a check does on a GPU; False where it is not known here."""
    check = checks.CHECKS[name]
    given = getattr(check, "keywords", {})
    if "ranks" in given:
        for R in given["ranks"]:
            for p in (0.0, 0.1):
                for strategy in ("accumulate", "fused"):
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


def compile_seconds() -> dict[tuple[str, bool], float]:
    """Mean seconds of a compile for sm_90."""
    out: dict[tuple[str, bool], float] = {}
    for path in sorted(tree.ROOT.glob("bench/results/kernels_triton*.json")):
        times: dict[tuple[str, bool], list[float]] = {}
        for row in json.loads(path.read_text())["rows"]:
            if row["arch"] == 90:
                times.setdefault((row["kernel"], "DROPOUT=1" in row["config"]), []).append(row["seconds"])
        for key, seconds in times.items():
            out[key] = max(out.get(key, 0.0), sum(seconds) / len(seconds))
    return out


def expected() -> dict[str, tuple[int, float]]:
    """Kernels and seconds of compiling, by check; no kernels for one that is not replayed."""
    each, out = compile_seconds(), {}
    for name in checks.CHECKS:
        with captured() as found:
            known = replay(name)
        seconds = sum(each[key] for key in found.values()) if known else float(OTHER.get(name, REST))
        out[name] = len(found), seconds
    return out


def makespan(seconds: list[float], workers: int) -> float:
    """When the last of the jobs ends, taken in this order by whoever is free."""
    ends = [0.0] * workers
    for each in seconds:
        heapreplace(ends, ends[0] + STARTUP + each)
    return max(ends)


def main(argv: list[str] | None = None) -> None:
    found = expected()
    for name, (kernels, seconds) in found.items():
        print(f"{name:22} {kernels or '?':>4} kernels {seconds:5.0f} s")
    jobs = [seconds for _, seconds in found.values()]
    print(f"{sum(jobs):.0f} s of compiling in all")
    for workers in (4, checks.WORKERS):
        print(f"{workers} workers: {makespan(jobs, workers):.0f} s, {STARTUP} s a job to start included")


if __name__ == "__main__":
    main()
