"""Which function computes an operator: a table with one row per operator, its backends and what each requires.

A row names the operator's file and, in order of preference, its backends; the choice is made once, in the public
function, and backward receives the same name. An explicit backend that cannot serve is an error, never a fallback.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

BACKENDS = ("cpp", "cuda", "triton", "eager")
"""cpp: csrc/, on the CPU · cuda: csrc/cuda/ for all that reads a packed weight, with the passes over activations of
kernels/ · triton: kernels/, on CUDA; under TRITON_INTERPRET=1 where asked for by name · eager: reference/, anywhere."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    module     that holds its launchers; {file} stands for the row's file
    dtypes     that it serves; None: any
    gpus       "module:function" that names what this machine's GPUs lack for it, or None
    bf16_interpreted    whether it runs in bfloat16 under Triton's interpreter, which gets bfloat16 products wrong and
                        truncates results that it should round
    """

    name: str
    module: str
    dtypes: tuple[torch.dtype, ...] | None = _FLOATS
    gpus: str | None = None
    bf16_interpreted: bool = False


@dataclass(frozen=True)
class Row:
    """file: base name of the operator's file in every folder; backends: in order of preference."""

    file: str
    backends: tuple[Backend, ...]

    def get(self, backend: str) -> Backend | None:
        return next((each for each in self.backends if each.name == backend), None)


CPP = Backend("cpp", "fastpeft._native")
CUDA = Backend("cuda", "fastpeft._cuda")
TRITON = Backend("triton", "fastpeft.kernels.{file}")
EAGER = Backend("eager", "fastpeft.reference.{file}", dtypes=None)
# The fused GEMM exists because a GPU's 16-bit matrix units leave the memory idle: no other unit has that gap.
_FUSED = replace(TRITON, dtypes=_HALF, gpus="fastpeft.kernels.lora_linear_fused:gpus_unmet")
# On the CPU the vendor's library computes the thin convolution, and csrc the dropout around it.
_CPP_CONV = replace(CPP, module="fastpeft._native_conv")
# The CUDA kernels multiply by a packed weight on the 16-bit matrix units.
_CUDA_HALF = replace(CUDA, dtypes=_HALF)
# The kernel reads bfloat16 and writes bytes: it neither multiplies nor rounds in bfloat16.
_TRITON_BYTES = replace(TRITON, bf16_interpreted=True)

ROWS: dict[str, Row] = {
    "lora_shrink": Row("lora_shrink", (CPP, TRITON, EAGER)),
    "lora_expand": Row("lora_expand", (CPP, TRITON, EAGER)),
    "lora_expand_add": Row("lora_expand", (CPP, TRITON, EAGER)),
    "lora_grad_b": Row("lora_grad_b", (CPP, TRITON, EAGER)),
    "lora_grad_a": Row("lora_grad_a", (CPP, TRITON, EAGER)),
    "lora_linear_fused_fwd": Row("lora_linear_fused", (_FUSED, EAGER)),
    "lora_linear_fused_dx": Row("lora_linear_fused", (_FUSED, EAGER)),
    "conv_shrink": Row("conv_shrink", (_CPP_CONV, TRITON, EAGER)),
    "conv_grad_a": Row("conv_grad_a", (_CPP_CONV, TRITON, EAGER)),
    "lora_linear_fwd": Row("lora_linear", (CPP, TRITON, EAGER)),
    "lora_linear_bwd": Row("lora_linear", (CPP, TRITON, EAGER)),
    "lora_between_fwd": Row("lora_between", (CPP, TRITON, EAGER)),
    "lora_between_bwd": Row("lora_between", (CPP, TRITON, EAGER)),
    "quantize_4bit": Row("quantize_4bit", (CPP, _TRITON_BYTES, EAGER)),
    "quantize_absmax": Row("quantize_4bit", (CPP, _TRITON_BYTES, EAGER)),
    "dequantize_4bit": Row("dequantize_4bit", (CPP, CUDA, TRITON, EAGER)),
    "linear4bit_fwd": Row("linear4bit", (CPP, _CUDA_HALF, TRITON, EAGER)),
    "linear4bit_bwd": Row("linear4bit", (CPP, _CUDA_HALF, TRITON, EAGER)),
}
"""launcher -> its row. What else a new operator needs: tests/support/checklist.py."""

