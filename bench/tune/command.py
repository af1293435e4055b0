"""Everything that is tuned, in one budget.

python bench tune [--seconds 150] [--ranks 16,64] [--fresh]
"""

import argparse
import contextlib
from pathlib import Path

import torch

from common import tree
from compile.pool import Pool
from tune.fourbit import TILES, FourBit, compile_fourbit
from tune.jobs import JOBS, compile_tile
from tune.tables import install
from tune.tiles import Tuner


def run_all(tuner: Tuner, ranks: tuple[int, ...]) -> dict:
    """The LoRA kernels', the strategies' and the 4-bit tables; the state. On a GPU candidates compile in processes."""
    with contextlib.ExitStack() as stack:
        if tuner.device == "cuda":
            tuner.pool = stack.enter_context(Pool())
        dtype = torch.float16 if tuner.device == "cpu" else torch.bfloat16
        tuner.measure_copy()
        first = [each for R in ranks for job in JOBS for each in tuner.first(*job, R, dtype, compile_tile)]
        first += [each for job in TILES for each in tuner.first(*job, dtype, compile_fourbit)]
        tuner.precompile(first)
        end, left = tuner.deadline, tuner.left()
        fourbit = FourBit(tuner)
        tuner.deadline = end - 0.3 * left
        tuner.run(ranks)
        tuner.deadline = end - 0.15 * left
        fourbit.run_tiles(dtype)
        tuner.deadline = end
        fourbit.run(dtype)
    return tuner.state


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--ranks", default="16,64", help="comma-separated")
    parser.add_argument("--fresh", action="store_true", help="forget the timings of earlier runs")
    parser.add_argument("--install", type=Path, metavar="FILE", help="tables that `make gpu` left in its results")
    args = parser.parse_args(argv)
    if args.install:
        print("tune: installed", ", ".join(install(args.install, tree.ROOT / "kernels")))
        return
    if not torch.cuda.is_available():
        raise SystemExit("tune: device must be a CUDA GPU, got none; the tables that ship need no tuning to work")
    tuner = Tuner("cuda", args.seconds, tree.ROOT / "kernels", fresh=args.fresh)
    run_all(tuner, tuple(map(int, args.ranks.split(","))))


if __name__ == "__main__":
    main()
