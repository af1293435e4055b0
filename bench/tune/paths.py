"""The paths of a product with a 4-bit weight on this CPU, over the rows of x: the fastest, and the one that is chosen.

    python bench paths [--isa avx2] [--dtype bf16] [--size 4096] [--rows 1,4,8] [--seconds 2]

One thread, CPU time, the weight NF4 in blocks of 64 with absmax in 8 bits, no adapter: the forward, and dx alone.
gemv: W as it is stored · fused: W decoded piece by piece for products of bf16 · panels: W decoded for the vendor GEMM.
The thresholds between them are `max_rows` in csrc/simd/fourbit/. Prints a row for each M and pass, and writes
bench/results/linear4bit_paths_<isa>_<dtype>.json.
"""

import argparse
from collections.abc import Callable

import torch

from common import tree
from common.timing import Race, steady_cpu
from fastpeft import ops

PATHS = ("gemv", "fused", "panels")
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SLACK = 1.1  # a chosen path that takes so much longer than the fastest is marked


class Calls:
    """The two passes of x [M, K] w, each by a path that is forced."""

    def __init__(self, M: int, size: int, dtype: torch.dtype):
        from fastpeft import _native

        self.native = _native
        gen = torch.Generator().manual_seed(0)
        q = ops.quantize_4bit(torch.randn(size, size, generator=gen))
        self.weight = (q.packed, list(q.scales), q.quant_type, q.block_size, size)
        self.x = torch.randn(M, size, generator=gen).to(dtype)
        self.s = torch.empty(0)

    def call(self, which: str, path: str) -> Callable[[], object]:
        def forward() -> object:
            self.native.set_fourbit_path(path)
            return self.native.linear4bit_fwd(self.x, *self.weight, None, None, None, None, 1.0, 0.0, None)

        def backward() -> object:
            self.native.set_fourbit_path(path)
            rest = (None, None, self.s, 1.0, 0.0, None, True, False, False, False)
            return self.native.linear4bit_bwd(self.x, self.x, *self.weight, *rest)

        return forward if which == "forward" else backward

    def served(self, which: str) -> dict[str, Callable[[], object]]:
        """The paths that can make this product."""
        calls = {}
        for path in PATHS:
            try:
                self.call(which, path)()
            except RuntimeError as error:
                if "set_fourbit_path" not in str(error):
                    raise
            else:
                calls[path] = self.call(which, path)
        return calls


def compare(M: int, which: str, size: int, dtype: str, seconds: float) -> dict:
    """One row: milliseconds by path, the chosen path and how much longer it takes than the fastest."""
    calls = Calls(M, size, DTYPES[dtype])
    try:
        peers = calls.served(which) | {"chosen": calls.call(which, "auto")}
        race = Race(peers, "process").run(seconds)
    finally:
        calls.native.set_fourbit_path("auto")
    times = {name: row["median_s"] * 1e3 for name, row in race.summary("chosen").items()}
    auto = times.pop("chosen")
    return {"M": M, "pass": which, "dtype": dtype, "size": size, "ms": times, "chosen_ms": auto,
            "over_fastest": auto / min(times.values())}  # fmt: skip


def line(row: dict) -> str:
    times = " ".join(f"{row['ms'][path]:9.3f}" if path in row["ms"] else f"{'-':>9}" for path in PATHS)
    mark = "  <" if row["over_fastest"] > SLACK else ""
    return f"{row['pass']:9}{row['M']:5} {times} {row['chosen_ms']:9.3f} {row['over_fastest']:8.2f}{mark}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default="auto", help="an instruction set that this processor runs")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--size", type=int, default=4096, help="N and K, a multiple of 64")
    parser.add_argument("--rows", type=lambda text: tuple(map(int, text.split(","))), default=ROWS)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one row")
    args = parser.parse_args(argv)
    try:
        from fastpeft import _native
    except ImportError as error:
        print(f"paths: the C++ extension must be built, got {error}")
        return 1
    steady_cpu()
    _native.set_isa(args.isa)
    isa, rows = _native.build_info()["isa"], []
    print(f"{isa}, {args.dtype}, {args.size} x {args.size}, ms of CPU time; < : over {SLACK} x the fastest")
    print(f"{'pass':9}{'M':>5} " + " ".join(f"{name:>9}" for name in (*PATHS, "chosen")) + f" {'/fastest':>8}")
    try:
        for which in ("forward", "backward"):
            for M in args.rows:
                rows.append(compare(M, which, args.size, args.dtype, args.seconds))
                print(line(rows[-1]), flush=True)
    finally:
        _native.set_isa("auto")
    tree.save_json(f"linear4bit_paths_{isa}_{args.dtype}", {"environment": tree.environment("cpu"), "rows": rows})
    return 0


if __name__ == "__main__":
    main()
