"""The hyperparameters of an adapter: spellings, defaults and their checks, in one place for every LoRA module.

Two conventions exist, and their parts are not interchangeable: A ~ N(0, 1) with α/r = 2 moves the output, per unit of
learning rate, 280 times as far as with 0.01 and 49 times as far as kaiming with α/r. So the defaults come in one piece:

    layout      lora_A   lora_B   rank   dropout   init      scaling
    "out_in"    [r, K]   [N, r]   8      0.1       kaiming   α/r, α = 16
    "in_out"    [K, r]   [r, N]   4      0         randn     0.01, fixed

An explicit ``alpha`` or ``use_rslora`` asks for the first convention's init and scaling in either layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.nn import init as schemes
from fastpeft.ops import _checks

LAYOUTS = ("out_in", "in_out")


@dataclass(frozen=True)
class Config:
    in_features: int
    out_features: int
    rank: int
    alpha: float | None
    scaling: float
    use_rslora: bool
    init: str
    dropout: float
    layout: str
    bias: bool
    backend: str | None


def one_of(op: str, default: Any = None, **spellings: Any) -> Any:
    """The value of the one spelling that is not None; ``default`` where all are."""
    given = {name: value for name, value in spellings.items() if value is not None}
    first = next(iter(spellings))
    _checks.require(len(given) <= 1, op, first, "be given under one name", " and ".join(given))
    return next(iter(given.values()), default)


def size(op: str, name: str, value: object) -> int:
    _checks.require_dtype(
        isinstance(value, int) and not isinstance(value, bool), op, name, "be an integer", type(value).__name__
    )
    assert isinstance(value, int)
    _checks.require(value >= 1, op, name, "be at least 1", value)
    return value


def _number(op: str, name: str, value: object) -> float:
    _checks.require_dtype(
        isinstance(value, (int, float)) and not isinstance(value, bool), op, name, "be a number", type(value).__name__
    )
    assert isinstance(value, (int, float))
    _checks.require(math.isfinite(value), op, name, "be finite", value)
    return float(value)


def adapter_dtype(op: str, dtype: torch.dtype | None, weight: torch.Tensor | None = None) -> torch.dtype:
    """The dtype of new factors; beside a half-precision base fp32, whose updates are below the base's rounding step."""
    if dtype is None:
        dtype = torch.get_default_dtype() if weight is None else torch.promote_types(weight.dtype, torch.float32)
    _checks.require_dtype(dtype.is_floating_point, op, "dtype", "be a floating point dtype", dtype)
    return dtype


def resolve(
    op: str,
    in_features: int,
    out_features: int,
    *,
    rank: int | None,
    alpha: float | None,
    scaling: float | None,
    use_rslora: bool,
    init: str | None,
    dropout: float | None,
    layout: str,
    bias: bool,
    backend: str | None,
    base: bool,
) -> Config:
    """Check every hyperparameter and fill in what was left out; ``base``: there is a weight for init to read.

    Raises     ValueError: range, an unknown name, or alpha beside scaling.  TypeError: a value of the wrong type.
    """
    _checks.require(layout in LAYOUTS, op, "layout", f"be one of {', '.join(LAYOUTS)}", repr(layout))
    slides = layout == "in_out"
    rank = size(op, "rank", (4 if slides else 8) if rank is None else rank)
    dropout = (0.0 if slides else 0.1) if dropout is None else dropout
    _checks.probability(op, "dropout", dropout)
    _checks.require_dtype(isinstance(bias, bool), op, "bias", "be True or False", type(bias).__name__)
    names = (None, *dispatch.BACKENDS)
    _checks.require(backend in names, op, "backend", f"be one of {', '.join(map(str, names))}", repr(backend))
    fixed = scaling is not None or (slides and alpha is None and not use_rslora)
    if scaling is not None:
        _checks.require(alpha is None, op, "alpha", "be None where scaling is given", alpha)
        _checks.require(not use_rslora, op, "use_rslora", "be False where scaling is given", use_rslora)
    if fixed:
        value = 0.01 if scaling is None else _number(op, "scaling", scaling)
    else:
        alpha = _number(op, "alpha", 16.0 if alpha is None else alpha)
        value = alpha / (math.sqrt(rank) if use_rslora else rank)
    init = ("randn" if slides and fixed else "kaiming") if init is None else init
    schemes.check(op, init, rank, in_features, out_features, value, base)
    return Config(
        in_features, out_features, rank, alpha, value, use_rslora, init, float(dropout), layout, bias, backend
    )
