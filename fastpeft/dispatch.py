"""Which function computes an operator: one table, op × backend, and what each backend requires.

The order of ``BACKENDS`` is the order of preference; the choice is made once, in the public function, and backward
receives the same name. An explicit backend that cannot serve is an error, never a fallback.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

BACKENDS = ("cpp", "cuda", "triton", "eager")
"""cpp: csrc/, on the CPU · cuda: csrc/*.cu, on CUDA · triton: kernels/, on CUDA or under TRITON_INTERPRET=1 · eager:
reference/, anywhere."""

_MODULES = {
    "cpp": "fastpeft._native",
    "cuda": "fastpeft._cuda",
    "triton": "fastpeft.kernels.{file}",
    "eager": "fastpeft.reference.{file}",
}

_FILES = {
    "lora_shrink": "lora_shrink",
    "lora_expand": "lora_expand",
    "lora_expand_add": "lora_expand",
    "lora_grad_b": "lora_grad_b",
    "lora_grad_a": "lora_grad_a",
    "lora_linear_fused_fwd": "lora_linear_fused",
    "lora_linear_fused_dx": "lora_linear_fused",
    "lora_linear_fwd": "lora_linear",
    "lora_linear_bwd": "lora_linear",
    "quantize_4bit": "quantize_4bit",
    "quantize_absmax": "quantize_4bit",
    "dequantize_4bit": "dequantize_4bit",
    "linear4bit_fwd": "linear4bit",
    "linear4bit_bwd": "linear4bit",
}
"""launcher -> base name of its file, the same in every folder."""

# Strategy "fused" exists because a GPU's 16-bit matrix units leave the memory idle: no other unit has that gap.
_FUSED = frozenset({"lora_linear_fused_fwd", "lora_linear_fused_dx"})
# What vendor libraries and Triton leave undone on a GPU.
_CUDA = frozenset({"dequantize_4bit", "linear4bit_fwd", "linear4bit_bwd"})

TABLE: dict[str, dict[str, str]] = {
    op: {
        backend: f"{_MODULES[backend].format(file=file)}:{op}"
        for backend in BACKENDS
        if not (backend == "cpp" and op in _FUSED) and not (backend == "cuda" and op not in _CUDA)
    }
    for op, file in _FILES.items()
}

default: str | None = os.environ.get("FASTPEFT_BACKEND") or None
"""The backend that stands in for None: the one debug switch, read once, as a look-up takes 3 % of a tiny call."""

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@cache
def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def unmet(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """The requirement that ``backend`` fails for ``op`` on tensors of this device type and dtype; None if it serves."""
    if backend not in TABLE[op]:
        return f"an implementation of {op}"
    if backend == "eager":
        return None
    if op in _FUSED and dtype == torch.float32:
        return "bfloat16 or float16"
    if dtype not in _KERNEL_DTYPES:
        return "float32, bfloat16 or float16"
    if backend in ("cpp", "cuda"):
        if device != ("cpu" if backend == "cpp" else "cuda"):
            return "tensors on the CPU" if backend == "cpp" else "tensors on a CUDA device"
        error = _import_error(_MODULES[backend])
        return f"the compiled extension ({error})" if error else None
    if _import_error("triton"):
        return f"triton ({_import_error('triton')})"
    if device != "cuda" and not _interpreted():
        return "tensors on a CUDA device, or TRITON_INTERPRET=1"
    if op in _FUSED and device == "cuda":
        cost = importlib.import_module("fastpeft.kernels._cost")
        found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
        # Of several GPUs one suffices: `fuse_unmet` asks the one that the tensors are on.
        if found and not any(map(cost.fused_serves, found)):
            return f"a GPU of {cost.FUSED_NEEDS}"
    return None


def fuse_unmet(x: torch.Tensor, w: torch.Tensor, name: str) -> tuple[str, str, object] | None:
    """(argument, rule, value) of what keeps Triton's fused GEMM from x, which is called ``name``, and w; or None."""
    unmet: tuple[str, str, object] | None
    unmet = importlib.import_module("fastpeft.kernels.lora_linear_fused").fuse_unmet(x, w, name)
    return unmet


@cache
def _select(launcher: str, backend: str | None, device: str, dtype: torch.dtype, op: str) -> str:
    if backend is None:
        return next(name for name in BACKENDS if unmet(launcher, name, device, dtype) is None)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    missing = unmet(launcher, backend, device, dtype)
    if missing is not None:
        able = [name for name in BACKENDS if unmet(launcher, name, device, dtype) is None]
        raise ValueError(
            f"{op}: backend must be able to serve {dtype} on {device} (one of: {', '.join(able)}), got {backend!r}, "
            f"which requires {missing}"
        )
    return backend


def select(launcher: str, backend: str | None, device: str, dtype: torch.dtype, op: str | None = None) -> str:
    """The backend that will serve; ``default`` stands in for None.

    op         the public function, for an error to name; None where it has the launcher's name
    Raises     ValueError: an unknown backend, or one whose requirement does not hold.
    """
    return _select(launcher, backend or default, device, dtype, op or launcher)


# What torch.compiler.assume_constant_result sets; calling it would import all of Dynamo, and triton with it.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def load(op: str, backend: str) -> Callable[..., Any]:
    """The function of a table entry; its module is imported on first use."""
    module, name = TABLE[op][backend].split(":")
    return getattr(importlib.import_module(module), name)
