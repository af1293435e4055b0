"""The kernels that Triton must compile for captured launches, and their compilation in another process.

Triton itself names them: each captured launch goes through its JIT, which specialises the kernel and is stopped where
it would compile. Its description there suffices to compile without a GPU; the code goes into Triton's cache on disk,
where the JIT of the first process then finds it.

    python -m fastpeft.kernels._warm        a worker: one JSON list per line of stdin is a job; each answers by a line
"""

import importlib
import json
import sys
import threading
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver


class Job(NamedTuple):
    """A kernel to compile. said: Triton's description, as `JITFunction.preload` takes it; target: for `GPUTarget`."""

    module: str
    name: str
    said: str
    target: tuple[str, int, int]


def _through_jit(launch):
    """The compiled kernel, launched nowhere."""
    return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.constants)


def missing(launches):
    """Every `Job` of these launches, on the current device, that this process has not compiled yet."""
    target = driver.active.get_current_target()
    here, before, found = threading.get_ident(), knobs.runtime.jit_cache_hook, {}

    def note(**compile):
        if threading.get_ident() != here:
            return before(**compile) if before else None
        said, kernel = compile["compile"]["specialization_data"], compile["fn"]
        found[kernel.module, kernel.name, said] = (target.backend, target.arch, target.warp_size)
        return True  # compile nothing

    knobs.runtime.jit_cache_hook = note
    try:
        for launch in launches:
            _through_jit(launch)
    finally:
        knobs.runtime.jit_cache_hook = before
    return [Job(*key, target) for key, target in found.items()]


def load(launches, on_gpu):
    """Load the code of these launches from the cache on disk (or compile it), and onto the device."""
    for launch in launches:
        compiled = _through_jit(launch)
        if on_gpu:
            compiled.run  # noqa: B018 - a property that loads the code


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def compile_job(job):
    """Compile a job into Triton's cache on disk; no GPU is touched."""
    said, kernel = json.loads(job.said), getattr(importlib.import_module(job.module), job.name)
    constants = dict(zip(map(tuple, said["constant_keys"]), map(_tuples, said["constant_vals"]), strict=True))
    attrs = dict(zip(map(tuple, said["attrs_keys"]), said["attrs_vals"], strict=True))
    signature, options = ({k: _tuples(v) for k, v in said[part].items()} for part in ("signature", "options"))
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget(*job.target), options=options)


def main():
    for line in sys.stdin:
        job = Job(*json.loads(line))
        try:
            compile_job(job)
            said = ""
        except Exception as error:  # the first process compiles it again and raises this error visibly
            said = f"{type(error).__name__}: {error}"
        print(json.dumps([job.name, said]), flush=True)


if __name__ == "__main__":
    main()
