"""How a kernel is started: the plan of a call, its compiled code, and the accounting of a launch.

A plan is what a launcher decides before it reads an address: tile, grid, spans, scratch, constants. The function that
makes a plan is wrapped in `@plan`, which caches results by their arguments; so a plan may depend on its arguments and
on nothing else. A `Start` in a plan is one launch. Its first call goes through Triton's JIT, which specialises,
compiles or finds the code; later calls go to the launcher of the compiled kernel, with a tenth of the Python.

Triton compiles again for other dtypes and constants, and for a number that is 1, a multiple of 16, or over 31 bits. All
of that follows from a plan's arguments. Triton also tells addresses that are multiples of 16 from others. A plan's
arguments say nothing about addresses, so each call checks them (`aligned`); odd ones go through the JIT every time.

Accounting. Inside `with count_launches() as launches:` every launch appends a `Launch`. Bytes are those of the elements
moved by design, caches ignored. Launchers called with meta tensors record and allocate but launch nothing; inside
`with captured() as launches:` they append what they would have launched.
"""

import contextlib
import threading
from functools import lru_cache
from typing import NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastpeft.kernels._gpu import Gpu

PLANS = 2048  # kept per launcher, the oldest dropped first; a plan takes about a kilobyte


class Launch(NamedTuple):
    """One device launch. weight_bytes: frozen weight, the same in every strategy; scratch_bytes: split partial sums."""

    name: str
    flop: int
    read_bytes: int
    written_bytes: int
    weight_bytes: int = 0
    scratch_bytes: int = 0


class Captured(NamedTuple):
    """What a launch on meta tensors would have started: `kernel[grid](*args, **constants)`."""

    kernel: object
    grid: tuple
    args: tuple
    constants: dict


_counting: list[list[Launch]] = []
_capturing: list[list[Captured]] = []
_clear: list = []
_meta_gpu = (90, 4)  # (arch, SMs) assumed for meta tensors and the interpreter


@contextlib.contextmanager
def count_launches():
    """Collect the launches of this process; nested counts each see the launches inside them.

    All threads are counted, because autograd runs the backward of CUDA tensors on its own thread: two threads that
    count at the same time see each other's launches.
    """
    launches = []
    _counting.append(launches)
    try:
        yield launches
    finally:
        _counting[:] = [each for each in _counting if each is not launches]


def record(name, flop, read_bytes, written_bytes, weight_bytes=0, scratch_bytes=0):
    """Append a `Launch` to every active `count_launches`."""
    for launches in _counting:
        launches.append(Launch(name, flop, read_bytes, written_bytes, weight_bytes, scratch_bytes))


@contextlib.contextmanager
def captured(gpu=_meta_gpu):
    """Collect what launchers would start if their meta tensors were on this (arch, SMs)."""
    global _meta_gpu
    before, launches = _meta_gpu, []
    _meta_gpu = gpu
    _capturing.append(launches)
    clear_plans()
    try:
        yield launches
    finally:
        _meta_gpu = before
        _capturing.remove(launches)
        clear_plans()


def plan(function):
    """Cache the results of `function` by its arguments."""
    kept = lru_cache(maxsize=PLANS)(function)
    kept_with_plans(kept.cache_clear)
    return kept


def kept_with_plans(clear):
    """Register `clear`, which drops something derived from tile tables, as plans are."""
    _clear.append(clear)


def clear_plans():
    """Drop every plan, after a change of a tile table."""
    for clear in _clear:
        clear()


