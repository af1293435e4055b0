"""What is installed and can serve, what memory it keeps, and what a call of a module will do."""

from __future__ import annotations

import importlib
import platform
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastpeft import _installed, dispatch
from fastpeft._version import __version__
from fastpeft.ops import _library


@dataclass(frozen=True)
class Info:
    """Versions, and for each backend what it can serve here or what it is missing."""

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
        dtype = torch.bfloat16 if name == "cuda" else torch.float32  # what each computes in
        missing = {kind: dispatch.unmet(op, name, kind, dtype) for kind in {"cpu", device}}
        able = sorted(kind for kind, lack in missing.items() if lack is None)
        backends[name] = f"serves {' and '.join(able)}" if able else f"requires {missing[device]}"
    extension = {}
    if dispatch.unmet("lora_linear_fwd", "cpp", "cpu", torch.float32) is None:
        native = importlib.import_module("fastpeft._native")
        extension = native.build_info() | {"workspace": f"{native.kept_bytes() / 2**20:.1f} MiB kept"}
    extension |= {f"without {part}": why for part, why in _installed.left_out().items()}
    if dispatch.unmet("lora_linear_fwd", "triton", "cuda", torch.float32) is None:
        versions["triton"] = importlib.import_module("triton").__version__
    return Info(versions, backends, extension)


def release_workspace() -> int:
    """Free the memory that the CPU kernels keep between calls, 64 MiB at most; returns the number of bytes freed.

    These are scratch buffers of 64 KiB and more. They are kept because a fresh buffer costs more in page faults than
    the arithmetic in it; later calls allocate new ones. On a GPU torch keeps them: ``torch.cuda.empty_cache()``.
    """
    if dispatch.unmet("lora_linear_fwd", "cpp", "cpu", torch.float32) is not None:
        return 0
    return int(importlib.import_module("fastpeft._native").release_kept())


@dataclass(frozen=True)
class Explanation:
    """The operator calls of one forward pass; empty if no layer is ours, or every layer left its call to PEFT."""

    calls: tuple[_library.Call, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or "no fastpeft operator was called"


def explain(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``module(*args, **kwargs)`` once without gradients and report each operator call that it makes.

    The state of torch's generators is restored. Any module will do, even a whole model; equal calls are listed once.

    Returns    an `Explanation`, whose ``calls`` differ in shape, dtype, backend or strategy; print it
    Raises     what the module raises
    """
    seen: Counter[_library.Call] = Counter()

    def note(call: _library.Call) -> None:
        seen[call] += 1

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad(), _library.watching(note):
        module(*args, **kwargs)
    return Explanation(tuple(replace(call, count=count) for call, count in seen.items()))
