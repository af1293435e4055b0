"""The options of an adapter: their names, spellings, defaults and checks, once for every LoRA module.

Two conventions exist, and their parts are not interchangeable: A ~ N(0, 1) with α/r = 2 moves the output, per unit of
learning rate, 280 times as far as with 0.01 and 49 times as far as kaiming with α/r. So the defaults form sets:

    layout      lora_A   lora_B   rank   dropout   init      scaling
    "out_in"    [r, K]   [N, r]   8      0.1       kaiming   α/r, α = 16
    "in_out"    [K, r]   [r, N]   4      0         randn     0.01, fixed

An explicit ``alpha`` or ``use_rslora`` asks for the first convention's init and scaling in either layout.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypedDict, TypeVar

import torch

from fastpeft import dispatch
from fastpeft.nn import init as schemes
from fastpeft.ops import _checks

_P = ParamSpec("_P")
_R = TypeVar("_R")

LAYOUTS = ("out_in", "in_out")


class AdapterOptions(TypedDict, total=False):
    """The options by keyword of every LoRA module; ``LoRALayer``'s docstring explains each."""

    rank: int | None
    alpha: float | None
    scaling: float | None
    use_rslora: bool
    init: str | None
    dropout: float | None
    dropout_probability: float | None
    layout: str | None
    bias: bool
    backend: str | None


OPTIONS = tuple(AdapterOptions.__annotations__)

# Other libraries' names for our options.
_ELSEWHERE = {
    "r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "p": "dropout",
    "network_dim": "rank", "network_alpha": "alpha", "init_lora_weights": "init", "scale": "scaling",
    "lora_bias": "bias", "rslora": "use_rslora",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The options of one adapter, checked and complete."""

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

    @staticmethod
    def of(
        op: str,
        in_features: int,
        out_features: int,
        options: dict[str, Any],
        *,
        layout: str = "out_in",
        base: bool = False,
    ) -> Config:
        """Take the names of `AdapterOptions` out of ``options``, check them and fill in what was left out.

        layout     used if ``options`` has none
        base       whether init has a weight to read
        Raises     ValueError: range, an unknown value, alpha beside scaling, or an option under two names.
                   TypeError: a value of the wrong type.
        """
        given: dict[str, Any] = {name: options.pop(name) for name in OPTIONS if name in options}
        layout = layout if given.get("layout") is None else given["layout"]
        _checks.require(layout in LAYOUTS, op, "layout", f"be one of {', '.join(LAYOUTS)}", repr(layout))
        in_out = layout == "in_out"
        rank, alpha, scaling = given.get("rank"), given.get("alpha"), given.get("scaling")
        rank = size(op, "rank", (4 if in_out else 8) if rank is None else rank)
        dropout = one_of(
            op,
            0.0 if in_out else 0.1,
            dropout_probability=given.get("dropout_probability"),
            dropout=given.get("dropout"),
        )
        _checks.probability(op, "dropout", dropout)
        bias, use_rslora = given.get("bias", False), given.get("use_rslora", False)
        flag(op, "bias", bias)
        flag(op, "use_rslora", use_rslora)
        backend, names = given.get("backend"), (None, *dispatch.BACKENDS)
        _checks.require(backend in names, op, "backend", f"be one of {', '.join(map(str, names))}", repr(backend))
        fixed = scaling is not None or (in_out and alpha is None and not use_rslora)
        if scaling is not None:
            _checks.require(alpha is None, op, "alpha", "be None where scaling is given", alpha)
            _checks.require(not use_rslora, op, "use_rslora", "be False where scaling is given", use_rslora)
        if fixed:
            value = 0.01 if scaling is None else number(op, "scaling", scaling)
        else:
            alpha = number(op, "alpha", 16.0 if alpha is None else alpha)
            value = alpha / (math.sqrt(rank) if use_rslora else rank)
        init = given.get("init")
        init = ("randn" if in_out and fixed else "kaiming") if init is None else init
        schemes.check(op, init, rank, in_features, out_features, value, base)
        return Config(
            in_features, out_features, rank, alpha, value, use_rslora, init, float(dropout), layout, bias, backend
        )


def refuse_unknown(op: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for the first of ``options`` that is not ``known``; the error names the nearest known one."""
    names = sorted(set(known) - {"self"})
    for name in options:
        if name in names:
            continue
        near = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in names else difflib.get_close_matches(name, names, n=1)
        meant = f"did you mean {near[0]}?" if near else f"these are known: {', '.join(names)}"
        _checks.require_dtype(False, op, name, "be a known option", f"an unknown one: {meant}")


def named_options(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a function, or constructor, that has named parameters only the errors of `refuse_unknown`."""
    names = list(inspect.signature(call).parameters)

    @functools.wraps(call)
    def checked(*args: _P.args, **options: _P.kwargs) -> _R:
        refuse_unknown(type(args[0]).__name__ if names[0] == "self" else call.__name__, options, names)
        return call(*args, **options)

    return checked


def one_of(op: str, default: Any = None, **spellings: Any) -> Any:
    """The value of the one spelling that is not None; ``default`` if all are."""
    given = {name: value for name, value in spellings.items() if value is not None}
    first = next(iter(spellings))
    _checks.require(len(given) <= 1, op, first, "be given under one name", " and ".join(given))
    return next(iter(given.values()), default)


def size(op: str, name: str, value: object, least: int = 1) -> int:
    _checks.require_dtype(
        isinstance(value, int) and not isinstance(value, bool), op, name, "be an integer", type(value).__name__
    )
    assert isinstance(value, int)
    _checks.require(value >= least, op, name, f"be at least {least}", value)
    return value


def number(op: str, name: str, value: object) -> float:
    _checks.require_dtype(
        isinstance(value, (int, float)) and not isinstance(value, bool), op, name, "be a number", type(value).__name__
    )
    assert isinstance(value, (int, float))
    _checks.require(math.isfinite(value), op, name, "be finite", value)
    return float(value)


def flag(op: str, name: str, value: object) -> None:
    _checks.require_dtype(isinstance(value, bool), op, name, "be True or False", type(value).__name__)


def adapter_dtype(op: str, dtype: torch.dtype | None, weight: torch.Tensor | None = None) -> torch.dtype:
    """The dtype of new factors: fp32 beside a half-precision base, as one update is below its rounding step."""
    if dtype is None:
        dtype = torch.get_default_dtype() if weight is None else torch.promote_types(weight.dtype, torch.float32)
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    _checks.require_dtype(known, op, "dtype", "be a floating point dtype", dtype)
    return dtype