@lru_cache
def _gpu(device):
    """(Gpu, SMs). torch gives the memory clock in kHz and the bus width in bits; there are two transfers per clock."""
    props = torch.cuda.get_device_properties(device)
    clock, width = (getattr(props, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    found = Gpu(10 * props.major + props.minor, props.name, 2 * 1e3 * clock * width / 8)
    return found, props.multi_processor_count


def arch_of(device):
    """The `Gpu` of a device (or of a tensor's), its compute capability as 10 * major + minor."""
    device = getattr(device, "device", device)
    return (_gpu(device) if device.type == "cuda" else _meta_gpu)[0]


def sm_count(device):
    """Programs of a persistent grid."""
    return (_gpu(device) if device.type == "cuda" else _meta_gpu)[1]


def current_gpu():
    """The argument of `captured` for the current CUDA device; without one, for the GPU that meta tensors assume."""
    return _gpu(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else _meta_gpu


def aligned(*tensors):
    """Whether 16 divides the address of each; one on the meta device counts as aligned."""
    low = 0
    for tensor in tensors:
        low |= tensor.data_ptr()
    return not low & 15


@contextlib.contextmanager
def _without_compiler():
    """Raise a clear error if a CUDA graph is being captured, before Triton compiles and so aborts the capture."""
    here, before = threading.get_ident(), knobs.runtime.jit_cache_hook

    def refuse(**compile):
        if threading.get_ident() != here:
            return before(**compile) if before else None
        raise RuntimeError(
            f"fastpeft: {compile['fn'].name} must be compiled before a CUDA graph is captured; "
            "run the step once on these shapes, or fastpeft.warmup(model, tokens)"
        )

    knobs.runtime.jit_cache_hook = refuse
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


def _jit(kernel, grid, device, args, constants):
    """The compiled kernel that Triton launched; None under the interpreter."""
    if device.type != "cuda":
        return kernel[grid](*args, **constants)
    capturing = torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device), _without_compiler() if capturing else contextlib.nullcontext():
        return kernel[grid](*args, **constants)


def _watched():
    """Whether a profiler has hooked Triton's launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return getattr(enter, "calls", enter) or getattr(leave, "calls", leave)


class Start:
    """One launch of a plan: `kernel` over `grid`, with the numbers and constants that the plan has settled.

    The kernel's parameters are in this order: pointers, numbers, floats that change from call to call, constants.
    """

    __slots__ = ("_fast", "constants", "device", "grid", "kernel", "launch", "numbers")

    def __init__(self, kernel, grid, device, numbers, constants, launch=None):
        self.kernel, self.grid, self.device, self.numbers = kernel, grid, device, numbers
        self.constants, self.launch = constants, launch
        self._fast = None

    def __call__(self, pointers, floats=(), aligned=True):
        """Launch. aligned: whether 16 divides the address of every tensor that the launcher was given."""
        if _counting and self.launch is not None:
            record(*self.launch)
        fast = self._fast
        if fast is None or not aligned or _watched():
            self._through_jit(pointers, floats, aligned)
            return
        index, run, x, y, z, function, metadata, numbers, values = fast
        active = driver.active
        if active.get_current_device() != index:
            with torch.cuda.device(index):
                stream = active.get_current_stream(index)
                run(x, y, z, stream, function, metadata, None, None, None, *pointers, *numbers, *floats, *values)
            return
        stream = active.get_current_stream(index)
        run(x, y, z, stream, function, metadata, None, None, None, *pointers, *numbers, *floats, *values)

    def _through_jit(self, pointers, floats, aligned):
        args = (*pointers, *self.numbers, *floats)
        if 0 in self.grid:
            return
        if self.device.type == "meta":
            for launches in _capturing:
                launches.append(Captured(self.kernel, self.grid, args, self.constants))
            return
        compiled = _jit(self.kernel, self.grid, self.device, args, self.constants)
        if not aligned or not isinstance(compiled, CompiledKernel):
            return
        params = self.kernel.params
        values = tuple(self.constants[each.name] for each in params if each.is_constexpr)
        assert len(args) + len(values) == len(params), f"{self.kernel.__name__}: parameters out of order"
        index = driver.active.get_current_device() if self.device.index is None else self.device.index
        grid = (*self.grid, 1, 1)[:3]
        self._fast = (index, compiled.run, *grid, compiled.function, compiled.packed_metadata, self.numbers, values)


def launch(kernel, grid, like, args, constants):
    """Run `kernel` over `grid` on the device of tensor `like`, without a plan; for kernels run once per process."""
    Start(kernel, grid, like.device, args, constants)._through_jit((), (), False)
