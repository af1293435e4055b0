"""Host time of the Triton path, launch by launch, with a driver that launches nothing: no GPU is needed.

    python bench host [--before CHECKOUT]

What is timed is Python: the launchers of kernels/ and Triton's JIT, down to the call of the compiled kernel's launcher,
which is a stub, as are the compiler and the vendor's GEMM. CPU time of this process, the least of several means.
--before times another checkout in the same way, and prints both.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

M, K, N, R = 64, 256, 256, 16
SCALE = 2.0


def without_gpu() -> None:
    """Triton's driver and compiler replaced: a GPU of capability 9.0 on which every kernel exists and does nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    class Kernel(CompiledKernel):
        module = function = packed_metadata = None

        def __init__(self) -> None:
            pass

        def launch_metadata(self, grid, stream, *args) -> None:
            return None

        def run(self, *args) -> None:
            return None

    def compile_nothing(self, key, signature, device, *rest, **options) -> CompiledKernel:
        kernel = Kernel()
        self.device_caches[device][0][key] = kernel
        return kernel

    driver.set_active(Driver())
    JITFunction._do_compile = compile_nothing


def microseconds(call: Callable[[], object], calls: int) -> float:
    for _ in range(50):
        call()
    best = float("inf")
    for _ in range(7):
        started = time.process_time()
        for _ in range(calls):
            call()
        best = min(best, (time.process_time() - started) / calls)
    return 1e6 * best


def rows() -> dict[str, Callable[[], object]]:
    from fastpeft import dispatch, ops
    from fastpeft.kernels import lora_expand, lora_grad_a, lora_grad_b, lora_linear, lora_shrink

    lora_linear.add_product = lambda out, left, right: None
    dispatch._interpreted = lambda: True  # as if the CPU's tensors were asked for by a test
    x, dy, s = (torch.zeros(M, width, dtype=torch.float16) for width in (K, N, R))
    w, a, b = torch.zeros(N, K, dtype=torch.float16), torch.zeros(R, K), torch.zeros(N, R)
    seed = torch.zeros(1, dtype=torch.int64)
    out: dict[str, Callable[[], object]] = {
        "lora_shrink": lambda: lora_shrink.lora_shrink(x, a, 0.0, None),
        "lora_expand": lambda: lora_expand.lora_expand(s, b, None, None, SCALE),
        "lora_grad_b": lambda: lora_grad_b.lora_grad_b(dy, s, b, SCALE, True, False),
        "lora_grad_a": lambda: lora_grad_a.lora_grad_a(x, s, a, 0.0, None, True, True),
    }
    needs = (True, True, True, False)
    lengths = iter(range(M, 10**9))
    wide = torch.zeros(2**15, K, dtype=torch.float16)
    for p in (0.0, 0.1):
        mask = seed if p else None
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]

        def forward(strategy, p=p, mask=mask):
            lora_linear.lora_linear_fwd(x, w, a, b, None, None, SCALE, p, mask, strategy=strategy)

        def backward(strategy, p=p, mask=mask):
            lora_linear.lora_linear_bwd(dy, x, w, a, b, s, SCALE, p, mask, *needs, strategy=strategy)

        def step(p=p, leaves=leaves):
            x, a, b = leaves
            y = ops.lora_linear(x, w, a, b, scale=SCALE, dropout=p, backend="triton")
            torch.autograd.grad(y, leaves, dy)

        for strategy in ("accumulate", "fused"):
            out |= {
                f"{strategy}, p={p}: forward": partial(forward, strategy),
                f"{strategy}, p={p}: backward": partial(backward, strategy),
            }
        out[f"operator with autograd, p={p}"] = step
    out["forward of a new batch length"] = lambda: lora_linear.lora_linear_fwd(
        wide[: next(lengths) % 2**15], w, a, b, None, None, SCALE, 0.0, None
    )
    return out


def measured() -> dict[str, float]:
    torch.set_num_threads(1)
    without_gpu()
    return {name: microseconds(call, 1000) for name, call in rows().items()}


def of_checkout(path: str) -> dict[str, float]:
    """The same rows of the sources in `path`."""
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, __file__, "--json"]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(text.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="CHECKOUT", help="the root of another checkout, timed beside this one")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(argv)
    before = of_checkout(options.before) if options.before else {}
    found = measured()
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{'us of host time, x [64, 256], r=16':42} {'before' if before else '':>8} {'now':>8}")
    for name, now in found.items():
        was = f"{before[name]:8.1f}" if name in before else " " * 8
        print(f"{name:42} {was} {now:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
