"""Launch plans: made once for a call's shapes, dtypes, flags and device, and complete in what they depend on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is not installed")

from fastpeft.kernels import (
    _launch,
    conv_grad_a,
    conv_shrink,
    linear4bit_small,
    lora_expand,
    lora_grad_a,
    lora_grad_b,
    lora_linear,
    lora_linear_fused,
    lora_shrink,
)

ROOT = Path(__file__).parents[2]


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


M, K, N, R = 128, 512, 768, 16
SEED, BITS = meta(1, dtype=torch.int64), meta(R, K // 8, dtype=torch.uint8)
BIAS = meta(N)
IMAGE = meta(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)
THIN = meta(R, 64, 3, 3)
PACKED, ABSMAX = meta(N * K // 2, dtype=torch.uint8), meta(N * K // 64, dtype=torch.float32)
# launcher -> its arguments by name, and for each argument that a launch depends on another value
CALLS = {
    "shrink": (
        lora_shrink.lora_shrink,
        {"x": meta(M, K), "a": meta(R, K), "p": 0.1, "seed": SEED, "copy": None, "tile": None},
        {
            "x": [meta(M + 16, K), meta(M, K + 16)[:, :K], meta(M, K, dtype=torch.float16)],
            "a": [meta(R + 16, K), meta(K, R).t(), meta(R, K, dtype=torch.float32)],
            "p": [0.0, 0.2],
            "copy": [meta(M, K), meta(M, K + 16)[:, :K]],
            "tile": [{"BLOCK_M": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 1}],
        },
    ),
    "expand": (
        lora_expand.lora_expand,
        {"s": meta(M, R), "b": meta(N, R), "bias": None, "lora_bias": None, "scale": 2.0},
        {
            "s": [meta(M + 16, R), meta(M, R + 16)[:, :R], meta(M, R, dtype=torch.float16)],
            "b": [meta(N + 16, R), meta(R, N).t(), meta(N, R, dtype=torch.float32)],
            "bias": [BIAS, BIAS.float()],
            "lora_bias": [BIAS, BIAS.float()],
            "scale": [3.0],
        },
    ),
    "grad_b": (
        lora_grad_b.lora_grad_b,
        {"dy": meta(M, N), "s": meta(M, R), "b": meta(N, R), "scale": 2.0, "need_db": True, "need_bias": False,
         "mask": None},
        {
            "dy": [meta(M, N + 16)[:, :N], meta(M, N, dtype=torch.float16)],
            "s": [meta(M, R + 16)[:, :R]],
            "b": [meta(R, N).t(), meta(N, R, dtype=torch.float32)],
            "scale": [3.0],
            "need_db": [False],
            "need_bias": [True],
            "mask": [meta(R, N // 8, dtype=torch.uint8)],
        },
    ),
    "grad_a": (
        lora_grad_a.lora_grad_a,
        {"x": meta(M, K), "ds": meta(M, R), "a": meta(R, K), "p": 0.1, "seed": SEED, "need_dx": True, "need_da": True,
         "mask": None},
        {
            "x": [meta(M, K + 16)[:, :K], meta(M, K, dtype=torch.float16)],
            "ds": [meta(M, R + 16)[:, :R]],
            "a": [meta(K, R).t(), meta(R, K, dtype=torch.float32)],
            "p": [0.0, 0.2],
            "need_dx": [False],
            "need_da": [False],
            "mask": [BITS],
        },
    ),
    "fused_fwd": (
        lora_linear_fused.lora_linear_fused_fwd,
        {"x": meta(M, K), "w": meta(N, K), "s": meta(M, R), "b": meta(N, R), "bias": None, "lora_bias": None,
         "scale": 2.0},
        {
            "x": [meta(M, K + 16)[:, :K]],
            "w": [meta(N, K + 16)[:, :K]],
            "s": [meta(M, R + 16)[:, :R]],
            "b": [meta(R, N).t(), meta(N, R, dtype=torch.float32)],
            "bias": [BIAS, BIAS.float()],
            "lora_bias": [BIAS],
            "scale": [3.0],
        },
    ),
    "fused_dx": (
        lora_linear_fused.lora_linear_fused_dx,
        {"dy": meta(M, N), "w": meta(N, K), "ds": meta(M, R), "a": meta(R, K), "p": 0.1, "seed": SEED},
        {
            "dy": [meta(M, N + 16)[:, :N]],
            "w": [meta(N, K + 16)[:, :K]],
            "ds": [meta(M, R + 16)[:, :R]],
            "a": [meta(K, R).t(), meta(R, K, dtype=torch.float32)],
            "p": [0.0, 0.2],
        },
    ),
    "linear4bit_small": (
        linear4bit_small.linear4bit_small,
        {"x": meta(16, K), "packed": PACKED, "scales": [ABSMAX],
         "quant_type": "nf4", "block_size": 64, "N": N, "s": meta(16, R), "b": meta(N, R), "bias": None,
         "lora_bias": None, "scale": 2.0},
        {
            "x": [meta(8, K), meta(16, K, dtype=torch.float16), meta(16, K + 16)[:, :K]],
            "scales": [[meta(N * K // 64, dtype=torch.uint8), *[meta(256, dtype=torch.float32)] * 3]],
            "quant_type": ["fp4"],
            "block_size": [128],
            "b": [None, meta(R, N).t(), meta(N, R, dtype=torch.float32)],
            "bias": [BIAS],
            "lora_bias": [BIAS],
        },
    ),
    "linear4bit_small_dx": (
        linear4bit_small.linear4bit_small_dx,
        {"dy": meta(16, N), "packed": PACKED, "scales": [ABSMAX],
         "quant_type": "nf4", "block_size": 64, "K": K, "dx": None},
        {"dy": [meta(8, N), meta(16, N, dtype=torch.float16)], "quant_type": ["fp4"], "block_size": [128],
         "dx": [meta(16, K)]},
    ),
    "conv_shrink": (
        conv_shrink.conv_shrink,
        {"x": IMAGE, "a": THIN, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "p": 0.1,
         "seed": SEED},
        {"x": [IMAGE.half(), IMAGE[:1]], "a": [meta(8, 64, 3, 3), meta(R, 64, 1, 1)], "stride": [(2, 2)],
         "padding": [(1, 1)], "dilation": [(2, 2)], "p": [0.0, 0.2]},
    ),
    "conv_grad_a": (
        conv_grad_a.conv_grad_a,
        {"x": IMAGE, "ds": meta(2 * 7 * 7, R), "a": THIN, "dx": IMAGE, "stride": (1, 1), "padding": (0, 0),
         "dilation": (1, 1), "groups": 1, "p": 0.1, "seed": SEED, "need_dx": True, "need_da": True},
        {"x": [IMAGE.half()], "a": [THIN.float()], "stride": [(2, 2)], "padding": [(1, 1)], "dilation": [(2, 2)],
         "p": [0.0, 0.2], "need_dx": [False], "need_da": [False]},
    ),
}  # fmt: skip


def described(value):
    """An argument of a kernel without its memory."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    return (value.shape, value.strides, value.block_shape) if hasattr(value, "block_shape") else value


