"""Times tile candidates and strategies on this GPU and writes the winners into the tables the kernels read.

Written: the dict between `# tiles: begin` and `# tiles: end` of each kernel file, kernels/_strategy_table.py and, by
tune/fourbit.py, the tiles of the 4-bit kernels and the tables of kernels/_fourbit_cost.py; each under a temporary
name, then renamed. A search walks one tile key at a time from the table's current entry (a candidate is a compile of
seconds, so no full grid); a winner must compute what the current entry does before it is written.
Resumable: bench/results/tune_state.json holds every timing; what is done for these sources and this GPU is not redone.
"""

import importlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from common import tree
from common.roofline import copy_bandwidth
from common.timing import Race
from compile.pool import Pool
from fastpeft.kernels import _common, _launch
from fastpeft.kernels._gpu import as_gpu
from tune.jobs import JOBS, SCALE, SHAPES, P, compile_tile, tensors
from tune.tables import Tables, format_strategies, format_tiles, neighbours, own_entries

MARGIN = 0.02  # a challenger must be faster by the margin: less is the spread of one run


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def task_name(op: str, mode: str, R: int, tile: dict) -> str:
    return f"{op} {mode} {R} {json.dumps(tile, sort_keys=True)}"


class Tuner:
    """One run: the budget, the state file and the tables of the kernel modules."""

    def __init__(self, device: str, budget_s: float, root: Path, tiny: bool = False, log: Callable = print,
                 fresh: bool = False):  # fmt: skip
        self.device, self.tiny, self.log, self.root = device, tiny, log, root
        self.deadline = time.monotonic() + budget_s
        self.arch = as_gpu(_launch.arch_of(torch.empty(0, device=device)))
        self.tables = Tables(root, tree.RESULTS / ("tuned_tables_tiny.json" if tiny else "tuned_tables.json"))
        self.pool: Pool | None = None
        self.compiled: dict[str, str | None] = {}  # tasks of the pool that are done, and what went wrong
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
        self.tables.write("_gpu_table", "tuned", body)
        _cost.choose_strategy.cache_clear()
        self.save()
        self.log(f"tune: {self.arch.name} copies {rate / 1e12:.2f} TB/s")

    def works(self, job: dict, call: Callable[[dict], object], tile: dict) -> bool:
        """Whether the tile compiles and runs; what fails is remembered with the reason."""
        name = json.dumps(tile, sort_keys=True)
        if name not in job["failed"]:
            try:
                call(tile)
            except Exception as error:  # a candidate may exceed shared memory or break the compiler: not a winner
                job["failed"][name] = one_line(error)
                self.save()
                self.still_alive()
        return name not in job["failed"]

    def race(self, job: dict, call: Callable[[dict], object], start: dict, others: list[dict]) -> dict[str, float]:
        """Time over that of the incumbent `start`, which takes its turn in every round; by the tile's JSON."""
        tiles = {json.dumps(tile, sort_keys=True): tile for tile in (start, *others)}
        peers = {name: (lambda tile=tile: call(tile)) for name, tile in tiles.items()}
        rounds = 1 if self.tiny else 11
        raced = Race(peers, self.device).run(0.1 * len(peers), min_rounds=min(5, rounds), max_rounds=rounds)
        rows = raced.summary(json.dumps(start, sort_keys=True))
        job["seconds"] |= {name: row["median_s"] for name, row in rows.items()}
        self.save()
        return {name: row["ratio"] for name, row in rows.items()}

    def precompile(self, wanted: list[tuple[str, str, int, dict, Callable[..., object]]]) -> None:
        """(op, mode, R, tile, task) in processes, each once; without a pool none. What fails is not tried again."""
        tasks = {task_name(*job): (task, tuple(job)) for *job, task in wanted if task_name(*job) not in self.compiled}
        if self.pool is None or not tasks:
            return
        started, failed = time.monotonic(), 0
        for name, _, error in self.pool.run(tasks, min(self.deadline, started + 0.5 * self.left())):
            self.compiled[name] = error
            failed += error is not None
        self.log(f"tune: {len(tasks)} candidates compiled in {time.monotonic() - started:.0f} s, {failed} failed")

    def first(self, op: str, mode: str, R: int, dtype: torch.dtype, task: Callable) -> list[tuple]:
        """What `precompile` takes of a job before it begins."""
        found = self.candidates(op, mode, R, dtype)
        return [] if found is None else [(op, mode, R, tile, task) for tile in neighbours(*found[1:])]

    def still_alive(self) -> None:
        """Raises if the failure took the CUDA context with it: later candidates would fail for no fault of theirs."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def candidates(self, op: str, mode: str, R: int, dtype: torch.dtype) -> tuple[ModuleType, dict, list[dict]] | None:
        """(module, the table's tile, what else there is to try); None where this GPU has no such kernel."""
        module = importlib.import_module(f"fastpeft.kernels.{op}")
        # The fused GEMM needs TMA; sm_120 and above read the tables of sm_80 (kernels/_common.py), not their own.
        if mode not in module.MODES or self.arch >= 120 or (op == "lora_linear_fused" and self.arch < 90):
            return None
        start = _common.lookup_tile(module.TILES, self.arch, dtype, R, mode)
        return module, start, module.tile_space(self.arch, dtype, R, mode)

    def tune_tiles(
        self, op: str, mode: str, R: int, dtype: torch.dtype, job_s: float, prepare: Callable[[ModuleType], Callable],
        task: Callable[..., object] = compile_tile,
    ) -> None:  # fmt: skip
        """Tiles of one kernel's mode at rank R, or what stands for it; `prepare(module)` is called with a tile, `task`
        compiles one.

        A step races the incumbent and its neighbours in turn and moves to the fastest, until none wins by the margin.
        """
        found = self.candidates(op, mode, R, dtype)
        if found is None:
            return
        module, start, space = found
        key_dtype = _common.dtype_key(dtype)
        name = f"{op} {mode} sm{int(self.arch)} {key_dtype} r={R}"
        job = self.state["jobs"].setdefault(name, {"seconds": {}, "failed": {}, "done": False})
        if job["done"] or self.left() <= 0:
            return
        call = prepare(module)
        deadline = min(self.deadline, time.monotonic() + job_s)
        job["failed"].pop(json.dumps(start, sort_keys=True), None)  # what failed once may be no fault of the tile
        if not self.works(job, call, start):  # nothing to compare another tile's result with
            self.state["errors"].append(f"{name}: the table's tile fails, {list(job['failed'].values())[-1]}")
            return
        best, gain = start, 1.0
        while time.monotonic() < deadline:
            near = neighbours(best, space)[: 1 if self.tiny else None]
            self.precompile([(op, mode, R, tile, task) for tile in near])
            near = [tile for tile in near if self.compiled.get(task_name(op, mode, R, tile)) is None]
            near = [tile for tile in near if time.monotonic() < deadline and self.works(job, call, tile)]
            ratios = self.race(job, call, best, near)
            fastest = min(near, key=lambda tile: ratios[json.dumps(tile, sort_keys=True)], default=best)
            ratio = ratios[json.dumps(fastest, sort_keys=True)]
            if fastest is best or ratio >= 1 - MARGIN or not self.agrees(call, start, fastest):
                break
            best, gain = fastest, gain * ratio
            self.write_tile(module, op, (self.arch.name or int(self.arch), key_dtype, mode), R, best)
            job["winner"] = best
            if self.tiny:
                break
        job["done"] = not self.left() <= 0
        self.save()
        seconds = job["seconds"].get(json.dumps(best, sort_keys=True), 0.0)
        self.log(f"tune: {name}: {seconds * 1e6:.1f} us, {gain:.3f} of the table's; {len(job['seconds'])} timed, "
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
        self.tables.write(op, "tiles", format_tiles(module.TILES))

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
            self.state["errors"].append(f"fused {side} {M}x{K}->{N} r={R} p={p}: {one_line(error)}")
            _strategy_table.TABLE[key] = "accumulate"
            self.tables.write("_strategy_table", "tuned", format_strategies(_strategy_table.TABLE))
            return
        race.run(0.3, min_rounds=1 if self.tiny else 7, max_rounds=1 if self.tiny else 31)
        rows = race.summary("accumulate")
        choice = "fused" if rows["fused"]["ratio"] < 1 - MARGIN else "accumulate"
        self.state["strategies"][str(key)] = {"choice": choice, **{s: r["median_s"] for s, r in rows.items()}}
        _strategy_table.TABLE[key] = choice
        self.tables.write("_strategy_table", "tuned", format_strategies(_strategy_table.TABLE))
        _cost.choose_strategy.cache_clear()
        self.save()
        self.log(f"tune: {side} {M}x{K}->{N} r={R} p={p}: fused / accumulate {rows['fused']['ratio']:.3f} -> {choice}")

    def run(self, ranks: tuple[int, ...] = (16, 64)) -> dict:
        """Every job in order until the budget is spent: tiles of all modes by rank, then strategies; the state."""
        dtype = torch.float16 if self.device == "cpu" else torch.bfloat16  # the interpreter's bf16 dot is wrong
        shapes = ((16, 64, 64),) if self.tiny else SHAPES
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
