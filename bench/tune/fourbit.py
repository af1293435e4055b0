"""Times the tiles of the 4-bit Triton kernels, then the ways of a product with a 4-bit weight, beside tune/tiles.py.

Written: the tiles, as there, and where each way pays: the dicts of kernels/_fourbit_cost.py between `# tuned: begin`
and `# tuned: end`. A way that reads the packed bytes is taken up to the largest number of rows, of those timed,
before the first at which it does not win by MARGIN.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch

from common.timing import Race
from compile.cases import meta, packed_weight
from compile.pool import captured
from fastpeft.kernels import _launch
from fastpeft.kernels._gpu import as_gpu, table_keys
from tune.jobs import SCALE
from tune.tiles import MARGIN, Tuner, one_line

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))  # N, K
RANK = 16
# (op, mode, what its table has in place of a rank: the rows of a tile)
TILES = (("dequantize_4bit", "plain", 0), ("linear4bit_small", "fwd", 16), ("linear4bit_small", "dx", 16),
         ("linear4bit_small", "fwd", 64), ("linear4bit_small", "dx", 64))  # fmt: skip
# The rows that each table is timed at.
ROWS = {
    "LARGEST_SMALL": (1, 4, 8, 16, 32, 64),
    "LARGEST_MID": (96, 128, 256, 512),
    "LEAST_AUGMENTED": (8192, 2048, 512),
}
COMMENTS = {
    "LEAST_AUGMENTED": "# Smallest M that uses [x | s] [w | scale b]ᵀ; 0: none. "
    "Key: (device or arch, dtype, N, K, padded R).",
}


def format_tables(tables: dict[str, dict[tuple, int]]) -> str:
    """The section of kernels/_fourbit_cost.py."""
    lines = []
    for name, table in tables.items():
        lines += [COMMENTS[name]] if name in COMMENTS else []
        entries = [f"    {key!r}: {table[key]!r},".replace("'", '"') for key in sorted(table, key=str)]
        lines += [f"{name}: dict[tuple, int] = {{", *entries, "}"] if entries else [f"{name}: dict[tuple, int] = {{}}"]
    return "\n".join(lines)


def limit(rows: tuple[int, ...], wins: Callable[[int], bool]) -> int:
    """The last of `rows` before the first that does not win; 0 where already the first does not."""
    last = 0
    for row in rows:
        if not wins(row):
            break
        last = row
    return last


def compile_fourbit(op: str, mode: str, rows: int, tile: dict) -> None:
    """A task of the pool: as tune.jobs.compile_tile, of a kernel that reads the packed weight."""
    gpu, (N, K), half = as_gpu(_launch.arch_of(torch.empty(0, device="cuda"))), SHAPES[0], torch.bfloat16
    module = importlib.import_module(f"fastpeft.kernels.{op}")
    packed = (*packed_weight(64, True, N * K), "nf4", 64)
    with captured(gpu) as found:
        if mode == "plain":
            module.dequantize_4bit(*packed, meta((N, K), half), tile=tile)
        elif mode == "fwd":
            s, b = meta((rows, RANK), half), meta((N, RANK), torch.float32)
            module.linear4bit_small(meta((rows, K), half), *packed, N, s, b, None, None, SCALE, tile=tile)
        else:
            module.linear4bit_small_dx(meta((rows, N), half), *packed, K, None, tile=tile)
    for each in found.values():
        each.compile()


class FourBit:
    """The thresholds of one GPU, on the budget, the state and the folder of a Tuner."""

    def __init__(self, tuner: Tuner):
        from fastpeft.kernels import _fourbit_cost, linear4bit

        self.tuner, self.cost, self.composition = tuner, _fourbit_cost, linear4bit
        self.cuda: ModuleType | None = None
        if tuner.device == "cuda":
            with contextlib.suppress(ImportError):
                self.cuda = importlib.import_module("fastpeft._cuda")
        self.forward = (self.cuda or linear4bit).linear4bit_fwd

    @contextlib.contextmanager
    def way(self, table: str, on: bool) -> Iterator[None]:
        """Within, products take the way of this table, or the one beside it."""
        taken = {"choose_small": table == "LARGEST_SMALL" and on, "choose_augmented": table == "LEAST_AUGMENTED" and on}
        places = [(self.composition, name, value) for name, value in taken.items()]
        if self.cuda is not None:
            places.append((self.cuda, "choose_mid", table == "LARGEST_MID" and on))
        before = [getattr(module, name) for module, name, _ in places]
        for module, name, value in places:
            setattr(module, name, lambda *_, value=value: value)
        try:
            yield
        finally:
            for (module, name, _), choose in zip(places, before, strict=True):
                setattr(module, name, choose)

    def normal(self, *shape: int) -> torch.Tensor:
        gen = torch.Generator(device=self.tuner.device).manual_seed(0)
        return torch.randn(shape, generator=gen, device=self.tuner.device)

    def weight(self, N: int, K: int, dtype: torch.dtype) -> tuple:
        """The packed weight, as launchers take it."""
        from fastpeft import ops

        weight = ops.quantize_4bit(self.normal(N, K).to(dtype) / K**0.5)
        return weight.packed, weight.scales, weight.quant_type, weight.block_size

    def run_tiles(self, dtype: torch.dtype) -> None:
        N, K = (64, 128) if self.tuner.tiny else SHAPES[0]
        packed = self.weight(N, K, dtype)
        b = self.normal(N, RANK)

        def prepare(mode: str, M: int, module: ModuleType) -> Callable[[dict], torch.Tensor]:
            x, dy, s = (self.normal(M, width).to(dtype) for width in (K, N, RANK))

            def dequantize(tile: dict) -> torch.Tensor:
                out = torch.empty(N, K, dtype=dtype, device=self.tuner.device)
                module.dequantize_4bit(*packed, out, tile=tile)
                return out

            return {
                "plain": dequantize,
                "fwd": lambda tile: module.linear4bit_small(x, *packed, N, s, b, None, None, SCALE, tile=tile),
                "dx": lambda tile: module.linear4bit_small_dx(dy, *packed, K, None, tile=tile),
            }[mode]

        for n, (op, mode, rows) in enumerate(TILES):
            share = self.tuner.left() / (len(TILES) - n)
            self.tuner.tune_tiles(op, mode, rows, dtype, share, partial(prepare, mode, rows), compile_fourbit)

    def wins(self, table: str, N: int, K: int, dtype: torch.dtype, M: int) -> bool:
        packed = self.weight(N, K, dtype)
        x, a, b = self.normal(M, K).to(dtype), self.normal(RANK, K) / K**0.5, self.normal(N, RANK)

        def call(on: bool) -> None:
            with self.way(table, on):
                self.forward(x, *packed, N, a, b, None, None, SCALE, 0.0, None)

        race = Race({"this": lambda: call(True), "other": lambda: call(False)}, self.tuner.device)
        race.run(0.1, min_rounds=1 if self.tuner.tiny else 7, max_rounds=1 if self.tuner.tiny else 31)
        return race.summary("other")["this"]["ratio"] < 1 - MARGIN

    def run(self, dtype: torch.dtype) -> None:
        from fastpeft.kernels._cost import dtype_name, padded_rank

        done = self.tuner.state.setdefault("fourbit", {})
        for N, K in ((64, 128),) if self.tuner.tiny else SHAPES:
            for table, rows in ROWS.items():
                key = (table_keys(self.tuner.arch)[0], dtype_name(dtype), N, K)
                if table == "LEAST_AUGMENTED":
                    key += (padded_rank(RANK),)
                name = f"{table} {key}"
                if name in done or self.tuner.left() <= 0 or (table == "LARGEST_MID" and self.cuda is None):
                    continue
                wins = partial(self.wins, table, N, K, dtype)
                try:
                    done[name] = limit(rows[-1:] if self.tuner.tiny else rows, wins)
                except Exception as error:  # the prediction goes on to serve, and the summary says why
                    self.tuner.still_alive()
                    self.tuner.state["errors"].append(f"{name}: {one_line(error)}")
                    continue
                getattr(self.cost, table)[key] = done[name]
                tables = {each: getattr(self.cost, each) for each in ROWS}
                self.tuner.tables.write("_fourbit_cost", "tuned", format_tables(tables))
                self.tuner.save()
                self.tuner.log(f"tune: {name}: {done[name]} rows")
        for choose in (self.cost.choose_small, self.cost.choose_mid, self.cost.choose_augmented):
            choose.cache_clear()