def launched(run, arguments):
    """What a fresh plan and a kept one start; every tensor by dtype, shape and strides."""
    seen = []
    with _launch.captured() as launches:
        for _ in range(2):
            run(**arguments)
            seen.append(
                [
                    (each.kernel.__name__, each.grid, sorted(each.constants.items()), list(map(described, each.args)))
                    for each in launches
                ]
            )
            launches.clear()
    assert seen[0] == seen[1]
    return seen[0]


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_matters_makes_another_plan(name):
    """Each in turn, first with the other's plan at hand: what is started is what a cleared cache would start."""
    run, arguments, others = CALLS[name]
    base = launched(run, arguments)
    for argument, values in others.items():
        for value in values:
            changed = arguments | {argument: value}
            alone = launched(run, changed)
            assert alone != base, argument
            with _launch.captured() as launches:
                run(**arguments)
                launches.clear()
                run(**changed)
            beside = [(each.grid, sorted(each.constants.items()), list(map(described, each.args))) for each in launches]
            assert beside == [tuple(each[1:]) for each in alone], argument


@pytest.mark.skipif("Interpreted" not in type(lora_expand._lora_expand_kernel).__name__, reason="needs the interpreter")
def test_hit_and_miss():
    """Equal calls share a plan; a batch of another length has its own; other values share it."""
    x, a, b = torch.randn(5, 40), torch.randn(3, 40), torch.randn(6, 3)
    _launch.clear_plans()
    for rows, scale in ((5, 1.0), (5, 2.0), (4, 2.0)):
        s = lora_shrink.lora_shrink(x[:rows], a, 0.0, None)
        y = lora_expand.lora_expand(s, b, None, None, scale)
        torch.testing.assert_close(y, scale * (x[:rows] @ a.T @ b.T))
    assert lora_shrink._plan.cache_info()[:2] == lora_expand._plan.cache_info()[:2] == (1, 2)


