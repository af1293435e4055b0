"""Side-by-side timing: peers take turns, in an order drawn anew each round, so heat, clocks, neighbours and what the
peer before left in a cache touch all of them alike.

CPU: one thread, perf_counter. CUDA: device events, L2 flushed before every call, the device kept busy while the host
enqueues so that host time does not leak into a kernel's. Medians and quartiles; ratios are taken round by round.
"""

import contextlib
import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch

FLUSH_BYTES = 256 << 20  # more than any L2 (B200: 126 MB)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
MMAP_MAX = 65536  # glibc's own
SLOW_S = 0.5  # a call this long, once compiled, needs no further warm-up


def steady_cpu() -> None:
    """One thread, and a heap that keeps its pages.

    glibc gives the memory of large tensors back after a free, and 4 MB taken anew cost 1000 page faults, 2 ms: they hit
    whichever peer comes after the trim, not the one that earned them. A training process keeps its heap.
    """
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def with_pages_kept(call: Callable[[], object]) -> Callable[[], object]:
    """`call` with tensors of 32 MiB and more on the heap too, whose pages stay; `call` where malloc is not glibc's.

    glibc maps them anew at each allocation, 8192 page faults for 32 MiB, unless the heap has room: once this has run,
    it has, so what is to pay for its faults goes first.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return call

    def run() -> None:
        libc.mallopt(M_MMAP_MAX, 0)
        try:
            call()
        finally:
            libc.mallopt(M_MMAP_MAX, MMAP_MAX)

    return run


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(q1, median, q3); of one value, itself three times."""
    if len(values) < 2:
        return (values[0],) * 3
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


class Race:
    """Callables timed in turn. `calls` invocations make one sample (host times of a few microseconds need many).

    device: "cpu", "cuda", or "process": CPU time of this process, for cores that other processes share.
    """

    def __init__(self, peers: dict[str, Callable[[], object]], device: str = "cpu", calls: int = 1):
        self.peers, self.device, self.calls = peers, device, calls
        self.samples: dict[str, list[float]] = {name: [] for name in peers}  # seconds per call
        self._order, self._draw = list(peers), random.Random(0)
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda") if device == "cuda" else None

    def _time_cpu(self, peer: Callable[[], object]) -> float:
        now = time.process_time if self.device == "process" else time.perf_counter
        start = now()
        for _ in range(self.calls):
            peer()
        return (now() - start) / self.calls

    def _time_cuda(self, peer: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(2_000_000)  # about a millisecond in which the host runs ahead
        self._flush.sum()  # read, not written: dirty lines would be written back on the peer's time
        start.record()
        for _ in range(self.calls):
            peer()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.calls

    def time_one(self, name: str) -> float:
        time_it = self._time_cuda if self.device == "cuda" else self._time_cpu
        return time_it(self.peers[name])

    def warm_up(self, budget_s: float = 20.0, min_rounds: int = 3, max_rounds: int = 50) -> int:
        """Runs every peer and returns the rounds that fit the budget. No first call is a sample: it may compile."""
        once = 0.0
        for name in self.peers:
            self.time_one(name)
            least = self.time_one(name)
            if least * self.calls <= SLOW_S:
                least = min(least, self.time_one(name))
            once += least * self.calls
        return max(1, min_rounds, min(max_rounds, int(budget_s / max(once, 1e-9))))

    def round(self) -> None:
        """One sample of every peer, in an order of this round."""
        self._draw.shuffle(self._order)
        gc.disable()  # a collection inside one peer's sample is another peer's garbage
        try:
            for name in self._order:
                self.samples[name].append(self.time_one(name))
        finally:
            gc.enable()

    def run(self, budget_s: float = 20.0, min_rounds: int = 3, max_rounds: int = 50) -> "Race":
        """Warm-up and the rounds that fit; max_rounds=1, which only tries a benchmark, goes without a warm-up."""
        if max_rounds == 1:
            self.round()
            return self
        for _ in range(self.warm_up(budget_s, min_rounds, max_rounds)):
            self.round()
        return self

    def summary(self, base: str) -> dict[str, dict]:
        """name -> median, quartiles (s) and the ratio to `base` of the same round, with quartiles."""
        out = {}
        for name, values in self.samples.items():
            q1, median, q3 = quartiles(values)
            r1, ratio, r3 = quartiles([v / b for v, b in zip(values, self.samples[base], strict=True)])
            out[name] = {"median_s": median, "q1_s": q1, "q3_s": q3, "rounds": len(values),
                         "ratio": ratio, "ratio_q1": r1, "ratio_q3": r3}  # fmt: skip
        return out


class Sustained(Race):
    """Callables that run for `seconds` each without a pause, in turn: the clocks and the heat of a training run.

    A sample is the mean over its calls, caches as the calls before left them. At least three calls.
    """

    def __init__(self, peers: dict[str, Callable[[], object]], device: str = "cpu", seconds: float = 0.5):
        super().__init__(peers, device)
        self.seconds = seconds

    def time_one(self, name: str) -> float:
        peer = self.peers[name]
        peer()
        if self.device == "cuda":
            torch.cuda.synchronize()
        ends, started = 3, time.perf_counter()
        for _ in range(ends):
            peer()
        if self.device == "cuda":
            torch.cuda.synchronize()
        calls = max(ends, int(self.seconds / max(1e-9, (time.perf_counter() - started) / ends)))
        started = time.perf_counter()
        for _ in range(calls):
            peer()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls

    def run(self, rounds: int = 2) -> "Sustained":
        """No warm-up: what is timed here has been timed by a Race before."""
        for _ in range(rounds):
            self.round()
        return self


def peak_bytes(peer: Callable[[], object]) -> int:
    """Peak CUDA memory one call takes beyond what was held before it."""
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    peer()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_cpu_bytes(peer: Callable[[], object]) -> int:
    """The same of torch's CPU allocator; what C++ code takes past it is not seen."""
    from torch.profiler import ProfilerActivity, profile

    with _stderr_closed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        peer()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """The profiler's C++ writes two lines there each time it is used."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def kept_bytes(forward: Callable[[], object], own: Iterable[torch.Tensor]) -> int:
    """Bytes autograd keeps for backward beyond the layers' `own` tensors; storage shared by several counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # keeps an address from being given to another tensor

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
        del outputs
    return sum(kept.values())
