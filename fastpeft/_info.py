"""What is installed and able to serve, what it keeps, and what a call of a module will do."""

from __future__ import annotations

import importlib
import platform
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastpeft import dispatch
from fastpeft._version import __version__
from fastpeft.ops import _library


@dataclass(frozen=True)
class Info:
    """Versions, and for each backend what it can serve here or what it lacks."""

    versions: dict[str, str]
    backends: dict[str, str]
    extension: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fastpeft {self.versions['fastpeft']}"]
        lines += [f"  {name:10} {version}" for name, version in self.versions.items() if name != "fastpeft"]
        lines += [f"  backend {name:7} {state}" for name, state in self.backends.items()]
        lines += [f"  extension {name}: {value}" for name, value in self.extension.items()]
        return "\n".join(lines)


def info() -> Info:
    """Versions and backends of this installation; print it, or read its fields."""
    versions = {"fastpeft": __version__, "torch": torch.__version__, "python": platform.python_version()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = {}
    for name in dispatch.BACKENDS:
        op = "linear4bit_fwd" if name == "cuda" else "lora_linear_fwd"
        missing = {kind: dispatch.unmet(op, name, kind, torch.float32) for kind in {"cpu", device}}
        able = sorted(kind for kind, lack in missing.items() if lack is None)
        backends[name] = f"serves {' and '.join(able)}" if able else f"requires {missing[device]}"
    extension = {}
    if dispatch.unmet("lora_linear_fwd", "cpp", "cpu", torch.float32) is None:
        native = importlib.import_module("fastpeft._native")
        extension = native.build_info() | {"workspace": f"{native.kept_bytes() / 2**20:.1f} MiB kept"}
    if dispatch.unmet("lora_linear_fwd", "triton", "cuda", torch.float32) is None:
        versions["triton"] = importlib.import_module("triton").__version__
    return Info(versions, backends, extension)


def release_workspace() -> int:
    """Give the system back what the CPU kernels keep between calls, 64 MiB at most; returns how many bytes that was.

    Buffers of 64 KiB and more that a call needs only for its own length, which would cost more in page faults than in
    arithmetic; later calls ask for new ones. On a GPU they are torch's: ``torch.cuda.empty_cache()``.
    """
    if dispatch.unmet("lora_linear_fwd", "cpp", "cpu", torch.float32) is not None:
        return 0
    return int(importlib.import_module("fastpeft._native").release_kept())


@dataclass(frozen=True)
class Call:
    """One kind of operator call: what it computes, on what, by which backend and strategy."""

    op: str
    backend: str
    strategy: str
    shape: tuple[tuple[str, int], ...]
    dtype: str
    p: float
    flop: int
    elements: int
    count: int = 1

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.shape)
        dropout = f", dropout {self.p}" if self.p else ""
        times = f" x {self.count}" if self.count > 1 else ""
        return (
            f"{self.op}{times}: {sizes}, {self.dtype}{dropout}\n"
            f"  backend {self.backend}, strategy {self.strategy}\n"
            f"  forward {self.flop / 1e9:.3f} GFLOP, at least {self.elements / 1e6:.3f} M elements of x, W and y moved"
        )