@pytest.mark.skipif("Interpreted" not in type(lora_expand._lora_expand_kernel).__name__, reason="needs the interpreter")
def test_odd_addresses_take_the_narrow_tile():
    """Rows that begin between multiples of 16 bytes are read an element at a time, as are rows of odd lengths."""
    x = torch.randn(3 * 64 + 1)
    a = torch.randn(3, 64)
    found = []
    for part in (x[:-1].view(3, 64), x[1:].view(3, 64)):
        _launch.clear_plans()
        seen, start = [], _launch.Start.__call__

        def note(self, pointers, floats=(), aligned=True, seen=seen, start=start):
            seen.append((self.constants["BLOCK_K"], aligned))
            start(self, pointers, floats, aligned)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_launch.Start, "__call__", note)
            s = lora_shrink.lora_shrink(part, a, 0.0, None)
        torch.testing.assert_close(s, part @ a.T)
        found += seen
    assert found == [(32, True), (32, False)]


def test_counted_in_every_thread():
    """Autograd runs a CUDA backward on a thread of its own: its launches belong to who counts."""
    import threading

    with _launch.count_launches() as outer, _launch.count_launches() as inner:
        thread = threading.Thread(target=lambda: lora_shrink.lora_shrink(meta(M, K), meta(R, K), 0.0, None))
        thread.start()
        thread.join()
    assert [each.name for each in outer] == [each.name for each in inner] == ["lora_shrink"]


def test_strategies_are_asked_in_buckets(monkeypatch):
    """A batch length that was never met asks for no new choice, and each pass asks for its own."""
    asked = []
    monkeypatch.setattr(lora_linear, "choose_strategy", lambda side, M, *_: asked.append((side, M)) or "accumulate")
    w = meta(N, K)
    for rows in (8192, 8191, 6001, 5000):
        lora_linear.resolve_strategy("forward", "auto", meta(rows, K), w, R, 0.0)
        lora_linear.resolve_strategy("backward", "auto", meta(rows, N), w, R, 0.0)
    assert set(asked) == {(side, M) for side in ("forward", "backward") for M in (8192, 4096)}


