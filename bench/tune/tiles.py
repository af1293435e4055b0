"""Times tile candidates and strategies on this GPU and writes the winners into the tables the kernels read.

Written: the dict between `# tiles: begin` and `# tiles: end` of each kernel file, kernels/_strategy_table.py and, by
tune/fourbit.py, the tiles of the 4-bit kernels and the tables of kernels/_fourbit_cost.py; each under a temporary
name, then renamed. A search walks one tile key at a time from the table's current entry (a candidate is a compile of
seconds, so no full grid); a winner must compute what the current entry does before it is written.
Resumable: bench/results/tune_state.json holds every timing; what is done for these sources and this GPU is not redone.
"""

import importlib
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from common import tree
from common.roofline import copy_bandwidth
from common.timing import Race, quartiles
from fastpeft.kernels._gpu import as_gpu
from tune import conv

SCALE, P, MARGIN = 2.0, 0.1, 0.02  # a challenger must be faster by the margin: less is the spread of one run
SHAPES = ((8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (2048, 4096, 4096))  # M, N, K

# (op, mode) -> the launcher call that runs this mode's kernel; in order of what a training step spends.
JOBS: dict[tuple[str, str], Callable] = {
    ("lora_shrink", "dropout"): lambda m, t, tile: m.lora_shrink(t.x, t.a, P, t.seed, tile=tile),
    ("lora_shrink", "plain"): lambda m, t, tile: m.lora_shrink(t.x, t.a, 0.0, None, tile=tile),
    ("lora_grad_a", "dropout"): lambda m, t, tile: m.lora_grad_a(t.x, t.ds, t.a, P, t.seed, True, True, tile=tile),
    ("lora_grad_a", "plain"): lambda m, t, tile: m.lora_grad_a(t.x, t.ds, t.a, 0.0, None, True, True, tile=tile),
    ("lora_grad_b", "plain"): lambda m, t, tile: m.lora_grad_b(t.dy, t.s, t.b, SCALE, True, False, tile=tile),
    ("lora_expand", "plain"): lambda m, t, tile: m.lora_expand(t.s, t.b, None, None, SCALE, tile=tile),
    ("lora_linear_fused", "fwd"): lambda m, t, tile: m.lora_linear_fused_fwd(
        t.x, t.w, t.s, t.b, None, None, SCALE, tile=tile),
    ("lora_linear_fused", "dx"): lambda m, t, tile: m.lora_linear_fused_dx(t.dy, t.w, t.ds, t.a, P, t.seed, tile=tile),
    ("lora_grad_b", "rows"): lambda m, t, tile: m.lora_grad_b(t.dy, t.s, t.b, SCALE, False, False, tile=tile),
} | conv.JOBS  # fmt: skip


def tensors(M: int, N: int, K: int, R: int, dtype: torch.dtype, device: str) -> SimpleNamespace:
    gen = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=gen, device=device) * std).to(dtype)

    return SimpleNamespace(
        x=normal(M, K), w=normal(N, K, std=K**-0.5), dy=normal(M, N), s=normal(M, R), ds=normal(M, R, std=0.1),
        a=normal(R, K, std=K**-0.5, dtype=torch.float32), b=normal(N, R, std=0.05, dtype=torch.float32),
        seed=torch.tensor([20260101], dtype=torch.int64, device=device),
    )  # fmt: skip


def format_tiles(tiles: dict) -> str:
    """The dict literal of a kernel file's TILES, one entry a line, in a stable order."""
    lines = []
    for key in sorted(tiles, key=str):
        values = ", ".join(f"{name}={value!r}" for name, value in tiles[key].items())
        literal = ", ".join(f'"{part}"' if isinstance(part, str) else repr(part) for part in key)
        lines.append(f"    ({literal}): dict({values}),")
    return "TILES = {\n" + "\n".join(lines) + "\n}"