@dataclass(frozen=True)
class Explanation:
    """The operator calls of one forward pass; empty where no layer of the module is ours or every one stepped aside."""

    calls: tuple[Call, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or "no fastpeft operator was called"


def _strategy(backend: str, x: torch.Tensor, w: torch.Tensor, rank: int, p: float) -> str:
    if backend == "eager":
        return "eager: the reference, op by op"
    if backend == "triton":
        resolve = importlib.import_module("fastpeft.kernels.lora_linear").resolve_strategy
        return str(resolve("auto", x, w, rank, p))
    native = importlib.import_module("fastpeft._native").native_gemm()
    if x.dtype == torch.float32 or native[str(x.dtype).removeprefix("torch.")]:
        return "accumulate: rank-R product first, then the vendor GEMM with beta = 1"
    name = str(x.dtype).removeprefix("torch.")
    return f"upcast: accumulate in fp32, as this processor has no {name} arithmetic"


_CPU_4BIT = {
    "bytes": "bytes: one or two rows multiply the packed weight in products of 8-bit integers, where those hold x",
    "tiles": "tiles: decoded in the cache for the matrix units, up to 512 rows",
    "nibbles": "nibbles: few rows multiply the packed weight",
    "blocks": "blocks: decoded in the cache for the vector units",
    "panels": "panels: dequantised in the cache for the vendor GEMM",
}


def _strategy_4bit(backend: str, x: torch.Tensor, N: int, block_size: int, rank: int) -> str:
    if backend == "eager":
        return "eager: the reference, op by op"
    if backend == "cpp":
        way = importlib.import_module("fastpeft._native").linear4bit_way
        return _CPU_4BIT[way(*x.shape, str(x.dtype).removeprefix("torch."), block_size)]
    composition = importlib.import_module("fastpeft.kernels.linear4bit")
    if composition.use_small(x, N, x.shape[1], block_size):
        return "small: one kernel reads the packed weight"
    if backend == "cuda" and importlib.import_module("fastpeft._cuda").use_mid(x, N, block_size):
        return "mid: one kernel reads the packed weight once for every 128 rows"
    if composition.use_augmented(x, N, rank):
        return "augmented: the weight is dequantised into a buffer beside lora_B, then one vendor GEMM over K + R"
    if not rank:
        return "dequant: the weight is dequantised into a buffer, then the vendor GEMM; there is no adapter"
    return "accumulate: rank-R product first, the weight dequantised into a buffer, then the vendor GEMM with beta = 1"


def _call(op: str, backend: str, strategy: str, x: torch.Tensor, N: int, rank: int, p: float) -> Call:
    M, K = x.shape
    shape = (("M", M), ("K", K), ("N", N), ("rank", rank))
    weight = N * K if op != "lora_adapter" else 0
    flop, elements = 2 * M * weight + 2 * M * rank * (K + N), M * K + weight + M * N
    return Call(op, backend, strategy, shape, str(x.dtype).removeprefix("torch."), p, flop, elements)


def explain(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``module(*args, **kwargs)`` once without gradients and report each operator call that it makes.

    The state of torch's generators is put back. Any module will do, a whole model too; equal calls are counted once.
    """
    seen: Counter[Call] = Counter()
    shrunk: list[tuple[Any, ...]] = []

    def note(op: str, backend: str, arguments: tuple[Any, ...]) -> None:
        if op == "lora_linear_fwd":
            x, w, a, _, _, _, _, p, _, _ = arguments
            strategy = _strategy(backend, x, w, a.shape[0], p)
            seen[_call("lora_linear", backend, strategy, x, w.shape[0], a.shape[0], p)] += 1
        elif op == "lora_shrink":
            shrunk[:] = [arguments]
        elif op == "lora_expand" and shrunk:  # lora_adapter's two; the operators with a base product have theirs inside
            x, a, p, _ = shrunk.pop()
            strategy = "eager: the reference, op by op" if backend == "eager" else "adapter: its two products, no base"
            seen[_call("lora_adapter", backend, strategy, x, arguments[1].shape[0], a.shape[0], p)] += 1
        elif op == "linear4bit_fwd":
            x, _, scales, quant_type, block_size, N, a, _, _, _, _, p, _ = arguments
            doubly = ", absmax in 8 bits" if len(scales) == 4 else ""
            rank, name = (0, "linear4bit") if a is None else (a.shape[0], "linear4bit_lora")
            strategy = _strategy_4bit(backend, x, N, block_size, rank)
            strategy = f"{strategy}; {quant_type} in blocks of {block_size}{doubly}"
            seen[_call(name, backend, strategy, x, N, rank, p)] += 1

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad(), _library.watching(note):
        module(*args, **kwargs)
    return Explanation(tuple(replace(call, count=count) for call, count in seen.items()))