# In a process without the interpreter, with a driver for a GPU that is not there: what a compiled plan does.
COMPILED = """
import json, os, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 7)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


driver.set_active(Driver())
from fastpeft import _warmup, dispatch
from fastpeft.kernels import _launch, _warm, lora_shrink

started, compiled = [], []


class Kernel(CompiledKernel):
    module = function = packed_metadata = None
    __init__ = lambda self: None
    launch_metadata = lambda self, *args: None
    run = lambda self, *args: started.append(args)


def nothing(self, key, signature, device, *rest, **options):
    compiled.append(self.__name__)
    return self.device_caches[device][0].setdefault(key, Kernel())


real, JITFunction._do_compile = JITFunction._do_compile, nothing
x, a = torch.zeros(64, 128), torch.zeros(8, 128)
lora_shrink.lora_shrink(x, a, 0.0, None)
lora_shrink.lora_shrink(x, a, 0.0, None)
same = [[each if isinstance(each, (int, float)) else None for each in args[:9] + args[14:]] for args in started]
hook = triton.knobs.runtime.launch_enter_hook
hook.add(lambda data: None)
lora_shrink.lora_shrink(x, a, 0.0, None)
watched = started[2][7] is hook
hook.calls.clear()
lora_shrink.lora_shrink(torch.zeros(64 * 128 + 1)[1:].view(64, 128), a, 0.0, None)
out = {"compiled": compiled[:], "started": len(started), "same": same[0] == same[1], "watched": watched}

JITFunction._do_compile = real
for kernel in (lora_shrink._lora_shrink_kernel,):
    kernel.device_caches.clear()
try:
    with _launch._without_compiler():
        lora_shrink._lora_shrink_kernel[(1,)](*[x] * 5, *[64] * 10, 1.0, 64, BLOCK_M=16, BLOCK_K=32, BLOCK_R=16,
                                              DROPOUT=False, COPY=False)
except RuntimeError as error:
    out["capture"] = str(error)
out["hook"] = triton.knobs.runtime.jit_cache_hook

dispatch._interpreted, dispatch.default = (lambda: True), "triton"
import fastpeft

torch.manual_seed(3)
model = torch.nn.Sequential(
    fastpeft.LoRALinear.from_linear(torch.nn.Linear(64, 48), rank=8), torch.nn.BatchNorm1d(48),
    fastpeft.LoRAConv2d(4, 8, 3, rank=4),
)
state = {k: v.clone() for k, v in model.state_dict().items()} | {"generator": torch.get_rng_state()}
asked, left = _warmup.needed(model, (48,), None, None)
now = model.state_dict() | {"generator": torch.get_rng_state()}
out["touched"] = [k for k, v in state.items() if not torch.equal(v, now[k])] + [p for p in model.parameters() if p.grad is not None]
out["left"], out["asked"] = list(left), sorted({op for op, _, _ in asked})
launches = [each for each in _warmup.launches_of(asked) if each.kernel.__name__ == "_lora_expand_kernel"]
jobs = _warm.missing(launches)
_warmup.compile_all(jobs, 1)
before = set(os.listdir(os.environ["TRITON_CACHE_DIR"]))
_warm.load(launches, False)
out["jobs"], out["missing"] = [job.name for job in jobs], len(_warm.missing(launches))
out["found"] = len(before) > 0 and set(os.listdir(os.environ["TRITON_CACHE_DIR"])) == before
batch, _ = _warmup.needed(model[2], (), torch.zeros(2, 4, 9, 9), None)
out["batch"] = sorted({op for op, _, _ in batch})
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED], env=environment, cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_second_launch_is_the_first_without_the_jit(compiled):
    """The same grid, stream, numbers and constants; under a profiler and at odd addresses Triton's JIT decides."""
    assert compiled["same"] and compiled["watched"]
    assert compiled["started"] == 4
    assert compiled["compiled"] == ["_lora_shrink_kernel"] * 2  # of even and of odd addresses


def test_a_missing_kernel_stops_a_capture_before_it_compiles(compiled):
    assert compiled["capture"].startswith("fastpeft: _lora_shrink_kernel must be compiled before a CUDA graph")
    assert compiled["hook"] is None


def test_warmup_compiles_what_a_step_needs(compiled):
    """In another process, under the very key that Triton then looks for; nothing of the model has changed."""
    assert compiled["touched"] == []
    assert compiled["left"] == ["2"]
    assert compiled["asked"] == ["lora_linear_bwd", "lora_linear_fwd"]
    assert compiled["batch"] == ["conv_grad_a", "conv_shrink", "lora_grad_b"]
    assert compiled["jobs"] == ["_lora_expand_kernel"] and compiled["missing"] == 0
    assert compiled["found"]
