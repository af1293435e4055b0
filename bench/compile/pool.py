"""Compiles Triton kernels in processes before anything is timed: each specialisation once, for the JIT's own cache.

A task is a function of this checkout and its arguments. It runs launchers on meta tensors with their launch captured;
what they would have launched is compiled by the JIT's warm-up, which needs a GPU's driver and no memory of it.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heapreplace
from typing import NamedTuple

from common import tree
from compile.signature import signature
from fastpeft.kernels import _launch
from fastpeft.kernels._gpu import Gpu

STARTUP = 8.0  # seconds until a process has imported torch and triton and made a CUDA context
UNKNOWN = 5.0  # seconds of a compile that no results file has
GPU_90 = Gpu(90)
STALLED = 40.0  # seconds without any result: a worker has crashed with its task, and a compile takes 20 at most


class Specialisation(NamedTuple):
    """What the JIT would compile, and where it was launched."""

    kernel: object
    grid: tuple
    args: tuple
    tile: dict

    @property
    def key(self) -> str:
        """What the JIT tells apart."""
        constants = {name: value for name, value in self.tile.items() if name not in ("num_warps", "num_stages")}
        told_apart = signature(self.kernel, self.args, constants)
        return repr((self.kernel.__name__, told_apart, sorted(self.tile.items())))

    @property
    def like(self) -> tuple[str, bool]:
        """(kernel, with dropout): specialisations that take about as long to compile."""
        return self.kernel.__name__, bool(self.tile.get("DROPOUT"))

    def compile(self) -> None:
        """Into the JIT's cache, on disk."""
        self.kernel.warmup(*self.args, grid=self.grid, **self.tile)


@contextmanager
def captured(gpu: Gpu = GPU_90) -> Iterator[dict[str, Specialisation]]:
    """Distinct specialisations launched within on meta tensors, were these on such a GPU, by their key; on leaving."""
    found: dict[str, Specialisation] = {}
    with _launch.captured((gpu, 132)) as launches:
        yield found
    for launch in launches:
        each = Specialisation(*launch)
        found.setdefault(each.key, each)


def compile_seconds() -> dict[tuple[str, bool], float]:
    """Mean seconds of a compile for sm_90, by `Specialisation.like`, of the slower of Triton's releases on file."""
    out: dict[tuple[str, bool], float] = {}
    for path in sorted(tree.ROOT.glob("bench/results/kernels_triton*.json")):
        times: dict[tuple[str, bool], list[float]] = {}
        for row in json.loads(path.read_text())["rows"]:
            if row["arch"] == 90:
                times.setdefault((row["kernel"], "DROPOUT=1" in row["config"]), []).append(row["seconds"])
        for key, seconds in times.items():
            out[key] = max(out.get(key, 0.0), sum(seconds) / len(seconds))
    return out


def expected_seconds(like: tuple[str, bool], each: dict[tuple[str, bool], float]) -> float:
    return each.get(like, UNKNOWN)


def makespan(seconds: list[float], workers: int, startup: float = 0.0) -> float:
    """When the last of the jobs ends, taken in this order by whoever is free; startup: before each job."""
    ends = [0.0] * workers
    for each in seconds:
        heapreplace(ends, ends[0] + startup + each)
    return max(ends)


def _attempt(function: Callable[..., object], arguments: tuple) -> tuple[float, str | None]:
    """(seconds, what went wrong)."""
    started = time.monotonic()
    try:
        function(*arguments)
    except Exception as error:  # a candidate may break the compiler: its row says how
        said = (str(error).strip().splitlines() or [""])[0]
        return time.monotonic() - started, f"{type(error).__name__}: {said[:160]}"
    return time.monotonic() - started, None


class Pool:
    """Processes that compile. One that crashes costs its own task: it is started again."""

    STARTUP = STARTUP

    @staticmethod
    def count() -> int:
        """One core is left for the process that waits, and for nvcc's driver."""
        return max(1, (os.cpu_count() or 2) - 1)

    def __init__(self, workers: int | None = None):
        self.workers = workers or self.count()
        self._pool = multiprocessing.get_context("spawn").Pool(self.workers)

    def run(self, tasks: dict[str, tuple[Callable[..., object], tuple]], deadline: float) -> Iterator[tuple]:
        """(name, seconds, error or None) as tasks end, until `deadline` (time.monotonic) or a stall."""
        pending = {name: self._pool.apply_async(_attempt, task) for name, task in tasks.items()}
        last = time.monotonic()
        while pending and time.monotonic() < deadline and time.monotonic() - last < STALLED + STARTUP:
            ready = [name for name, result in pending.items() if result.ready()]
            for name in ready:
                yield name, *pending.pop(name).get()
                last = time.monotonic()
            if not ready:
                time.sleep(0.05)
        for name in pending:
            yield name, 0.0, "out of time, or its process crashed"

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()
