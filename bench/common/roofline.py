"""Measures this machine's roofs: copy bandwidth, GEMM rate by dtype, in-cache FMA rate. Prints and returns them.

    python bench roof [--device cpu|cuda] [--json NAME]

A roof is the best of several tries, not a median: it bounds what anything can reach. CPU: one thread.
"""

import argparse
import json

import torch

from common import tree
from common.timing import Race

GEMM_SHAPES = {"cuda": [(8192, 4096, 4096), (8192, 8192, 8192)], "cpu": [(512, 512, 512), (512, 1024, 1024)]}
TINY_SHAPES = [(32, 32, 32)]


def _best(fn, device: str, tries: int = 9) -> float:
    """Fastest of the tries, in seconds; three tries where one takes over half a second."""
    race = Race({"roof": fn}, device)
    race.run(budget_s=2.0 if device == "cuda" else 1.0, min_rounds=3, max_rounds=tries)
    return min(race.samples["roof"])


def copy_bandwidth(device: str, tiny: bool = False) -> float:
    """Bytes read and written per second by a copy of a buffer no cache holds."""
    size = (1 << 20) if tiny else (1 << 30 if device == "cuda" else 1 << 28)
    src = torch.zeros(size // 4, device=device)
    dst = torch.empty_like(src)
    return 2 * size / _best(lambda: dst.copy_(src), device)


def gemm_rate(device: str, dtype: torch.dtype, tiny: bool = False) -> float:
    """FLOP/s of torch's [M, K] x [K, N] product, the second operand transposed as in a linear's forward."""
    best = 0.0
    for m, n, k in TINY_SHAPES if tiny else GEMM_SHAPES[device]:
        x, w = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        best = max(best, 2 * m * n * k / _best(lambda x=x, w=w: torch.nn.functional.linear(x, w), device))
    return best


def fma_rate(device: str, tiny: bool = False) -> float:
    """FLOP/s of elementwise multiply-adds over buffers the caches hold (load-bound: below the arithmetic peak)."""
    size = (1 << 12) if tiny else (1 << 20 if device == "cuda" else 1 << 13)
    a, b, c = (torch.rand(size, device=device) for _ in range(3))
    repeats = 8 if tiny else 200

    def run():
        for _ in range(repeats):
            torch.addcmul(a, b, c, out=a)

    return 2 * size * repeats / _best(run, device)


def measure(device: str = "cpu", tiny: bool = False) -> dict:
    """Roofs in bytes/s and FLOP/s, with where they were measured."""
    if device == "cpu":
        torch.set_num_threads(1)
    out = {"environment": tree.environment(device), "copy_bytes_per_s": copy_bandwidth(device, tiny),
           "fma_flop_per_s": fma_rate(device, tiny)}  # fmt: skip
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out[f"gemm_{name}_flop_per_s"] = gemm_rate(device, dtype, tiny)
    return out


def describe(roof: dict) -> str:
    where = roof["environment"].get("gpu") or roof["environment"]["cpu"]
    rates = "  ".join(
        f"{key.removesuffix('_flop_per_s')} {roof[key] / 1e9:.4g} GFLOP/s" for key in roof if key.endswith("flop_per_s")
    )
    return f"{where}: copy {roof['copy_bytes_per_s'] / 1e9:.4g} GB/s  {rates}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write bench/results/NAME.json", metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of accuracy: for trying the script")
    args = parser.parse_args(argv)
    roof = measure(args.device, args.tiny)
    print(describe(roof))
    if not tree.mkldnn_bf16():
        print("note: torch has no native bf16 GEMM on this CPU; its bf16 figure is a scalar fallback")
    if args.json:
        print(tree.save_json(args.json, roof))
    else:
        print(json.dumps(roof, indent=1))


if __name__ == "__main__":
    main()