def replace_section(path: Path, marker: str, body: str) -> None:
    """Rewrites what stands between `# <marker>: begin` and `# <marker>: end`. ValueError without exactly one pair."""
    text = path.read_text()
    pattern = re.compile(rf"(# {marker}: begin[^\n]*\n).*?(# {marker}: end)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"tune: {path.name} must hold one pair of '# {marker}: begin/end' comments")
    tree.write_atomic(path, pattern.sub(lambda match: f"{match[1]}{body}\n{match[2]}", text))


def write_strategies(path: Path, table: dict) -> None:
    """kernels/_strategy_table.py with these entries."""
    lines = ["TABLE: dict[tuple, str] = {"]
    lines += [f"    {key!r}: {table[key]!r},".replace("'", '"') for key in sorted(table, key=str)]
    replace_section(path, "tuned", "\n".join([*lines, "}"]) if table else "TABLE: dict[tuple, str] = {}")


def own_entries(tiles: dict, owner: int | str, dtype: str, mode: str, lookup: Callable[[int], dict]) -> dict:
    """Entries of this exact device or arch for (dtype, mode); where it has none, copies of those it falls back to.

    All of them, not just the tuned rank's: a lookup takes the owner first, so a lone entry would hide the rest.
    """
    mine = {key: tile for key, tile in tiles.items() if key[:3] == (owner, dtype, mode)}
    if mine:
        return mine
    ranks = {key[3] for key in tiles if key[1:3] == (dtype, mode)}
    return {(owner, dtype, mode, rank): dict(lookup(rank)) for rank in ranks}


def neighbours(tile: dict, space: list[dict]) -> list[dict]:
    """Candidates that differ from `tile` in one key."""
    return [other for other in space if sum(other.get(k) != tile.get(k) for k in {*other, *tile}) == 1]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


class Tuner:
    """One run: the budget, the state file and the tables of the kernel modules."""

    def __init__(self, device: str, budget_s: float, root: Path, tiny: bool = False, log: Callable = print,
                 fresh: bool = False):  # fmt: skip
        self.device, self.tiny, self.log, self.root = device, tiny, log, root
        self.deadline = time.monotonic() + budget_s
        from fastpeft.kernels._launch import arch_of

        self.arch = as_gpu(arch_of(torch.empty(0, device=device)))
        self.state_path = tree.RESULTS / ("tune_state_tiny.json" if tiny else "tune_state.json")
        stamp = tree.stamp(device)
        self.state = {"stamp": stamp, "jobs": {}, "strategies": {}, "errors": []}
        if self.state_path.exists() and not fresh:
            loaded = json.loads(self.state_path.read_text())
            if loaded.get("stamp") == stamp:
                self.state = loaded | {"errors": []}  # of this run alone: what failed before is tried again

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        tree.write_atomic(self.state_path, json.dumps(self.state, indent=1))

    def measure_copy(self) -> None:
        """The copy rate of this device, which the cost model takes in place of its data sheet's."""
        from fastpeft.kernels import _cost, _gpu_table

        if not self.arch.name or self.arch.name in self.state.setdefault("copy", {}):
            return
        rate = self.state["copy"][self.arch.name] = copy_bandwidth(self.device, self.tiny)
        _gpu_table.COPY_RATE[self.arch.name] = float(f"{rate:.3g}")
        entries = [f'    "{name}": {_gpu_table.COPY_RATE[name]:.3g},' for name in sorted(_gpu_table.COPY_RATE)]
        body = "\n".join(["COPY_RATE: dict[str, float] = {", *entries, "}"])
        replace_section(self.root / "_gpu_table.py", "tuned", body)
        _cost.choose_strategy.cache_clear()
        self.save()
        self.log(f"tune: {self.arch.name} copies {rate / 1e12:.2f} TB/s")

    def time_tile(self, job: dict, call: Callable[[dict], object], tile: dict) -> float:
        """Median seconds; infinite for a tile that does not compile or does not fit. Remembered in the state."""
        name = json.dumps(tile, sort_keys=True)
        if name in job["failed"]:
            return float("inf")
        if name not in job["seconds"]:
            try:
                race = Race({"tile": lambda: call(tile)}, self.device).run(
                    0.05, min_rounds=1 if self.tiny else 3, max_rounds=15
                )
                job["seconds"][name] = quartiles(race.samples["tile"])[1]
            except Exception as error:  # a candidate may exceed shared memory or break the compiler: not a winner
                job["failed"][name] = _one_line(error)
                self.save()
                self.still_alive()
                return float("inf")
            self.save()
        return job["seconds"][name]

    def still_alive(self) -> None:
        """Raises if the failure took the CUDA context with it: later candidates would fail for no fault of theirs."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def tune_tiles(
        self, op: str, mode: str, R: int, dtype: torch.dtype, job_s: float, prepare: Callable[[ModuleType], Callable]
    ) -> None:
        """Tiles of one kernel's mode at rank R, or what stands for it; `prepare(module)` is called with a tile."""
        module = importlib.import_module(f"fastpeft.kernels.{op}")
        from fastpeft.kernels import _common

        # The fused GEMM needs TMA; sm_120 and above read the tables of sm_80 (kernels/_common.py), not their own.
        if mode not in module.MODES or self.arch >= 120 or (op == "lora_linear_fused" and self.arch < 90):
            return
        key_dtype = _common.dtype_key(dtype)
        name = f"{op} {mode} sm{int(self.arch)} {key_dtype} r={R}"
        job = self.state["jobs"].setdefault(name, {"seconds": {}, "failed": {}, "done": False})
        if job["done"] or self.left() <= 0:
            return
        call = prepare(module)
        start = _common.lookup_tile(module.TILES, self.arch, dtype, R, mode)
        space = module.tile_space(self.arch, dtype, R, mode)
        deadline = min(self.deadline, time.monotonic() + job_s)

        job["failed"].pop(json.dumps(start, sort_keys=True), None)  # what failed once may be no fault of the tile
        best, best_s = start, self.time_tile(job, call, start)
        if best_s == float("inf"):  # nothing to compare another tile's result with
            self.state["errors"].append(f"{name}: the table's tile fails, {list(job['failed'].values())[-1]}")
            return
        base_s, moved = best_s, True
        while moved and time.monotonic() < deadline:
            moved = False
            for tile in neighbours(best, space)[: 1 if self.tiny else None]:
                if time.monotonic() > deadline:
                    break
                seconds = self.time_tile(job, call, tile)
                if seconds < best_s:
                    best, best_s, moved = tile, seconds, True
            moved = moved and not self.tiny
        if best is not start and best_s < base_s * (1 - MARGIN) and self.agrees(call, start, best):
            self.write_tile(module, op, (self.arch.name or int(self.arch), key_dtype, mode), R, best)
            job["winner"] = best
        job["done"] = not self.left() <= 0
        self.save()
        self.log(f"tune: {name}: {base_s * 1e6:.1f} -> {best_s * 1e6:.1f} us, {len(job['seconds'])} timed, "
                 f"{len(job['failed'])} failed")  # fmt: skip

    def agrees(self, call: Callable[[dict], object], old: dict, new: dict) -> bool:
        """Whether the tile changes the result by no more than the order of an fp32 sum rounded to the dtype."""

        def flat(result) -> list[torch.Tensor]:
            return [q for q in (result if isinstance(result, tuple) else (result,)) if q.numel()]

        for was, now in zip(flat(call(old)), flat(call(new)), strict=True):
            eps = torch.finfo(was.dtype).eps if was.dtype != torch.float32 else 1e-5
            if not bool((was.float() - now.float()).abs().max() <= 4 * eps * was.float().abs().max()):
                self.log(f"tune: {new} computes something else than {old}: not taken")
                return False
        return True

    def write_tile(self, module: ModuleType, op: str, prefix: tuple, R: int, tile: dict) -> None:
        from fastpeft.kernels import _common, _launch

        dtype = torch.bfloat16 if prefix[1] == "half" else torch.float32

        def lookup(rank: int) -> dict:
            return _common.lookup_tile(module.TILES, self.arch, dtype, rank, prefix[2])

        mine = own_entries(module.TILES, *prefix, lookup)
        buckets = sorted(key[3] for key in mine)
        if R not in buckets and buckets[-1] > R:  # a bucket of its own, so that larger ranks keep their tile
            buckets.append(R)
        bucket = R if R in buckets else buckets[-1]
        module.TILES.update({**mine, (*prefix, bucket): tile})
        _launch.clear_plans()
        replace_section(self.root / f"{op}.py", "tiles", format_tiles(module.TILES))

    def tune_strategy(self, M: int, N: int, K: int, R: int, p: float, dtype: torch.dtype) -> None:
        """Times both strategies of each pass, and writes the faster for this size bucket."""
        from fastpeft.kernels import lora_linear

        t, needs = tensors(M, N, K, R, dtype, self.device), (True, True, True, False)
        seed, sizes = t.seed if p else None, (M, N, K, R, p, dtype)
        forward = partial(lora_linear.lora_linear_fwd, t.x, t.w, t.a, t.b, None, None, SCALE, p, seed)
        backward = partial(lora_linear.lora_linear_bwd, t.dy, t.x, t.w, t.a, t.b, t.s, SCALE, p, seed, *needs)
        self.tune_pass("forward", lambda strategy: forward(strategy=strategy), sizes)
        self.tune_pass("backward", lambda strategy: backward(strategy=strategy), sizes)

    def tune_pass(self, side: str, step: Callable[[str], object], sizes: tuple) -> None:
        from fastpeft.kernels import _cost, _strategy_table

        key, (M, N, K, R, p, _) = _cost.strategy_key(side, *sizes, self.arch), sizes
        if str(key) in self.state["strategies"] or self.left() <= 0:
            return
        race = Race({s: (lambda s=s: step(s)) for s in _cost.STRATEGIES}, self.device)
        try:
            step("fused")
        except Exception as error:  # then the vendor's GEMM serves, and the summary says why
            self.still_alive()
            self.state["errors"].append(f"fused {side} {M}x{K}->{N} r={R} p={p}: {_one_line(error)}")
            _strategy_table.TABLE[key] = "accumulate"
            write_strategies(self.root / "_strategy_table.py", _strategy_table.TABLE)
            return
        race.run(0.3, min_rounds=1 if self.tiny else 7, max_rounds=1 if self.tiny else 31)
        rows = race.summary("accumulate")
        choice = "fused" if rows["fused"]["ratio"] < 1 - MARGIN else "accumulate"
        self.state["strategies"][str(key)] = {"choice": choice, **{s: r["median_s"] for s, r in rows.items()}}
        _strategy_table.TABLE[key] = choice
        write_strategies(self.root / "_strategy_table.py", _strategy_table.TABLE)
        _cost.choose_strategy.cache_clear()
        self.save()
        self.log(f"tune: {side} {M}x{K}->{N} r={R} p={p}: fused / accumulate {rows['fused']['ratio']:.3f} -> {choice}")

    def run(self, ranks: tuple[int, ...] = (16, 64)) -> dict:
        """Every job in order until the budget is spent: tiles of all modes by rank, then strategies; the state."""
        dtype = torch.float16 if self.device == "cpu" else torch.bfloat16  # the interpreter's bf16 dot is wrong
        shapes = ((32, 256, 256),) if self.tiny else SHAPES
        strategies = [(*shape, R, p) for R in ranks for shape in shapes for p in ((0.0,) if self.tiny else (0.0, P))]
        reserve = 0.25 * self.left()  # for the strategies, which need the tuned tiles
        end, self.deadline = self.deadline, self.deadline - reserve
        for i, R in enumerate(ranks):
            t = tensors(*shapes[0], R, dtype, self.device)
            for n, ((op, mode), job) in enumerate(JOBS.items()):
                share = self.left() / max(1, (len(ranks) - i) * len(JOBS) - n)
                self.tune_tiles(op, mode, R, dtype, share, lambda module, job=job, t=t: partial(job, module, t))
        self.deadline = end
        from fastpeft.kernels import _cost

        if _cost.fused_serves(self.arch):  # elsewhere there is nothing to choose
            for M, N, K, R, p in strategies:
                self.tune_strategy(M, N, K, R, p, dtype)
        self.save()
        return self.state
