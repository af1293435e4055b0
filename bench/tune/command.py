"""Everything that is tuned, in one budget.

python bench tune [--seconds 150] [--ranks 16,64] [--fresh]
"""

import argparse

import torch

from common import tree
from tune.fourbit import FourBit
from tune.tiles import Tuner


def run_all(tuner: Tuner, ranks: tuple[int, ...]) -> dict:
    """The LoRA kernels', the strategies' and the 4-bit tables; the state."""
    end, left = tuner.deadline, tuner.left()
    dtype = torch.float16 if tuner.device == "cpu" else torch.bfloat16
    fourbit = FourBit(tuner)
    tuner.measure_copy()
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
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("tune: device must be a CUDA GPU, got none; the tables that ship need no tuning to work")
    tuner = Tuner("cuda", args.seconds, tree.ROOT / "kernels", fresh=args.fresh)
    run_all(tuner, tuple(map(int, args.ranks.split(","))))


if __name__ == "__main__":
    main()