default: str | None = os.environ.get("FASTPEFT_BACKEND") or None
"""The backend that stands in for None: the one debug switch, read once, as a look-up takes 3 % of a tiny call."""


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


def _function(entry: str) -> Callable[..., Any]:
    module, name = entry.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def unmet(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """The requirement that ``backend`` fails for ``op`` on tensors of this device type and dtype; None if it serves."""
    entry = ROWS[op].get(backend)
    if entry is None:
        return f"an implementation of {op}"
    if entry.dtypes is not None and dtype not in entry.dtypes:
        names = [str(each).removeprefix("torch.") for each in entry.dtypes]
        return f"{', '.join(names[:-1])} or {names[-1]}"
    if backend == "eager":
        return None
    if backend in ("cpp", "cuda"):
        if device != ("cpu" if backend == "cpp" else "cuda"):
            return "tensors on the CPU" if backend == "cpp" else "tensors on a CUDA device"
        error = _import_error(entry.module)
        return f"the compiled extension ({error})" if error else None
    if _import_error("triton"):
        return f"triton ({_import_error('triton')})"
    if _import_error("fastpeft.kernels"):
        return f"its kernels ({_import_error('fastpeft.kernels')})"
    if device != "cuda":
        if not _interpreted():
            return "tensors on a CUDA device, or TRITON_INTERPRET=1"
        if dtype == torch.bfloat16 and not entry.bf16_interpreted:
            return "tensors on a CUDA device, as Triton's interpreter does not compute in bfloat16"
    elif entry.gpus is not None:
        lack: str | None = _function(entry.gpus)()
        return lack
    return None


def _able(launcher: str, device: str, dtype: torch.dtype) -> list[str]:
    return [each.name for each in ROWS[launcher].backends if unmet(launcher, each.name, device, dtype) is None]


def fuse_unmet(x: torch.Tensor, w: torch.Tensor, name: str) -> tuple[str, str, object] | None:
    """Why Triton's fused GEMM cannot take x, called ``name``, and w: (argument, rule, value); None if it can."""
    unmet: tuple[str, str, object] | None
    unmet = importlib.import_module("fastpeft.kernels.lora_linear_fused").fuse_unmet(x, w, name)
    return unmet


@cache
def _select(launcher: str, backend: str | None, device: str, dtype: torch.dtype, op: str) -> str:
    if backend is None:
        # Triton's interpreter serves only if asked for by name: the reference is a thousand times faster.
        return next(name for name in _able(launcher, device, dtype) if name != "triton" or device == "cuda")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    missing = unmet(launcher, backend, device, dtype)
    if missing is not None:
        able = ", ".join(_able(launcher, device, dtype))
        raise ValueError(
            f"{op}: backend must be able to serve {dtype} on {device} (one of: {able}), got {backend!r}, "
            f"which requires {missing}"
        )
    return backend


def select(launcher: str, backend: str | None, device: str, dtype: torch.dtype, op: str | None = None) -> str:
    """The backend that will serve; None means ``default``.

    op         the public function, as an error names it; None: the launcher's name
    Raises     ValueError: an unknown backend, or one whose requirement does not hold.
    """
    return _select(launcher, backend or default, device, dtype, op or launcher)


# Set by hand: torch.compiler.assume_constant_result would import all of Dynamo, and triton with it.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def where(op: str, backend: str) -> str:
    """The launcher, as "module:function"."""
    row = ROWS[op]
    entry = row.get(backend)
    assert entry is not None, f"{op} has no backend {backend}"
    return f"{entry.module.format(file=row.file)}:{op}"


@cache
def load(op: str, backend: str) -> Callable[..., Any]:
    """The launcher of an operator; its module is imported on first use."""
    return _function(where(op, backend))


def strategy(op: str, backend: str, *args: Any) -> str:
    """How a backend computes this call, in its own words: ``<op>_strategy`` beside the launcher, on the same arguments.

    Empty for a launcher with one strategy only, and for an operator that is made of others.
    """
    if backend == "eager":
        return "eager: the reference, op by op"
    if op not in ROWS:
        return ""
    module = importlib.import_module(where(op, backend).split(":")[0])
    tell = getattr(module, f"{op}_strategy", None)
    return "direct: kernels of its own" if tell is None else str(tell(*args))
